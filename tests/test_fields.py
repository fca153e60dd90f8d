"""What a translation keeps as it is: every field is found whole, and plain text has none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmt.text.fields import find_fields

PARTS = [
    "%",
    "s",
    "d",
    "(",
    ")",
    "{",
    "}",
    "[X1X]",
    "<",
    ">",
    "b",
    "/",
    '"',
    "'",
    "=",
    "&",
    ";",
    "#",
    "@",
    ".",
    ":",
    " ",
]
PARTS += ["http://", "www.", "a", "é", "1", "$", "!--", "--", "\n", "\u200d", ",plural", "mailto:"]


@given(text=st.lists(st.sampled_from(PARTS)).map("".join))
def test_fields_are_stretches_of_the_text_in_order(text: str) -> None:
    end = 0
    for field in find_fields(text):
        assert field.text == text[field.start : field.end] != ""
        assert field.start >= end
        end = field.end


@pytest.mark.parametrize(
    ("text", "placeholders"),
    [
        ("%s of %d files, %1$s and %2$d", ["%s", "%d", "%1$s", "%2$d"]),
        (
            "%(name)s has %(count)d, %.2f, %-5d, %05.1f, %lu, %zd",
            ["%(name)s", "%(count)d", "%.2f", "%-5d", "%05.1f", "%lu", "%zd"],
        ),
        ("%name% and %user_id%", ["%name%", "%user_id%"]),
        (
            "Hello {name}, {0} of {} and ${total} or {{ user.name }}",
            ["{name}", "{0}", "{}", "${total}", "{{ user.name }}"],
        ),
        ("{n, plural, one {# file} other {# files}}", ["{n, plural"]),
        ("[X0X] and [X12X]", ["[X0X]", "[X12X]"]),
        ("100 % sure, 5 %, 5%s, 50%d, 5% des cas, 3 % de", []),
        ("{not a name} [X] [0] % s", []),
    ],
)
def test_placeholders(text: str, placeholders: list[str]) -> None:
    assert [field.text for field in find_fields(text) if field.kind == "placeholder"] == placeholders


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("<b>bold</b> and <br/> and <br />", ["<b>", "</b>", "<br/>", "<br />"]),
        ("<a href=\"x.html\" title='a > b'>here</a>", ["<a href=\"x.html\" title='a > b'>", "</a>"]),
        ("Tom &amp; Jerry &#8211; &#x2013;", ["&amp;", "&#8211;", "&#x2013;"]),
        ("<!-- a note -->", ["<!-- a note -->"]),
        ("1 < 2 and 3 > 2, a<b, x <- y, AT&T; R & D;", []),
    ],
)
def test_tags(text: str, tags: list[str]) -> None:
    assert [field.text for field in find_fields(text) if field.kind == "tag"] == tags


@pytest.mark.parametrize(
    ("text", "urls"),
    [
        ("See https://example.org/a?b=c&d=%20#e.", ["https://example.org/a?b=c&d=%20#e"]),
        ("(see www.example.org), or HTTP://X.ORG!", ["www.example.org", "HTTP://X.ORG"]),
        ("https://en.example.org/wiki/A_(b) is one", ["https://en.example.org/wiki/A_(b)"]),
        ("write to first.last+tag@mail.example.org.", ["first.last+tag@mail.example.org"]),
        ("https://example.org/{id}/%s", ["https://example.org/{id}/%s"]),
        ("“https://example.org” «www.example.org»", ["https://example.org", "www.example.org"]),
        ("a.b, 3.14, e.g. this, @name, http, awww.", []),
    ],
)
def test_urls(text: str, urls: list[str]) -> None:
    assert [field.text for field in find_fields(text) if field.kind == "url"] == urls


@pytest.mark.parametrize(
    "part", ["<", "<a ", '<a "', "<!--", "{", "{a", "%", "%(", "a@", "a.", "http://", "&", "[X", "(", "www.("]
)
def test_nothing_takes_long(part: str) -> None:
    """Of a pattern that reads a long row again from each place, this would take minutes."""
    find_fields(part * (60_000 // len(part)))
