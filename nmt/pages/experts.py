"""The report on experts as a page: one HTML file that needs nothing else, light or dark as the reader's system is, and
the same in Markdown."""

import re
from collections.abc import Callable, Iterator
from html import escape
from math import ceil, log2

from nmt.config import LayerName
from nmt.experts.information import Purity
from nmt.experts.report import MATRIX_EXPERTS, ExpertRow, LayerReport, TokenRole, preferred_domains
from nmt.pages.markdown import plain

MAX_CARDS = MATRIX_EXPERTS
"""Experts of a layer that are shown one by one; of more, the most specialised, and the others as lines of a table."""
OVERLOAD = 2.0
"""An expert is overloaded with more than this times the mean load."""
_MAX_NAMED = 40
_MAX_COLUMNS = 20  # of domains, in Markdown
_MAX_NAME = 20  # characters of a domain, over a picture
_WIDTH = 520  # of a picture, in its own units
_STRONGEST = 4.0  # the lift whose colour is the fullest

_STYLE = """
:root { --page:#f6f6f4; --card:#fff; --ink:#1c2430; --soft:#5d6878; --line:#e2e4e8; --track:#eceef1;
  --load:#3a6ea5; --importance:#c98a1b; --hot:214 96 40; --cold:58 112 190; --mark:#fde9b5; --chip:#eef2f7 }
@media (prefers-color-scheme: dark) { :root { --page:#12151a; --card:#1a1e25; --ink:#e4e7ec; --soft:#98a3b3;
  --line:#2b313b; --track:#262c35; --load:#6ba3de; --importance:#e0ac4c; --hot:226 118 58; --cold:76 138 222;
  --mark:#5a4512; --chip:#252c37 } }
* { box-sizing:border-box }
body { margin:0; background:var(--page); color:var(--ink); font:15px/1.5 system-ui,-apple-system,"Segoe UI",
  Roboto,"Helvetica Neue",Arial,sans-serif; font-variant-numeric:tabular-nums }
main { max-width:1180px; margin:0 auto; padding:40px 24px 80px }
h1 { font-size:30px; line-height:1.2; margin:0; letter-spacing:-.01em }
h2 { font-size:23px; margin:56px 0 14px; padding-top:18px; border-top:2px solid var(--ink) }
h2.sub { font-size:18px; border:0; margin:18px 0 4px } h3 { font-size:15px; margin:0 } summary h3 { white-space:nowrap }
p { margin:0 0 10px; max-width:78ch } .soft,.how { color:var(--soft) } .how { font-size:13px; margin:4px 0 14px }
nav a { color:inherit; margin-right:16px } code { font-family:ui-monospace,Menlo,Consolas,monospace }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(116px,1fr)); gap:1px; background:var(--line);
  border:1px solid var(--line); border-radius:10px; overflow:hidden; margin-bottom:6px }
.tiles div { background:var(--card); padding:12px 14px } .tiles b { display:block; font-size:20px; font-weight:600 }
.tiles span { color:var(--soft); font-size:12px }
.panels { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr)); gap:16px }
.panel,details { background:var(--card); border:1px solid var(--line); border-radius:10px }
.panel { padding:18px 20px; min-width:0 } svg { display:block; width:100%; height:auto; overflow:visible }
svg text { fill:var(--soft); font-size:12px } svg text.in { fill:var(--ink); text-anchor:middle }
.load { fill:var(--load) } .importance { fill:var(--importance) }
.hot { fill:rgb(var(--hot)) } .cold { fill:rgb(var(--cold)) }
rect.hot,rect.cold { stroke:var(--line) } .fair { stroke:var(--ink); stroke-dasharray:4 3; fill:none }
.axis { stroke:var(--line) } polyline.load,polyline.importance { fill:none; stroke:var(--load); stroke-width:2 }
polyline.importance { stroke:var(--importance) }
.key { font-size:12px; color:var(--soft); margin:10px 0 0 } .key i { display:inline-block; width:10px; height:10px;
  border-radius:2px; margin:0 5px 0 14px } .key i:first-child { margin-left:0 } .key .load { background:var(--load) }
.key .importance { background:var(--importance) } .key .hot { background:rgb(var(--hot)) }
.key .cold { background:rgb(var(--cold)) } .key .fair { height:0; width:18px; border-top:2px dashed var(--ink);
  border-radius:0; vertical-align:4px }
.purity { margin:14px 0 18px } .purity div { display:grid; grid-template-columns:76px 1fr 52px; gap:10px;
  align-items:center; font-size:12px; color:var(--soft); margin:4px 0 } .bar { background:var(--track); height:12px;
  border-radius:3px; display:block } .bar i { display:block; height:100%; border-radius:3px; background:var(--load) }
.bar i.chance { background:var(--soft) } .purity b { font-size:14px; font-weight:600 } .purity em { font-style:normal;
  font-size:12px; color:var(--soft); display:block }
details { margin:8px 0 } summary { cursor:pointer; padding:10px 16px; display:grid; align-items:center; gap:14px;
  grid-template-columns:124px 1fr 200px; list-style:none } summary::-webkit-details-marker { display:none }
summary h3::before { content:"▸"; color:var(--soft); display:inline-block; width:16px } [open]>summary h3::before {
  content:"▾" } summary:hover { background:var(--chip); border-radius:10px }
.chips { display:flex; flex-wrap:wrap; gap:5px } .chip { background:var(--chip); border-radius:5px; padding:1px 7px;
  font-size:13px; white-space:nowrap; max-width:24ch; overflow:hidden; text-overflow:ellipsis }
.chip,td.word,.body td:last-child { color:var(--soft) } .chip b,td b { color:var(--ink);
  font-weight:600 } .share { display:grid; grid-template-columns:1fr 60px; gap:10px; align-items:center;
  font-size:13px; text-align:right }
.body { padding:4px 16px 16px; overflow-x:auto } .facts { display:flex; flex-wrap:wrap; gap:4px 26px; font-size:13px;
  color:var(--soft); margin-bottom:10px } .facts b { color:var(--ink); font-weight:600 }
table { border-collapse:collapse; width:100%; font-size:13px } td,th { padding:2px 8px; vertical-align:baseline;
  text-align:left } th { color:var(--soft); font-weight:400; font-size:12px; border-bottom:1px solid var(--line) }
td.n,th.n { text-align:right } tbody.role { border-bottom:1px solid var(--line) } tbody.role tr:first-child td {
  padding-top:7px } tbody.role tr:last-child td { padding-bottom:7px } td.word { width:170px; line-height:1.35 }
.kwic { table-layout:fixed; min-width:640px } .kwic td:not(.word) { white-space:pre; overflow:hidden }
td.left { color:var(--soft); padding-right:0 } td.left span { display:flex; justify-content:flex-end }
td.right { color:var(--soft); padding-left:0; text-overflow:ellipsis }
mark { background:var(--mark); color:var(--ink); border-radius:3px; padding:1px 2px; font-weight:600 }
@media (max-width:760px) { summary { grid-template-columns:84px 1fr } .share { display:none }
  main { padding:24px 14px } }
"""


