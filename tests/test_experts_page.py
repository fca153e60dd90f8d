"""The page on experts: well-formed, self-contained, nothing left out, nothing of the text taken for markup."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nmt.cli import main
from nmt.experts.contexts import Context
from nmt.experts.information import Purity
from nmt.experts.report import ExpertPair, ExpertRow, LayerReport, NewShare, TokenRole
from nmt.pages.experts import MAX_CARDS, by_specialisation, to_html, to_markdown

EVIL = "<script>alert('x')</script> & \"quoted\" | *bold* [link](http://evil.example) `code`"
VOID = {"meta", "col", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects what is there."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def words(self) -> str:
        return " ".join(text for tag, text in self.texts if tag != "style")

    def values(self, tag: str, name: str) -> list[str]:
        return [value for found, attribute, value in self.attributes if (found, attribute) == (tag, name)]


def role(token: str, predicts: str | None = None, before: str = "left of ", after: str = " right") -> TokenRole:
    contexts = [Context(before, token, after, 0.9, predicts), Context("other ", token, "", 0.8, predicts)]
    return TokenRole(f"▁{token}", 12, 0.75, 3.0, 2.5, contexts)


def layer_of(size: int, name: str = "encoder.2", **changes: object) -> LayerReport:
    shares = [0.0 if expert == 1 else 1 / (size - 1) for expert in range(size)]
    decoder = name.startswith("decoder")
    rows = [
        ExpertRow(
            expert,
            share,
            0.5,
            {"news": 2.0, "talk": 0.5} if share else {"news": 0.0, "talk": 0.0},
            share,
            0.4,
            expert / 10 if share else 0.0,
            [role(f"tok{expert}", "next" if decoder else None)] if share else [],
        )
        for expert, share in enumerate(shares)
    ]
    fields = {
        "layer": name,
        "k": 2.0,
        "num_tokens": 1234,
        "cv_importance": 0.1,
        "cv_load": 0.2,
        "max_over_mean_load": 1.3,
        "idle_experts": 1,
        "experts": rows,
        "gate_entropy": 0.5,
        "token_purity": Purity(2.0, 8.0, 0.25, 5, 0.01, 0.02),
        "domain_purity": Purity(0.01, 1.0, 0.01, 20, 0.02, 0.03),
        "pair_lift": [[4.0 if i != j else 1.0 for j in range(size)] for i in range(size)] if size <= 64 else [],
        "pairs": [ExpertPair(0, 2, 321, 4.0)],
    }
    return LayerReport(**(fields | changes))


LAYERS = [layer_of(5), layer_of(4, "decoder.1")]


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    text = to_html(LAYERS, "demo", "test set")
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object"}
    assert [tag for tag, name, _ in page.attributes if name in ("src", "srcset") or name.startswith("on")] == []
    assert page.values("a", "href") == ["#encoder.2", "#decoder.1"] == [f"#{id}" for id in page.values("section", "id")]
    assert "prefers-color-scheme: dark" in text
    assert page.tags["title"] > 1


def test_every_colour_is_defined_for_light_and_dark() -> None:
    text = to_html(LAYERS, "demo", "test set")
    light, dark = re.findall(r":root \{(.*?)\}", text, flags=re.DOTALL)
    names = [set(re.findall(r"(--\w+):", block)) for block in (light, dark)]
    assert names[0] == names[1]
    used = set(re.findall(r"var\((--\w+)\)", text))
    assert used == names[0]


def test_every_layer_and_expert_is_there() -> None:
    page, markdown = Page(to_html(LAYERS, "demo", "test set")).words(), to_markdown(LAYERS, "demo", "test set")
    for layer in LAYERS:
        assert f"## {layer.layer}\n" in markdown
        assert layer.layer in page
        for row in layer.experts:
            assert f"#### Expert {row.expert} of {layer.layer}\n" in markdown
    assert page.count("Expert 0 ") == page.count("Expert 3 ") == 2
    assert page.count("Expert 4 ") == 1
    for text in (page, markdown):
        for part in ("1,234", "0.10", "0.20", "1.30", "tok3", "×3.0", "12 times", "75%", "25%", "0.90", "CV(load)"):
            assert part in text, part
        assert "Idle, chosen by no token: 1." in text
        assert "no more than chance" in text
        assert "25.0 times chance" in text
        assert text.count("→ next") == 2 * 3
    assert "shuffled 20 times over sentences, at most 3%" in page
    assert "0 + 2" in markdown


def test_what_shuffled_labels_reach_is_no_more_than_chance() -> None:
    for share, says in ((0.02, "no more than chance"), (0.021, "2.1 times chance")):
        markdown = to_markdown([layer_of(3, token_purity=Purity(1.0, 8.0, share, 5, 0.01, 0.02))], "demo", "")
        (line,) = (line for line in markdown.splitlines() if line.startswith("| Token |"))
        assert line.endswith(f"| {says} |")


def test_overloaded_experts_are_named() -> None:
    rows = [ExpertRow(expert, share, 0.5, {}) for expert, share in enumerate([0.7, 0.1, 0.1, 0.1])]
    markdown = to_markdown([layer_of(4, experts=rows, domain_purity=None)], "demo", "")
    assert "Overloaded, more than 2 times the mean load: 0 (×2.8)." in markdown
    assert "Idle, chosen by no token: none." in markdown


def test_text_is_no_markup() -> None:
    rows = [
        ExpertRow(0, 1.0, 0.5, {EVIL: 2.0, "b": 1.0}, 1.0, 0.5, 1.0, [role("<b>", EVIL, EVIL, EVIL)]),
        ExpertRow(1, 0.0, 0.0, {EVIL: 0.0, "b": 0.0}),
    ]
    layers = [layer_of(2, experts=rows, pair_lift=[])]
    text = to_html(layers, f"demo{EVIL}", EVIL)
    page = Page(text)
    assert page.tags["script"] == 0
    assert "alert(" in page.words()
    assert EVIL in page.words()
    assert ("mark", "<b>") in page.texts
    assert page.tags == Page(to_html([layer_of(2, experts=_harmless(rows), pair_lift=[])], "demo", "x")).tags
    markdown = to_markdown(layers, f"demo{EVIL}", EVIL)
    assert "<script" not in markdown.replace(r"\<script", "")
    assert r"\[link\](" in markdown
    assert "<b>\\<b\\></b>" in markdown
    for line in markdown.splitlines():
        if line.startswith("| 0 |"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (4, 9), line


@pytest.mark.parametrize("end", ["\r", "\n", "\x0b", "\x0c", "\x1b", "\x85", "\u2028", "\u2029"])
def test_a_domain_never_ends_a_line_of_markdown(end: str) -> None:
    names = f"news{end}{end}# title", "talk"
    rows = [ExpertRow(0, 1.0, 0.5, {names[0]: 2.0, names[1]: 1.0}), ExpertRow(1, 0.0, 0.0, dict.fromkeys(names, 0.0))]
    markdown = to_markdown([layer_of(2, experts=rows)], f"demo{end}# x", f"set{end}# y")
    assert [line for line in markdown.splitlines() if "title" in line and not line.startswith("|")] == []
    assert not re.search(r"^# (title|x|y)", markdown, re.MULTILINE)
    assert end == "\n" or end not in markdown


def _harmless(rows: list[ExpertRow]) -> list[ExpertRow]:
    plain = [role("tok", "next")]
    first, second = ({"a": 2.0, "b": 1.0}, {"a": 0.0, "b": 0.0})
    return [ExpertRow(0, 1.0, 0.5, first, 1.0, 0.5, 1.0, plain), ExpertRow(1, 0.0, 0.0, second)]


def test_without_domains_their_parts_disappear() -> None:
    for render in (to_html, to_markdown):
        with_domains = render(LAYERS, "demo", "")
        rows = [ExpertRow(expert, 0.25, 0.5, {}) for expert in range(4)]
        without = render([layer_of(4, experts=rows, domain_purity=None)], "demo", "")
        assert "Experts and domains" in with_domains
        assert "Experts and domains" not in without
        assert "Domain" not in without


def test_a_grown_layer_shows_which_domains_its_new_experts_took() -> None:
    rows = [ExpertRow(expert, 0.25, 0.5, {"news": 1.0}, new=expert % 2 > 0) for expert in range(4)]
    new = [NewShare(0.125, {"<news>": 0.5, "talk": 0.0625}), NewShare(0.75, {"talk": 0.8125})]
    layer = layer_of(4, experts=rows, new=NewShare(0.375, {"<news>": 0.25, "talk": 0.4375}), new_of_expert=new)
    page, markdown = Page(to_html([layer], "demo", "")), to_markdown([layer], "demo", "")
    for text in (page.words(), markdown):
        assert "New experts" in text
        assert "Expert 1 (new)" in text
        assert "Expert 2 (new)" not in text
    assert "<news>" in page.words()
    assert "<news>" not in markdown
    lines = [line for line in markdown.split("### New experts")[1].splitlines() if line.startswith("|")]
    assert lines[0].startswith("| earlier expert | all | ")
    assert lines[2:5] == ["| all | 37.5% | 25% | 43.8% |", "| 0 | 12.5% | 50% | 6.25% |", "| 2 | 75% | - | 81.2% |"]
    assert "New experts" not in to_html(LAYERS, "demo", "") + to_markdown(LAYERS, "demo", "")


def test_many_experts_get_cards_only_if_specialised() -> None:
    layer = layer_of(150)
    text = to_html([layer], "big", "")
    page = Page(text)
    assert page.tags["details"] == MAX_CARDS + 1
    ranked = [row.expert for row in by_specialisation(layer)]
    assert ranked[:2] == [149, 148]
    assert ranked[-1] == 1
    found = [int(data.split()[1]) for tag, data in page.texts if tag == "h3" and data.startswith("Expert ")]
    assert found == ranked[:MAX_CARDS]
    # The others are lines of a table, and the bars have become two curves.
    assert f"{150 - MAX_CARDS} less specialised experts" in page.words()
    cells = [data for tag, data in page.texts if tag == "td"]
    assert [expert for expert in ranked if str(expert) in cells] == ranked[MAX_CARDS:]
    assert page.tags["polyline"] == 2
    markdown = to_markdown([layer], "big", "")
    assert all(f"\n| {expert} | " in markdown for expert in ranked)
    assert markdown.count("#### Expert ") == MAX_CARDS


def test_bars_are_as_high_as_the_shares() -> None:
    rows = [ExpertRow(0, 0.6, 0.5, {}, 0.3), ExpertRow(1, 0.4, 0.5, {}, 0.7)]
    page = Page(to_html([layer_of(2, experts=rows, domain_purity=None, pair_lift=[])], "demo", ""))
    heights = [float(value) for value in page.values("rect", "height")]
    assert [height / sum(heights[::2]) for height in heights] == pytest.approx([0.6, 0.3, 0.4, 0.7], abs=0.003)


def test_colours_are_of_log_lift_about_one() -> None:
    lift = [[1.0, 2.0, 0.5], [4.0, 1.0, 100.0], [0.0, 1.0, 1.0]]
    page = Page(to_html([layer_of(3, pair_lift=lift, domain_purity=None)], "demo", ""))
    kinds = [value for value in page.values("rect", "class") if value in ("hot", "cold")]
    strengths = [float(value) for value in page.values("rect", "fill-opacity")]
    # Row by row without the diagonal.
    assert kinds == ["hot", "cold", "hot", "hot", "cold", "cold"]
    assert strengths == [0.45, 0.45, 0.9, 0.9, 0.9, 0.0]


def test_a_token_is_marked_in_its_word() -> None:
    rows = [
        ExpertRow(0, 0.5, 0.5, {}, 0.5, 0.5, 1.0, [role("hof", None, "der Bahn", "es ist da")]),
        ExpertRow(1, 0.5, 0.5, {}, 0.5, 0.5, 0.5, [role(".", None, "am Ende", " ⟨end⟩")]),
    ]
    layers = [layer_of(2, experts=rows, domain_purity=None)]
    assert "Bahn<b>hof</b>es <small>" in to_html(layers, "demo", "")
    assert "Bahn<b>hof</b>es ×3.0" in to_markdown(layers, "demo", "")
    assert "<span class=chip><b>.</b> <small>" in to_html(layers, "demo", "")
    assert "der Bahn<b>hof</b>es ist da" in to_markdown(layers, "demo", "")


def test_the_command_writes_page_text_and_numbers(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["experts", str(run)]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("encoder.1: 4 experts, 2 per token, ")
    assert str(run / "report" / "experts.html") in err
    first = {ending: (run / "report" / f"experts.{ending}").read_text() for ending in ("html", "md", "json")}
    page = Page(first["html"])
    assert page.values("section", "id") == ["encoder.1", "decoder.1"]
    assert "test set, 12 sentence pairs" in page.words()
    assert first["md"].count("#### Expert ") == 8
    layers = json.loads(first["json"])["layers"]
    assert [len(layer["experts"]) for layer in layers] == [4, 4]
    assert layers[0]["token_purity"]["shuffles"] == 5
    assert layers[0]["domain_purity"] is None
    assert main(["experts", str(run)]) == 0
    assert first == {ending: (run / "report" / f"experts.{ending}").read_text() for ending in first}


def test_the_command_looks_at_other_text(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, reference = tmp_path / "my.en", tmp_path / "my.de"
    source.write_text("the dog <script>\nmeadow\n")
    reference.write_text("der Hund\nWiese\n")
    assert main(["experts", str(run), "--source", str(source), "--reference", str(reference)]) == 0
    (page,) = (run / "report").glob("experts-set-my.en-*.html")
    text = page.read_text()
    assert "my.en, 2 sentence pairs" in Page(text).words()
    assert "<script" not in text


def test_a_bar_of_what_an_expert_tells_fills_its_track_at_100_percent() -> None:
    layer = layer_of(4)
    page = to_html([layer], "t", "s")
    shares = [float(width) for width in re.findall(r"width:max\(([\d.]+)%, 1px\)", page)]
    assert round(100 * layer.token_purity.share, 2) in shares


def test_the_bar_beside_an_expert_has_a_scale() -> None:
    """Twice the mean load fills the track, and the page names that share."""
    layer = layer_of(4)
    page = to_html([layer], "t", "s")
    widths = [float(width) for width in re.findall(r"<span class=share [^>]*>.*?width:([\d.]+)%", page)]
    assert widths == pytest.approx([min(100.0, 100 * row.share / 0.5) for row in by_specialisation(layer)], abs=0.1)
    scale = "its full width is 50%, 2 times the mean load"
    assert page.count(scale) == 1 + len(layer.experts)
