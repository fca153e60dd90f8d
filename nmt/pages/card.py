"""The model card of an exported model: what its users must know, as Markdown, from the records of its run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmt.config import Config, Direction, LayerName, ModelConfig
from nmt.cost.operations import Cost, model_cost
from nmt.decoding.directions import Directions
from nmt.pages.markdown import code, plain, wrapped
from nmt.pages.tables import markdown_table
from nmt.run import STARTED_FROM
from nmt.wording import counted, steps_of

_BOTTOM = {
    "forward": "",
    "bidirectional_half": ", the first in both directions, each half as wide",
    "bidirectional_full": ", the first in both directions",
}
_NORMS = {
    "none": "none",
    "moe": "layer norm before MoE layers",
    "layers": "layer norm before MoE layers and LSTMs above the first",
}
_FILTERS = {
    "blank": "one side blank",
    "identical": "both sides the same",
    "duplicates": "seen before",
    "max_words": "too many words",
    "max_length_ratio": "one side too long for the other",
    "max_pieces": "too many subwords",
}


@dataclass(frozen=True)
class SetScores:
    """Scores of one of the run's own sets, as `nmt evaluate` wrote them to RUN/report/SET.json."""

    name: str
    sentences: int
    steps: list[int]
    """Training steps whose parameters, or the mean of them, were scored."""
    scores: dict[str, dict[str, Any]]
    """Value and signature by name: {"BLEU": {"value": .., "signature": ..}}."""
    perplexity: float
    """Perplexity per subword."""
    decoding: dict[str, Any]


@dataclass(frozen=True)
class CardFacts:
    """Contents of a card."""

    config: Config
    corpus: dict[str, Any]
    """Contents of corpus.json."""
    vocabulary: str
    """sha256 of subwords.model."""
    validations: dict[int, float | None]
    """Validation scores (lower is better) of the training steps whose parameters, or the mean of them, are exported."""
    sets: list[SetScores]
    """Scores of the run's own sets, also those of other parameters."""
    parameter_bytes: int
    """Size of model.safetensors."""
    bf16: bool = False
    """True if it has in bf16 what a translation in bf16 has in bf16."""

    @property
    def directions(self) -> tuple[Direction, ...]:
        """The directions that the model was trained on."""
        return Directions.of(self.config, self.corpus, self.config.run.name, "corpus.json").trained


def model_card(facts: CardFacts) -> str:
    """Return the card as Markdown."""
    cost = model_cost(facts.config.model, facts.corpus["vocabulary_size"])
    sections = {
        "Use": _use(facts),
        "Network": _network(facts.config.model),
        "Training data": _data(facts),
        "Scores": _scores(facts),
        "Cost": _cost(cost, facts),
        "Limits": _limits(facts),
    }
    lines = list(_head(facts, cost))
    for title, content in sections.items():
        lines += ["", f"## {title}", "", *content]
    return "".join(f"{wrapped(line)}\n" for line in lines)


def own_sets(facts: CardFacts) -> list[SetScores]:
    """Return the scores of the exported parameters, not of other steps of the run."""
    return [each for each in facts.sets if sorted(each.steps) == sorted(facts.validations)]


def _head(facts: CardFacts, cost: Cost) -> Iterator[str]:
    config = facts.config
    experts = ", and sparsely-gated mixtures of experts between its layers" if config.model.moe_layer_names() else ""
    yield f"# {plain(config.run.name)}: translates {_directions(facts.directions)}"
    yield ""
    yield (
        f"A stacked-LSTM encoder-decoder with attention{experts} (Shazeer et al. 2017, *Outrageously Large Neural "
        f"Networks*; GNMT), with {cost.num_parameters / 1e6:,.1f} million parameters, for the program `nmt`. It was "
        f"trained on {facts.corpus['pairs_kept']:,} sentence pairs of {code(facts.corpus['name'])}."
    )
    yield ""
    yield f"Its parameters are {_origin(facts)}."


def _directions(directions: Sequence[Direction]) -> str:
    """Return what the model translates: "en to de", or "de, en and fr in 6 directions"."""
    if len(directions) == 1:
        return " to ".join(map(plain, directions[0]))
    *others, last = sorted({plain(language) for direction in directions for language in direction})
    return f"{', '.join(others)} and {last} in {counted(len(directions), 'direction')}"


def _origin(facts: CardFacts) -> str:
    steps = sorted(facts.validations)
    run, planned = code(facts.config.run.name), facts.config.training.max_steps
    if len(steps) > 1:
        listed = ", ".join(f"{step:,}" for step in steps)
        return f"the mean of those after steps {listed} of run {run}, which was configured for {planned:,} steps"
    return f"those after step {steps[0]:,} of run {run}, which was configured for {planned:,} steps"