# ------------------------------------------------------------------------------------------------- both forms


def by_specialisation(layer: LayerReport) -> list[ExpertRow]:
    """The experts of a layer, those whose tokens differ most from all tokens first, idle ones last."""
    return sorted(layer.experts, key=lambda row: (not row.share, -row.specialisation, row.expert))


def idle_and_overloaded(layer: LayerReport) -> list[str]:
    """One sentence each on the experts that no token chose and on those that too many did."""
    idle = [str(row.expert) for row in layer.experts if not row.share]
    size = len(layer.experts)
    over = [f"{row.expert} (×{row.share * size:.1f})" for row in layer.experts if row.share * size > OVERLOAD]
    return [
        f"Idle, chosen by no token: {_some(idle)}.",
        f"Overloaded, more than {OVERLOAD:g} times the mean load: {_some(over)}.",
    ]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more if names else "none"


def _word(role: TokenRole) -> tuple[str, str, str]:
    """A token with what of its word stands before and after it in its first context."""
    if not role.contexts:
        return "", role.piece.replace("▁", "") or "␣", ""
    first = role.contexts[0]
    if not re.fullmatch(r"\w+", first.token):
        return "", first.token, ""
    return re.findall(r"\w*$", first.before)[0], first.token, re.findall(r"^\w*", first.after)[0]


