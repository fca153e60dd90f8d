"""The frame of a self-contained HTML page: no script, no network."""

import html
import re

from nmt.pages.style import style_sheet

# Characters that XML does not allow, even escaped.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def document(title: str, body: str, *style: str) -> str:
    """Return the whole page. `title` is any text, `body` is HTML, `style` has parts of nmt/pages/style.py."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{text(title)}</title><style>{style_sheet(*style)}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


def text(anything: str) -> str:
    """Return any text escaped for HTML, with characters that XML does not allow replaced by U+FFFD."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", anything))
