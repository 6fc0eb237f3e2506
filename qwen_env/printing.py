"""Text from elsewhere, for a terminal."""

from unicodedata import category


def printable(text: str) -> str:
    """`text` with escapes for control characters, which a terminal would obey."""
    return "".join(
        # Category Zs: spaces of all kinds, such as the wide one of Chinese text.
        c if c.isprintable() or c == "\n" or category(c) == "Zs" else ascii(c)[1:-1]
        for c in text
    )
