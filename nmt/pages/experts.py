"""The report on experts as a self-contained HTML page, light or dark like the reader's system, and as Markdown."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from nmt.config import LayerName
from nmt.experts.information import Purity
from nmt.experts.report import MATRIX_EXPERTS, ExpertRow, LayerReport, TokenRole, preferred
from nmt.pages.charts import HEAT_KEY, bars, heat_map, meter, profiles
from nmt.pages.document import document, text
from nmt.pages.markdown import plain
from nmt.pages.style import CHARTS, EXPERTS, PANELS
from nmt.pages.tables import html_table, markdown_table
from nmt.wording import percent

MAX_CARDS = MATRIX_EXPERTS
"""Most experts of a layer that get a card, the most specialised ones first. Others are rows of a table."""
OVERLOAD = 2.0
"""An expert is overloaded if its load is more than this times the mean load."""
_MAX_NAMED = 40
_MAX_COLUMNS = 20  # for more of them, Markdown has no table of experts and domains or languages

# ------------------------------------------------------------------------------------------------- both forms


def by_specialisation(layer: LayerReport) -> list[ExpertRow]:
    """Return the experts of a layer, the most specialised first and idle ones last."""
    return sorted(layer.experts, key=lambda row: (not row.share, -row.specialisation, row.expert))


def idle_and_overloaded(layer: LayerReport) -> list[str]:
    """Return two sentences that list the idle and the overloaded experts."""
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


def whole_word(role: TokenRole) -> tuple[str, str, str]:
    """Return (start of the word, token, rest of the word) for a token in its first context."""
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
    "figures": "Load is the number of tokens of an expert, importance is the sum of its gate values. CV is the "
    "standard deviation over experts divided by their mean; it is 0 if all are equal. Gate entropy is 0 if one expert "
    "gets all the weight of a token, and ln k if its k experts get equal weight.",
    "bars": "Each expert's share of all choices (load) and of the sum of all gate values (importance). The dashed line "
    "is the share of each if all were equal.",
    "profile": "Share of all choices (load) and of the sum of all gate values (importance), each sorted from the "
    "largest down. The dashed line is the share of each expert if all were equal.",
    "purity": "How much knowing one of its experts reveals about a token, or about the domain or the languages of its "
    "sentence: 0% is nothing, 100% is everything (mutual information divided by entropy). Shuffled labels show what "
    "chance gives.",
    "domains": "How often an expert sees a domain, divided by how often it would see it by chance: 2.0 is twice as "
    "often as by chance, 0.5 is half as often.",
    "languages": "How often an expert sees a source language (from) or a target language (to), divided by how often it "
    "would see it by chance: 2.0 is twice as often as by chance, 0.5 is half as often.",
    "new": "nmt experts --grow made copies of earlier experts. This is the share of the choices of an earlier expert "
    "and its copies that went to the copies. Domains with large shares are those that the new experts took.",
    "pairs": "How often two experts are chosen for the same token, divided by what their loads alone would give.",
    "ranked": "How often two experts are chosen for the same token, divided by what their loads alone would give. "
    "Pairs are ranked by the lower end of the 99% interval of this figure.",
    "roles": "The tokens that choose each expert most clearly, and the occurrences where its gate was largest (the "
    "number before each). ×2 is twice the expert's rate for all tokens. Tokens are ranked by the lower end of the 99% "
    "interval of this figure, so that rare tokens do not rank high by chance. Plain letters complete the word of a "
    "token. The most specialised experts come first: specialisation is by how many bits their tokens differ from all "
    "tokens, minus the same for shuffled tokens. Mean position is 0% for the first token of a sentence and 100% for "
    "the last.",
}
"""Explanation of each part, for the reader."""


def _title(row: ExpertRow) -> str:
    return f"Expert {row.expert} (new)" if row.new else f"Expert {row.expert}"


def _facts(row: ExpertRow) -> list[tuple[str, str]]:
    return [
        ("load", percent(row.share)),
        ("importance", percent(row.importance)),
        ("mean gate", f"{row.mean_gate:.2f}"),
        ("mean position", f"{row.position:.0%}"),
        ("specialisation", f"{row.specialisation:.2f} bits"),
    ]


def _pairs(layer: LayerReport) -> list[list[str]]:
    return [[f"{pair.first} + {pair.second}", f"{pair.count:,}", f"×{pair.lift:.1f}"] for pair in layer.pairs]


def _new_shares(layer: LayerReport, harmless: Callable[[str], str]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table of new experts: all experts, then each earlier one and its copies.

    Of many, those whose copies have the largest share are left. `harmless` escapes text of the corpus.
    """
    assert layer.new is not None
    copies = len(layer.experts) // len(layer.new_of_expert)
    names = list(layer.new.by_domain)[:_MAX_COLUMNS]
    found = sorted(enumerate(layer.new_of_expert), key=lambda each: -each[1].share)[:MAX_CARDS]
    rows = [("all", layer.new), *((str(copies * place), each) for place, each in sorted(found))]
    cells = [
        [
            name,
            percent(each.share),
            *(percent(each.by_domain[domain]) if domain in each.by_domain else "-" for domain in names),
        ]
        for name, each in rows
    ]
    return ["earlier expert", "all", *map(harmless, names)], cells


