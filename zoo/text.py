"""Text of cards on a terminal or a page. A card may be a stranger's, so what cannot be printed is taken out first."""

import unicodedata

# control characters, halves of surrogate pairs, unassigned code points, and what silently reverses or hides text
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Cn", "Co"})
_JOINERS = "\u200c\u200d"


def plain(text: str) -> str:
    """Return one line of printable text: any white space becomes a blank, what cannot be printed U+FFFD."""
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """Return text with its lines, in which what cannot be printed (a terminal's commands, say) is U+FFFD."""
    shown = (
        "\ufffd"
        if unicodedata.category(character) in _UNPRINTABLE and character not in _JOINERS and character != "\n"
        else character
        for character in text
    )
    return "".join(shown)