def _figures(layer: LayerReport) -> list[tuple[str, str]]:
    return [
        (f"{layer.num_tokens:,}", "tokens"),
        (f"{len(layer.experts):,}", "experts"),
        (f"{layer.k:.3g}", "experts per token"),
        (f"{layer.cv_importance:.2f}", "CV(importance)"),
        (f"{layer.cv_load:.2f}", "CV(load)"),
        (f"{layer.max_over_mean_load:.2f}", "max / mean load"),
        (f"{layer.gate_entropy:.2f}", "gate entropy, nats"),
        (f"{layer.idle_experts:,}", "idle experts"),
    ]


HOW = {
    "figures": "Load counts the tokens of an expert, importance sums its gate values; CV, the standard deviation over "
    "experts divided by their mean, is 0 if all share alike. Gate entropy is 0 if one expert gets the whole weight of "
    "a token, and ln k if its k experts get equal weight.",
    "bars": "Each expert's share of all choices (load) and of the sum of all gate values (importance), against the "
    "share that all would have if they shared alike.",
    "profile": "Experts from the busiest down: share of all choices (load) and, sorted on its own, of the sum of all "
    "gate values (importance), against the share that all would have if they shared alike.",
    "purity": "How much one knows of a token, or of the domain of its sentence, by knowing one of its experts: 0% is "
    "nothing, 100% everything (mutual information over entropy). The same with shuffled labels is what chance gives.",
    "domains": "How often an expert sees a domain, over how often it would if it saw all domains as they come: 2.0 is "
    "twice as often as by chance, 0.5 half as often.",
    "pairs": "How often two experts are chosen for the same token, over what their loads alone would give.",
    "ranked": "How often two experts are chosen for the same token, over what their loads alone would give; ranked by "
    "the cautious end of a 99% interval of it.",
    "roles": "Each expert's most telling tokens, with the places where its gate was largest (the number before each). "
    "×2 is twice the expert's rate for all tokens; tokens are ranked by the cautious end of a 99% interval of it, so "
    "that rare ones do not win by chance. Plain letters complete the word of a token. Experts come most specialised "
    "first: by the bits in which their tokens differ from all tokens, less what shuffled tokens give. Mean place is 0% "
    "for the first token of a sentence and 100% for the last.",
}
"""How to read each part."""


def _percent(share: float) -> str:
    return f"{100 * share:.{3 if share >= 0.01 else 2}g}%"


def _facts(row: ExpertRow) -> list[tuple[str, str]]:
    return [
        ("load", _percent(row.share)),
        ("importance", _percent(row.importance)),
        ("mean gate", f"{row.mean_gate:.2f}"),
        ("mean place", f"{row.position:.0%}"),
        ("specialisation", f"{row.specialisation:.2f} bits"),
    ]


def _pairs(layer: LayerReport) -> list[list[str]]:
    return [[f"{pair.first} + {pair.second}", f"{pair.count:,}", f"×{pair.lift:.1f}"] for pair in layer.pairs]


def _domain_lifts(layer: LayerReport) -> tuple[list[str], list[str], list[list[float]]]:
    """(experts, domains, lifts) of those with cards; no domains if these are unknown."""
    rows = sorted(by_specialisation(layer)[:MAX_CARDS], key=lambda row: row.expert)
    names = list(rows[0].domains) if layer.domain_purity is not None else []
    return [str(row.expert) for row in rows], names, [[row.domains[name] for name in names] for row in rows]