def _use(facts: CardFacts) -> Iterator[str]:
    config, decoding = facts.config, facts.config.decoding
    active = f", and activates {counted(decoding.experts_per_token, 'expert')} per token"
    directions = facts.directions
    source, target = map(plain, directions[0])
    choice = f" --from {source} --to {target}" if len(directions) > 1 else ""
    yield f"    nmt translate DIR input -o output{choice}"
    yield f"    nmt evaluate DIR --source F --reference F{choice}"
    if config.model.moe_layer_names():
        yield f"    nmt experts DIR --explain 'A sentence.'{choice}"
    yield "    nmt cost DIR"
    yield ""
    yield (
        "DIR is this folder. Line n of the output translates line n of the input. By default (settings `decoding.*`), "
        f"the search keeps {decoding.beam_size} hypotheses, with alpha {decoding.alpha} and beta {decoding.beta}"
        + (active if decoding.experts_per_token else "")
        + "."
    )
    yield ""
    yield (
        "No file here is pickled or executed. `model.safetensors` has every parameter once, in "
        f"{'bf16 or, where precision counts, float32' if facts.bf16 else 'float32'}. "
        "`manifest.json` has the size and sha256 of all other files except this card; `nmt` rejects a file that "
        "differs. You may change this card: add a licence, or anything else that users of the model must know."
    )


# --------------------------------------------------------------------------------------------------- network and data


def _bottom(model: ModelConfig) -> str:
    if model.bidirectional_layers == 1:
        return _BOTTOM[model.bottom_layer]
    return f", the first {model.bidirectional_layers} in both directions, each half as wide"


def _network(model: ModelConfig) -> Iterator[str]:
    moe, attention = model.moe, model.attention
    rows = {
        "encoder": f"{model.num_encoder_layers} LSTMs{_bottom(model)}",
        "decoder": f"{model.num_decoder_layers} LSTMs",
        "LSTM cells, width": f"{model.cell_size:,}, {model.hidden_size:,}",
        "attention": f"{attention.function}, size {attention.size:,}, {counted(attention.heads, 'head')}, "
        f"wiring {attention.wiring}",
        "norms": _NORMS[model.norm],
        "embeddings": "one matrix for both languages and the softmax"
        if model.tie_embeddings
        else "one matrix per language",
        "experts": "none",
    }
    if model.moe_layer_names():
        places = [f"{moe.experts_at(layer):,} after {_place(layer)}" for layer in model.moe_layer_names()]
        hidden = " and ".join(f"{size:,}" for size in moe.hidden_sizes)
        rows["experts"] = f"{'; '.join(places)}; each with {hidden} hidden units"
        rows["experts per token"] = f"{moe.experts_per_token} in each of these layers"
        rows["gating"] = moe.describe_gate()
    yield from markdown_table(("", ""), rows.items())


def _place(layer: str) -> str:
    name = LayerName.of(layer)
    return f"{name.side} LSTM {name.place}"


def _data(facts: CardFacts) -> Iterator[str]:
    corpus, info = facts.config.corpus, facts.corpus
    subwords = corpus.subwords
    dropped = {name: count for name, count in info["dropped"].items() if count}
    reasons = ", ".join(f"{_FILTERS.get(name) or plain(name)} {count:,}" for name, count in dropped.items())
    # The remaining pairs became the dev and test sets (corpus.dev.from_train).
    held_out = info["pairs_read"] - info["pairs_kept"] - sum(dropped.values())
    directions = facts.directions
    several = len(directions) > 1
    source, target = ("sources", "targets") if several else map(plain, directions[0])
    rows = {
        "directions": ", ".join(plain(str(direction)) for direction in directions) if several else "",
        "tags": ", ".join(map(plain, info.get("tags", []))),
        "corpus": code(info["name"]),
        "source": _source(facts.config),
        "mixed with": ", ".join(
            f"{code(Path(name).name)} (weight {weight:g})" for name, weight in corpus.mixture.items()
        ),
        "pairs": f"{info['pairs_read']:,} read, {info['pairs_kept']:,} kept, "
        + (f"{held_out:,} held out, " if held_out > 0 else "")
        + f"{sum(dropped.values()):,} dropped"
        + (f" ({reasons})" if reasons else ""),
        **_start(info),
        "text": f"{info['source_pieces']:,} subwords of {source}, {info['target_pieces']:,} of {target}",
        "fingerprint": code(info["fingerprint"]),
        "vocabulary": f"{info['vocabulary_size']:,} subwords for {'all' if several else 'both'} languages "
        f"(SentencePiece {'BPE' if subwords.kind == 'bpe' else subwords.kind}, {subwords.normalisation})",
        "its sha256": code(facts.vocabulary),
    }
    yield from markdown_table(("", ""), ((name, row) for name, row in rows.items() if row))
    yield ""
    yield "`corpus.json` and `config.yaml` have all details. This folder has none of the text."


def _start(info: dict[str, Any]) -> dict[str, str]:
    """Return the row about the model whose parameters training started with, if it did."""
    if STARTED_FROM not in info:
        return {}
    start = info[STARTED_FROM]
    named = f"{code(start['name'])}, {steps_of(start['steps'])} (checkpoint {code(start['fingerprint'])})"
    return {"started from": f"the parameters of {named}, trained on text that is not counted here"}


