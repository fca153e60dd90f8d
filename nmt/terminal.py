"""Text from anywhere, as a terminal may have it."""

import re

# All control characters (C0, DEL, C1) but tab and line feed: with them a text can move the cursor, hide what was
# printed before, or name the window.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """`text` with U+FFFD for every control character; a tab and a line feed stay."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