def _summary(row: ExpertRow, harmless: Callable[[str], str]) -> list[str]:
    """Domains and tokens of an expert in a few words; `harmless` makes text of the corpus so."""
    domains = ", ".join(f"{harmless(name)} ×{lift:.1f}" for name, lift in preferred_domains(row))
    tokens = ", ".join(f"{_marked(role, harmless)} ×{role.lift:.1f}" for role in row.tokens[:4])
    return [domains or "-", tokens or "-"]


def _marked(role: TokenRole, harmless: Callable[[str], str]) -> str:
    before, token, after = map(harmless, _word(role))
    return f"{before}<b>{token}</b>{after}"


def _side_note(layer: LayerReport) -> str:
    if LayerName.of(layer.layer).side == "encoder":
        return "Tokens are the pieces of the source sentence and its end."
    return (
        "Tokens are the pieces of the translation that the decoder has just read, beginning with ⟨start⟩; "
        "the arrow shows the piece that has to come next."
    )


def _beside_chance(purity: Purity) -> str:
    if purity.share <= purity.chance_max_share:
        return "no more than chance"
    return f"{purity.share / purity.chance_share:,.1f} times chance" if purity.chance_share else "chance gives nothing"


def _purities(layer: LayerReport) -> list[tuple[str, str, Purity]]:
    """(what, over what labels were shuffled, figures)."""
    rows = [("Token", "tokens", layer.token_purity), ("Domain", "sentences", layer.domain_purity)]
    return [(name, over, purity) for name, over, purity in rows if purity is not None]


# ------------------------------------------------------------------------------------------------- pictures


def _bars(layer: LayerReport) -> str:
    """Load and importance of each expert, or their sorted profiles if there are many."""
    rows, height, left = layer.experts, 200, 40
    top = max(max(row.share, row.importance) for row in rows) * 1.08 or 1.0
    fair = 1 / len(rows)

    def y(share: float) -> float:
        return height - share / top * (height - 12)

    step = (_WIDTH - left) / len(rows)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height + 22}" role="img" aria-label="Load and importance of each expert">']
    levels = [0.0, top / 1.08] + ([fair] if 0.1 < fair / top < 0.8 else [])
    parts += [f'<text x="0" y="{y(level) + 4:.1f}">{_percent(level)}</text>' for level in levels]
    if len(rows) <= MAX_CARDS:
        wide = min(step * 0.36, 22)
        for row in rows:
            middle = left + (row.expert + 0.5) * step
            for x, share, kind in ((middle - wide, row.share, "load"), (middle, row.importance, "importance")):
                size = f'x="{x:.1f}" y="{y(share):.1f}" width="{wide * 0.94:.1f}" height="{height - y(share):.1f}"'
                tip = f"<title>expert {row.expert}: {kind} {_percent(share)}</title>"
                parts.append(f'<rect class="{kind}" {size}>{tip}</rect>')
            if row.expert % ceil(22 / step) == 0:
                parts.append(f'<text x="{middle:.1f}" y="{height + 16}" text-anchor="middle">{row.expert}</text>')
    else:
        for kind, name in (("load", "share"), ("importance", "importance")):
            shares = sorted((getattr(row, name) for row in rows), reverse=True)
            points = " ".join(f"{left + (i + 0.5) * step:.1f},{y(share):.1f}" for i, share in enumerate(shares))
            parts.append(f'<polyline class="{kind}" points="{points}"/>')
        parts.append(f'<text x="{left}" y="{height + 16}">busiest</text>')
        parts.append(f'<text x="{_WIDTH}" y="{height + 16}" text-anchor="end">rank {len(rows):,}</text>')
    for kind, level in (("axis", 0.0), ("fair", fair)):
        parts.append(f'<path class="{kind}" d="M{left} {y(level):.1f}H{_WIDTH}"/>')
    key = '<p class="key"><i class="load"></i>load<i class="importance"></i>importance<i class="fair"></i>fair share'
    return "".join(parts) + f"</svg>{key} {_percent(fair)}</p>"


