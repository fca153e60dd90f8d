"""The frame of an HTML page that needs nothing else: no script, no network."""

import html
import re

from nmt.pages.style import style_sheet

# What XML cannot hold, however it is written.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def document(title: str, body: str, *style: str) -> str:
    """Return the page, from its doctype on. `title` is any text, `body` HTML; `style`: parts of nmt/pages/style.py."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{text(title)}</title><style>{style_sheet(*style)}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


def text(anything: str) -> str:
    """Return any text as text of a page, whatever characters it has."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", anything))