_Lifts = tuple[list[str], list[list[float]]]


def _lifts(layer: LayerReport) -> tuple[list[str], dict[str, _Lifts]]:
    """Return (experts with cards, names and lifts of their domains and languages, as far as these are known)."""
    rows = sorted(by_specialisation(layer)[:MAX_CARDS], key=lambda row: row.expert)
    known = {
        "domains": [row.domains for row in rows] if layer.domain_purity is not None else [],
        "languages": [row.languages for row in rows] if layer.language_purity else [],
    }
    found = {}
    for kind, lifts in known.items():
        names = list(lifts[0]) if lifts else []
        if names:
            found[kind] = names, [[lift[name] for name in names] for lift in lifts]
    return [str(row.expert) for row in rows], found


def _summary(row: ExpertRow, harmless: Callable[[str], str]) -> list[str]:
    """Return what an expert prefers, and its tokens, as two short texts; `harmless` escapes text of the corpus."""
    domains = ", ".join(f"{harmless(name)} ×{lift:.1f}" for name, lift in preferred(row))
    tokens = ", ".join(f"{_marked(role, harmless)} ×{role.lift:.1f}" for role in row.tokens[:4])
    return [domains or "-", tokens or "-"]


def _preferring(row: ExpertRow) -> str:
    """Return the heading of what experts prefer."""
    return "prefers" if row.languages else "domains"


def _marked(role: TokenRole, harmless: Callable[[str], str]) -> str:
    before, token, after = map(harmless, whole_word(role))
    return f"{before}<b>{token}</b>{after}"


def _side_note(layer: LayerReport) -> str:
    if LayerName.of(layer.layer).side == "encoder":
        return "Tokens are the subwords of the source sentence and its end."
    return (
        "Tokens are the subwords of the translation that the decoder has just read, starting with ⟨start⟩. "
        "The arrow points to the subword that has to come next."
    )


def _beside_chance(purity: Purity) -> str:
    if purity.share <= purity.chance_max_share:
        return "no more than chance"
    return f"{purity.share / purity.chance_share:,.1f} times chance" if purity.chance_share else "chance gives nothing"


def _purities(layer: LayerReport) -> list[tuple[str, str, Purity]]:
    """Return (label, what its labels were shuffled over, figures) of each purity that is known."""
    rows = [("Token", "tokens", layer.token_purity), ("Domain", "sentences", layer.domain_purity)]
    rows += [(kind.capitalize(), "sentences", purity) for kind, purity in layer.language_purity.items()]
    return [(name, over, purity) for name, over, purity in rows if purity is not None]


# ------------------------------------------------------------------------------------------------- HTML


def _purity_bars(layer: LayerReport) -> str:
    parts = []
    for name, over, purity in _purities(layer):
        known = f"{percent(purity.share)} of the information, {_beside_chance(purity)}"
        parts.append(
            f"<div class=purity><b>{name}: {known}</b><em>{purity.bits:.2f} of {purity.label_bits:.2f} bits</em>"
        )
        for kind, share, what in (("", purity.share, "measured"), ("chance", purity.chance_share, "shuffled")):
            # The whole track is 100%. A small share is still visible.
            bar = meter(f"max({share:.2%}, 1px)", kind)
            parts.append(f"<div><span>{what}</span>{bar}<span>{percent(share)}</span></div>")
        most = percent(purity.chance_max_share)
        parts.append(f"<em>shuffled {purity.shuffles} times over {over}, at most {most}</em></div>")
    return "".join(parts)