def _heat_map(rows: list[str], columns: list[str], lift: list[list[float]], label: str) -> str:
    """Cells coloured by log lift: orange above chance, blue below. A map of the same names has no diagonal."""
    left, longest = 8 + 7 * max(map(len, rows)), min(_MAX_NAME, max(map(len, columns)))
    slanted = rows != columns and 6.8 * longest > (_WIDTH - left) / len(columns)
    wide = min((_WIDTH - left - 4 * slanted * longest) / len(columns), 62)
    high = min(wide, 26, max(10, 560 / len(rows)))
    top = 10 + 4.8 * longest if slanted else 18
    parts = [f'<svg viewBox="0 0 {_WIDTH} {top + high * len(rows):.0f}" role="img" aria-label="{escape(label)}">']
    for i, name in enumerate(columns):
        x, y = left + (i + 0.5) * wide, top - 6
        turn = f'transform="rotate(-40 {x:.1f} {y:.1f})"' if slanted else 'text-anchor="middle"'
        if i % ceil(18 / wide) == 0:
            parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {turn}>{escape(name[:_MAX_NAME])}</text>')
    for j, name in enumerate(rows):
        y = top + j * high
        if j % ceil(11 / high) == 0:
            parts.append(f'<text x="{left - 6}" y="{y + high / 2 + 4:.1f}" text-anchor="end">{name}</text>')
        for i, column in enumerate(columns):
            if rows == columns and i == j:
                continue
            strength = max(-1.0, min(1.0, log2(max(lift[j][i], 1e-9)) / log2(_STRONGEST)))
            x, kind = left + i * wide, "hot" if strength > 0 else "cold"
            size = f'x="{x:.1f}" y="{y:.1f}" width="{wide - 1:.1f}" height="{high - 1:.1f}"'
            parts.append(
                f'<rect class="{kind}" fill-opacity="{abs(strength) * 0.9:.2f}" {size}>'
                f"<title>{name}, {escape(column)}: {lift[j][i]:.2f} times chance</title></rect>"
            )
            if wide >= 26 and high >= 14:
                middle = f'x="{x + wide / 2:.1f}" y="{y + high / 2 + 4:.1f}"'
                parts.append(f'<text class="in" {middle}>{lift[j][i]:.1f}</text>')
    return "".join(parts) + "</svg>"


def _purity_bars(layer: LayerReport) -> str:
    parts = []
    for name, over, purity in _purities(layer):
        known = f"{_percent(purity.share)} of what there is to know, {_beside_chance(purity)}"
        parts.append(
            f"<div class=purity><b>{name}: {known}</b><em>{purity.bits:.2f} of {purity.label_bits:.2f} bits</em>"
        )
        for kind, share, what in (("", purity.share, "measured"), ("chance", purity.chance_share, "shuffled")):
            # Its whole track is 100%, all there is to know; what is little is to be seen still.
            bar = f'<i class="{kind}" style="width:max({share:.2%}, 1px)"></i>'
            parts.append(f"<div><span>{what}</span><span class=bar>{bar}</span><span>{_percent(share)}</span></div>")
        most = _percent(purity.chance_max_share)
        parts.append(f"<em>shuffled {purity.shuffles} times over {over}, at most {most}</em></div>")
    return "".join(parts)


# ------------------------------------------------------------------------------------------------- HTML


def to_html(layers: list[LayerReport], title: str, subject: str) -> str:
    """The whole page; `subject` says what text was looked at."""
    links = "".join(f'<a href="#{escape(layer.layer)}">{escape(layer.layer)}</a>' for layer in layers)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>Experts of {escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>'
        f"<h1>Experts of {escape(title)}</h1><p class=soft>{escape(subject)}</p><nav>{links}</nav>\n"
        + "\n".join(map(_section, layers))
        + "\n</main></body></html>\n"
    )