def _source(config: Config) -> str:
    corpus = config.corpus
    if corpus.source == "phrasebook":
        return "the phrasebook of `nmt`: sentences generated by rules from hand-written frames"
    if corpus.source != "files":
        subset = f", {code(corpus.subset)}" if corpus.subset else ""
        return f"{code(corpus.source)}{subset} (a data set of the Hugging Face hub, or a folder laid out like one)"
    sides = [(corpus.source_language, corpus.train.source), (corpus.target_language, corpus.train.target)]
    sides += corpus.train.texts.items()
    named = [*((plain(language), names) for language, names in sides), ("both", corpus.train.pairs)]
    return "files: " + "; ".join(f"{side} {_files(names)}" for side, names in named if names)


def _files(names: list[str]) -> str:
    return ", ".join(code(Path(name).name) for name in names)


# ---------------------------------------------------------------------------------------------------- scores and cost


def _scores(facts: CardFacts) -> Iterator[str]:
    yield _validation(facts)
    yield ""
    own = own_sets(facts)
    if own:
        # Only some sets may have been scored with --ter.
        names = list(dict.fromkeys(name for each in own for name in each.scores))
        head = "set", "sentences", *map(plain, names), "perplexity", "search"
        yield from markdown_table(head, (_set_row(each, names) for each in own))
        yield ""
        for name in names:
            signatures = sorted({each.scores[name]["signature"] for each in own if name in each.scores})
            source = "the formula of Moses' multi-bleu.perl," if name == "multi-bleu" else "sacreBLEU"
            yield f"- {plain(name)}: {source} {', '.join(map(code, signatures))}"
        yield "- perplexity: per subword of the references"
    else:
        yield (
            "There are no BLEU or chrF scores: `nmt evaluate` had not been run on these parameters when they were "
            "exported."
        )
    others = [each for each in facts.sets if each not in own]
    if others:
        listed = ", ".join(f"{code(each.name)} ({steps_of(sorted(each.steps))})" for each in others)
        yield ""
        yield f"Not shown, because they belong to other parameters: the scores of {listed}."


def _set_row(each: SetScores, names: Sequence[str]) -> tuple[str, ...]:
    decoding = each.decoding
    search = f"beam {decoding['beam_size']}, alpha {decoding['alpha']}, beta {decoding['beta']}"
    if decoding["experts_per_token"]:
        search += f", {counted(decoding['experts_per_token'], 'expert')} per token"
    values = (f"{each.scores[name]['score']:.2f}" if name in each.scores else "-" for name in names)
    return code(each.name), f"{each.sentences:,}", *values, f"{each.perplexity:.3f}", search


def _validation(facts: CardFacts) -> str:
    by_bleu = facts.config.training.best_by == "bleu"

    def figure(score: float) -> str:
        return f"greedy BLEU {-score:.2f}" if by_bleu else f"perplexity {score:.3f} per subword"

    found = [f"{figure(score)} at step {step:,}" for step, score in facts.validations.items() if score is not None]
    if not found:
        return "Development set: not validated during training."
    if len(facts.validations) > 1:
        return f"Development set, during training: {'; '.join(found)}. Their mean was not validated."
    return f"Development set, during training: {found[0]}."


def _cost(cost: Cost, facts: CardFacts) -> Iterator[str]:
    ops = cost.ops
    rows = [(part, _count(held), _count(ops.get(part, 0))) for part, held in cost.parameters.items()]
    rows.append(("**all**", f"**{_count(cost.num_parameters)}**", f"**{_count(cost.ops_per_timestep)}**"))
    yield from markdown_table(("part", "parameters", "ops/timestep"), rows)
    yield ""
    shared = " The softmax uses the matrix of the embeddings." if facts.config.model.tie_embeddings else ""
    yield (
        f"ops/timestep: multiply-adds for one source and one target position (section 5.1 of the paper).{shared} "
        f"`model.safetensors` has {facts.parameter_bytes:,} bytes."
    )


def _limits(facts: CardFacts) -> Iterator[str]:
    corpus, decoding = facts.config.corpus, facts.config.decoding
    if corpus.source == "phrasebook":
        yield (
            "- The phrasebook is a teaching corpus: a few domains, sentences generated by rules. Scores on it show "
            "that the program works, not how well it translates. Translations of any other text are wrong."
        )
    else:
        yield (
            f"- The model learned from {code(facts.corpus['name'])}, including its errors and its bias. Text unlike "
            "that corpus and the test sets above is translated worse; how much worse has not been measured."
        )
    yield (
        f"- The model translates only {_directions(facts.directions)}, sentence by sentence, without context from "
        "other sentences. Fluent output may still be wrong: check names, numbers and negations where they matter."
    )
    if corpus.filters.max_pieces:
        yield f"- Sentences of more than {corpus.filters.max_pieces} subwords were not in the training data."
    yield (
        f"- Lines of more than {decoding.max_source_pieces} subwords, or longer than any line of the training data, "
        "are translated in parts. Characters that are not in the vocabulary were never seen in training: `nmt "
        "translate` lists those that it finds."
    )
    yield "- This card states no licence. The licence of the training data may apply to the model."


def _count(count: int) -> str:
    return f"{count:,}" if count else "-"