def to_html(layers: list[LayerReport], title: str, subject: str) -> str:
    """Return the whole page; `subject` names the text that was read."""
    links = "".join(f'<a href="#{text(layer.layer)}">{text(layer.layer)}</a>' for layer in layers)
    body = f"<h1>Experts of {text(title)}</h1><p class=soft>{text(subject)}</p><nav>{links}</nav>\n"
    body += "\n".join(map(_section, layers)) + "\n"
    return document(f"Experts of {title}", body, PANELS, CHARTS, EXPERTS)


def _panel(title: str, how: str, *content: str) -> str:
    return f'<div class="panel"><h3>{title}</h3><p class="how">{text(HOW[how])}</p>{"".join(content)}</div>'


def _section(layer: LayerReport) -> str:
    tiles = "".join(f"<div><b>{value}</b><span>{text(name)}</span></div>" for value, name in _figures(layer))
    ranked, name = by_specialisation(layer), text(layer.layer)
    cards = "".join(_card(row, len(ranked), place == 0) for place, row in enumerate(ranked[:MAX_CARDS]))
    others = [[str(row.expert), *(value for _, value in _facts(row)), *_summary(row, text)] for row in ranked]
    if others[MAX_CARDS:]:
        head = ["expert", *(fact for fact, _ in _facts(ranked[0])), _preferring(ranked[0]), "tokens"]
        cards += (
            f"<details><summary><h3>Others</h3><span>{len(ranked) - MAX_CARDS:,} less specialised experts</span>"
            f"</summary><div class=body>{html_table(head, others[MAX_CARDS:])}</div></details>"
        )
    return (
        f'<section id="{name}"><h2>{name}</h2><p class=soft>{_side_note(layer)}</p><div class=tiles>{tiles}</div>'
        f"<p class=how>{text(HOW['figures'])}</p><div class=panels>{''.join(_panels(layer))}</div>"
        f"<h2 class=sub>What each expert is chosen for</h2><p class=how>{text(HOW['roles'])} {_scale(len(ranked))}</p>"
        f"{cards}</section>"
    )


def _panels(layer: LayerReport) -> Iterator[str]:
    listed = "".join(f"<p class=key>{text(line)}</p>" for line in idle_and_overloaded(layer))
    series = {"load": [row.share for row in layer.experts], "importance": [row.importance for row in layer.experts]}
    label = "Load and importance of each expert"
    if len(layer.experts) <= MAX_CARDS:
        yield _panel("Load", "bars", bars(series, "expert", label), listed)
    else:
        yield _panel("Load", "profile", profiles(series, label), listed)
    if _purities(layer):
        yield _panel("What an expert reveals", "purity", _purity_bars(layer))
    experts, lifts = _lifts(layer)
    part = f" (the {len(experts)} most specialised experts)" if len(experts) < len(layer.experts) else ""
    for kind, (names, lift) in lifts.items():
        picture = heat_map(experts, names, lift, f"Lift of each {kind[:-1]} for each expert")
        yield _panel(f"Experts and {kind}{part}", kind, picture, HEAT_KEY)
    if layer.new is not None:
        yield _panel("New experts", "new", html_table(*_new_shares(layer, text)))
    if layer.pair_lift:
        picture = heat_map(experts, experts, layer.pair_lift, "Lift of each pair of experts")
        yield _panel("Chosen together", "pairs", picture, HEAT_KEY)
    elif layer.pairs:
        yield _panel("Chosen together", "ranked", html_table(["experts", "tokens", "lift"], _pairs(layer)))


def _card(row: ExpertRow, num_experts: int, opened: bool) -> str:
    chips = "".join(
        f"<span class=chip>{_marked(role, text)} <small>×{role.lift:.1f}</small></span>" for role in row.tokens[:6]
    )
    full = OVERLOAD / num_experts
    bar = meter(f"{min(1.0, row.share / full):.1%}")
    domains, _ = _summary(row, text)
    facts = [*_facts(row), *([(_preferring(row), domains)] if domains != "-" else [])]
    told = "".join(f"<span>{name} <b>{value}</b></span>" for name, value in facts)
    columns = "".join(f'<col style="width:{width}">' for width in ("170px", "46px", "auto", "auto", "96px"))
    bodies = "".join(map(_role, row.tokens)) or "<tbody><tr><td colspan=5>No typical tokens.</td></tr></tbody>"
    return (
        f"<details{' open' if opened else ''}><summary><h3>{_title(row)}</h3><span class=chips>{chips or '-'}"
        f'</span><span class=share title="{_scale(num_experts)}">{bar}{percent(row.share)}</span></summary>'
        f"<div class=body><div class=facts>{told}</div><table class=kwic><colgroup>{columns}</colgroup>{bodies}</table>"
        "</div></details>"
    )