def _panel(title: str, how: str, *content: str) -> str:
    return f'<div class="panel"><h3>{title}</h3><p class="how">{escape(HOW[how])}</p>{"".join(content)}</div>'


def _section(layer: LayerReport) -> str:
    tiles = "".join(f"<div><b>{value}</b><span>{escape(name)}</span></div>" for value, name in _figures(layer))
    ranked, name = by_specialisation(layer), escape(layer.layer)
    cards = "".join(_card(row, len(ranked), place == 0) for place, row in enumerate(ranked[:MAX_CARDS]))
    others = [[str(row.expert), *(value for _, value in _facts(row)), *_summary(row, escape)] for row in ranked]
    if others[MAX_CARDS:]:
        head = ["expert", *(fact for fact, _ in _facts(ranked[0])), "domains", "tokens"]
        cards += (
            f"<details><summary><h3>Others</h3><span>{len(ranked) - MAX_CARDS:,} less specialised experts</span>"
            f"</summary><div class=body>{_html_table(head, others[MAX_CARDS:])}</div></details>"
        )
    return (
        f'<section id="{name}"><h2>{name}</h2><p class=soft>{_side_note(layer)}</p><div class=tiles>{tiles}</div>'
        f"<p class=how>{escape(HOW['figures'])}</p><div class=panels>{''.join(_panels(layer))}</div>"
        f"<h2 class=sub>What each expert is chosen for</h2><p class=how>{escape(HOW['roles'])}</p>{cards}</section>"
    )


def _panels(layer: LayerReport) -> Iterator[str]:
    listed = "".join(f"<p class=key>{escape(line)}</p>" for line in idle_and_overloaded(layer))
    yield _panel("Load", "bars" if len(layer.experts) <= MAX_CARDS else "profile", _bars(layer), listed)
    if _purities(layer):
        yield _panel("What an expert tells", "purity", _purity_bars(layer))
    key = '<p class="key"><i class="cold"></i>rarer than chance<i class="hot"></i>more often; full colour: 4 times</p>'
    experts, names, lift = _domain_lifts(layer)
    if names:
        part = f" (the {len(experts)} most specialised experts)" if len(experts) < len(layer.experts) else ""
        picture = _heat_map(experts, names, lift, "Lift of each domain for each expert")
        yield _panel(f"Experts and domains{part}", "domains", picture, key)
    if layer.pair_lift:
        picture = _heat_map(experts, experts, layer.pair_lift, "Lift of each pair of experts")
        yield _panel("Chosen together", "pairs", picture, key)
    elif layer.pairs:
        yield _panel("Chosen together", "ranked", _html_table(["experts", "tokens", "lift"], _pairs(layer)))


def _html_table(head: list[str], rows: list[list[str]]) -> str:
    right = [bool(re.match(r"×?[\d.,-]+\S*( bits)?$", cell)) for cell in rows[0]]
    lines = []
    for tag, cells in [("th", head), *(("td", row) for row in rows)]:
        pairs = zip(cells, right, strict=True)
        lines.append("".join(f"<{tag}{' class=n' if number else ''}>{cell}</{tag}>" for cell, number in pairs))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _card(row: ExpertRow, num_experts: int, opened: bool) -> str:
    chips = "".join(
        f"<span class=chip>{_marked(role, escape)} <small>×{role.lift:.1f}</small></span>" for role in row.tokens[:6]
    )
    bar = f'<span class=bar><i style="width:{min(1.0, row.share * num_experts / OVERLOAD):.1%}"></i></span>'
    domains, _ = _summary(row, escape)
    facts = [*_facts(row), *([("domains", domains)] if domains != "-" else [])]
    told = "".join(f"<span>{name} <b>{value}</b></span>" for name, value in facts)
    columns = "".join(f'<col style="width:{width}">' for width in ("170px", "46px", "auto", "auto", "96px"))
    bodies = "".join(map(_role, row.tokens)) or "<tbody><tr><td colspan=5>No token stands out.</td></tr></tbody>"
    return (
        f"<details{' open' if opened else ''}><summary><h3>Expert {row.expert}</h3><span class=chips>{chips or '-'}"
        f"</span><span class=share>{bar}{_percent(row.share)}</span></summary>"
        f"<div class=body><div class=facts>{told}</div><table class=kwic><colgroup>{columns}</colgroup>{bodies}</table>"
        "</div></details>"
    )


