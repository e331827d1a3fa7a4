"""Reports: what several cards say, side by side, as one HTML page, one Markdown file and their figures.

Everything comes from the cards: no weights, no torch, no network. `content` says what stands in a report, `page` and
`markdown` write the same content in two languages, and `figures` draws.
"""
