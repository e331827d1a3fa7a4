"""Reports: what several cards say, side by side, as one HTML page, one Markdown file and their figures.

Everything comes from the cards: no weights, no torch, no network. The sections make a `document`, `write` and
`markdown` say it in two languages, and `figures` draws.
"""