def _role(role: TokenRole) -> str:
    lines = []
    for context in role.contexts:
        predicts = "" if context.predicts is None else f"→ {escape(context.predicts)}"
        lines.append(
            f"<td class=n>{context.gate:.2f}</td><td class=left><span>{escape(context.before)}</span></td>"
            f"<td class=right><mark>{escape(context.token)}</mark>{escape(context.after)}</td><td>{predicts}</td>"
        )
    lines = lines or ["<td></td>" * 4]
    lines[0] = (
        f'<td class="word" rowspan="{len(lines)}">{_marked(role, escape)}<br><small>×{role.lift:.1f}, '
        f"{role.count:,} times,<br>{role.rate:.0%} of its places</small></td>{lines[0]}"
    )
    return f"<tbody class=role>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody>"


# ------------------------------------------------------------------------------------------------- Markdown


def to_markdown(layers: list[LayerReport], title: str, subject: str) -> str:
    """The same as text."""
    return f"# Experts of {plain(title)}\n\n{plain(subject)}\n\n" + "\n".join(map(_markdown_section, layers))


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def _markdown_section(layer: LayerReport) -> str:
    figures = [[value for value, _ in _figures(layer)]]
    text = f"## {layer.layer}\n\n{_side_note(layer)}\n\n{_table([name for _, name in _figures(layer)], figures)}"
    text += f"{HOW['figures']}\n\n{' '.join(idle_and_overloaded(layer))}\n\n### What an expert tells\n\n"
    rows = []
    for name, _, p in _purities(layer):
        shares = map(_percent, (p.share, p.chance_share, p.chance_max_share))
        rows.append([name, f"{p.bits:.3f} of {p.label_bits:.2f}", *shares, _beside_chance(p)])
    head = ["label", "bits", "share", "shuffled, mean", "shuffled, max", "measured"]
    text += f"{HOW['purity']}\n\n{_table(head, rows)}"
    experts, names, lift = _domain_lifts(layer)
    if names and len(names) <= _MAX_COLUMNS:
        rows = [[number, *(f"{each:.1f}" for each in line)] for number, line in zip(experts, lift, strict=True)]
        text += f"### Experts and domains\n\n{HOW['domains']}\n\n{_table(['expert', *map(plain, names)], rows)}"
    if layer.pairs:
        table = _table(["experts", "tokens", "lift"], _pairs(layer))
        text += f"### Chosen together\n\n{HOW['ranked']}\n\n{table}"
    ranked = by_specialisation(layer)
    rows = [[str(row.expert), *(value for _, value in _facts(row)), *_summary(row, plain)] for row in ranked]
    head = ["expert", *(name for name, _ in _facts(ranked[0])), "domains", "tokens"]
    text += f"### What each expert is chosen for\n\n{HOW['roles']}\n\n{_table(head, rows)}"
    cards = (f"#### Expert {row.expert} of {layer.layer}\n\n{_bullets(row)}\n" for row in ranked[:MAX_CARDS])
    return text + "".join(cards)


def _bullets(row: ExpertRow) -> str:
    lines = []
    for role in row.tokens:
        lines.append(f"- {_marked(role, plain)} ×{role.lift:.1f}, {role.count:,} times, {role.rate:.0%} of its places")
        for context in role.contexts:
            predicts = "" if context.predicts is None else f" → {plain(context.predicts)}"
            shown = f"{plain(context.before)}<b>{plain(context.token)}</b>{plain(context.after)}"
            lines.append(f"  - {context.gate:.2f} {shown}{predicts}")
    return "".join(f"{line}\n" for line in lines) or "No token stands out.\n"