def _scale(num_experts: int) -> str:
    """Return the scale of the bars beside the experts."""
    return f"A bar shows load; its full width is {percent(OVERLOAD / num_experts)}, {OVERLOAD:g} times the mean load."


def _role(role: TokenRole) -> str:
    lines = []
    for context in role.contexts:
        predicts = "" if context.predicts is None else f"→ {text(context.predicts)}"
        lines.append(
            f"<td class=n>{context.gate:.2f}</td><td class=left><span>{text(context.before)}</span></td>"
            f"<td class=right><mark>{text(context.token)}</mark>{text(context.after)}</td><td>{predicts}</td>"
        )
    lines = lines or ["<td></td>" * 4]
    lines[0] = (
        f'<td class="word" rowspan="{len(lines)}">{_marked(role, text)}<br><small>×{role.lift:.1f}, '
        f"{role.count:,} times,<br>{role.rate:.0%} of all</small></td>{lines[0]}"
    )
    return f"<tbody class=role>{''.join(f'<tr>{line}</tr>' for line in lines)}</tbody>"


# ------------------------------------------------------------------------------------------------- Markdown


def to_markdown(layers: list[LayerReport], title: str, subject: str) -> str:
    """Return the report as Markdown; `subject` names the text that was read."""
    return f"# Experts of {plain(title)}\n\n{plain(subject)}\n\n" + "\n".join(map(_markdown_section, layers))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"{line}\n" for line in markdown_table(head, rows)) + "\n"


def _markdown_section(layer: LayerReport) -> str:
    figures = [[value for value, _ in _figures(layer)]]
    content = f"## {layer.layer}\n\n{_side_note(layer)}\n\n{_table([name for _, name in _figures(layer)], figures)}"
    content += f"{HOW['figures']}\n\n{' '.join(idle_and_overloaded(layer))}\n\n### What an expert reveals\n\n"
    rows = []
    for name, _, p in _purities(layer):
        shares = map(percent, (p.share, p.chance_share, p.chance_max_share))
        rows.append([name, f"{p.bits:.3f} of {p.label_bits:.2f}", *shares, _beside_chance(p)])
    head = ["label", "bits", "share", "shuffled, mean", "shuffled, max", "measured"]
    content += f"{HOW['purity']}\n\n{_table(head, rows)}"
    experts, lifts = _lifts(layer)
    for kind, (names, lift) in lifts.items():
        if len(names) > _MAX_COLUMNS:
            continue
        rows = [[number, *(f"{each:.1f}" for each in line)] for number, line in zip(experts, lift, strict=True)]
        content += f"### Experts and {kind}\n\n{HOW[kind]}\n\n{_table(['expert', *map(plain, names)], rows)}"
    if layer.new is not None:
        content += f"### New experts\n\n{HOW['new']}\n\n{_table(*_new_shares(layer, plain))}"
    if layer.pairs:
        table = _table(["experts", "tokens", "lift"], _pairs(layer))
        content += f"### Chosen together\n\n{HOW['ranked']}\n\n{table}"
    ranked = by_specialisation(layer)
    rows = [[str(row.expert), *(value for _, value in _facts(row)), *_summary(row, plain)] for row in ranked]
    head = ["expert", *(name for name, _ in _facts(ranked[0])), "domains", "tokens"]
    content += f"### What each expert is chosen for\n\n{HOW['roles']}\n\n{_table(head, rows)}"
    cards = (f"#### {_title(row)} of {layer.layer}\n\n{_bullets(row)}\n" for row in ranked[:MAX_CARDS])
    return content + "".join(cards)


def _bullets(row: ExpertRow) -> str:
    lines = []
    for role in row.tokens:
        lines.append(f"- {_marked(role, plain)} ×{role.lift:.1f}, {role.count:,} times, {role.rate:.0%} of all")
        for context in role.contexts:
            predicts = "" if context.predicts is None else f" → {plain(context.predicts)}"
            shown = f"{plain(context.before)}<b>{plain(context.token)}</b>{plain(context.after)}"
            lines.append(f"  - {context.gate:.2f} {shown}{predicts}")
    return "".join(f"{line}\n" for line in lines) or "No typical tokens.\n"
