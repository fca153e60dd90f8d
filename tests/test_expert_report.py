"""What is measured of experts is what plain loops count, and chance is told from preference."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import permutations
from math import log, log2

import numpy as np
import pytest
import torch

from nmt.batch import Batch
from nmt.config import Direction
from nmt.data.held_out import eval_batches
from nmt.experts.information import Z, expected_pairs, information, least_rate, rank_in_runs
from nmt.experts.report import (
    MIN_COUNT,
    ExpertRow,
    LayerReport,
    NewShare,
    expert_report,
    preferred,
)
from nmt.model.gating import GateOutput, GateSums
from nmt.tokens import BOS, EOS

Rule = Callable[[str, int, int, int], dict[int, float]]
"""(layer, piece, sentence, position) -> gate values by expert."""


class Words:
    """Subwords of a toy: words are pieces, and "+" cuts a word into several."""

    def __init__(self, *texts: str) -> None:
        found = dict.fromkeys(piece for text in texts for piece in self._cut(text))
        self.names = ["<pad>", "<unk>", "<s>", "</s>", *found]
        self.size = len(self.names)

    def _cut(self, text: str) -> list[str]:
        return [("" if place else "▁") + part for word in text.split() for place, part in enumerate(word.split("+"))]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array([self.names.index(piece) for piece in self._cut(text)], dtype=np.int32) for text in texts]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self.names[piece] for piece in ids]


class Router:
    """The gates of a model, given by a rule."""

    device = torch.device("cpu")

    def __init__(self, rule: Rule, **sizes: int) -> None:
        self.rule, self.sizes = rule, {name.replace("_", "."): size for name, size in sizes.items()}

    def gates(self, batch: Batch, experts_per_token: int) -> dict[str, GateOutput]:
        return {layer: self._gate(layer, batch, size) for layer, size in self.sizes.items()}

    def _gate(self, layer: str, batch: Batch, num_experts: int) -> GateOutput:
        encoder = layer.startswith("encoder")
        rows = (batch.source if encoder else batch.target).cell_N
        piece = batch.source_N if encoder else batch.target_in_N
        columns = len(batch.pairs_B)
        chosen = [
            self.rule(layer, int(v), int(batch.pairs_B[row % columns]), int(row // columns))
            for v, row in zip(piece, rows, strict=True)
        ]
        width = max(1, *map(len, chosen))
        expert_TK, gates_TK = torch.full((len(rows), width), num_experts), torch.zeros(len(rows), width)
        for token, choice in enumerate(chosen):
            for slot, (expert, gate) in enumerate(choice.items()):
                expert_TK[token, slot], gates_TK[token, slot] = expert, gate
        zero_E, zero = torch.zeros(num_experts), torch.zeros(())
        return GateOutput(expert_TK, gates_TK, 0, GateSums(zero_E, zero_E, zero_E), zero, zero)


def measure(
    rule: Rule, sources: list[str], targets: list[str], domains: Sequence[str] = (), copies: int = 1, **sizes: int
) -> list[LayerReport]:
    router, words = Router(rule, **sizes), Words(*sources, *targets)
    return expert_report(router, words, sources, targets, domains, copies=copies)


def by_sentence(*choices: dict[int, float]) -> Rule:
    """Every token of a sentence chooses what stands here for its sentence."""
    return lambda _layer, _piece, sentence, _position: choices[sentence]


def test_lift_by_hand() -> None:
    """Blank sentences, which have one token each."""
    rule = by_sentence({0: 0.75, 1: 0.25}, {0: 0.5, 1: 0.5}, {1: 1.0, 0: 0.0}, {1: 0.5, 0: 0.5})
    [report] = measure(rule, [""] * 4, [""] * 4, ["news", "news", "talk", "talk"], encoder_1=3)
    assert (report.k, report.num_tokens, report.idle_experts) == (2, 4, 1)
    assert [row.share for row in report.experts] == [0.5, 0.5, 0.0]
    assert [row.mean_gate for row in report.experts] == pytest.approx([1.75 / 4, 2.25 / 4, 0.0])
    assert report.experts[0].domains == {"news": 1.0, "talk": 1.0}
    assert report.experts[2].domains == {"news": 0.0, "talk": 0.0}
    assert report.max_over_mean_load == pytest.approx(4 / (8 / 3))
    assert report.cv_load == pytest.approx(np.std([4, 4, 0]) / np.mean([4, 4, 0]))
    assert report.cv_importance == pytest.approx(np.std([1.75, 2.25, 0]) / np.mean([1.75, 2.25, 0]))


def test_lift_of_an_expert_with_a_taste() -> None:
    rule = by_sentence({0: 1.0}, {0: 1.0}, {0: 1.0}, {1: 1.0}, {})
    domains = ["a", "a", "b", "b", "never chose"]
    [report] = measure(rule, [""] * 5, [""] * 5, domains, decoder_1=2)
    # Expert 0: 2/3 of its tokens from a, which has 1/2 of all.
    assert report.experts[0].domains == pytest.approx({"a": 4 / 3, "b": 2 / 3})
    assert report.experts[1].domains == pytest.approx({"a": 0.0, "b": 2.0})
    text = str(report)
    assert "a x1.3" in text
    assert "b x2.0" in text
    assert "never chose" not in text
    assert len(text.splitlines()) == 4


def test_new_experts_and_the_domains_that_they_took() -> None:
    """Experts 0 and 3 are earlier, 1, 2, 4 and 5 their copies."""
    rule = by_sentence({0: 0.5, 1: 0.5}, {2: 0.5, 4: 0.5}, {3: 0.5, 5: 0.5}, {0: 0.5, 3: 0.5})
    domains = ["news", "news", "talk", "talk"]
    [report] = measure(rule, [""] * 4, [""] * 4, domains, copies=3, encoder_1=6)
    assert [row.expert for row in report.experts if row.new] == [1, 2, 4, 5]
    assert report.new == NewShare(4 / 8, {"news": 3 / 4, "talk": 1 / 4})
    assert report.new_of_expert == [
        NewShare(2 / 4, {"news": 2 / 3, "talk": 0.0}),
        NewShare(2 / 4, {"news": 1.0, "talk": 1 / 3}),
    ]
    lines = str(report).splitlines()
    assert lines[-1] == "  new experts (+) have 50.0% of all choices; by domain: news 75.0%, talk 25.0%"
    assert [line.split()[0] for line in lines[2:-1]] == ["0", "1+", "2+", "3", "4+", "5+"]
    [plain] = measure(rule, [""] * 4, [""] * 4, [], copies=3, encoder_1=6)
    assert str(plain).endswith("new experts (+) have 50.0% of all choices")
    [without] = measure(rule, [""] * 4, [""] * 4, domains, encoder_1=6)
    assert (without.new, without.new_of_expert) == (None, [])
    assert "new" not in str(without).replace("news", "")


def sentences(count: int, vocabulary: int = 9, seed: int = 0, longest: int = 9) -> list[str]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, longest, count)
    return [" ".join(f"w{word}" for word in generator.integers(0, vocabulary, length)) for length in lengths]


def random_rule(num_experts: dict[str, int], empty: float = 0.2) -> Rule:
    """Up to three experts, always the same for the same place, one of them by the piece; the last expert is idle."""

    def rule(layer: str, piece: int, sentence: int, position: int) -> dict[int, float]:
        generator = np.random.default_rng((len(layer), piece, sentence, position))
        size = num_experts[layer]
        chosen = dict.fromkeys([piece % (size - 1), *generator.permutation(size - 1)[:2].tolist()])
        chosen = [each for each in chosen if generator.random() > empty]
        gates = generator.random(len(chosen))
        return dict(zip(chosen, (gates / gates.sum()).tolist(), strict=True))

    return rule


SIZES = {"encoder.1": 7, "decoder.2": 5}
DOMAINS = ("news", "talk", "law")


Text = tuple[list[str], list[str], list[str]]  # sources, targets, domains


@pytest.fixture(scope="module")
def text() -> Text:
    domains = [DOMAINS[i % 3] for i in range(60)]
    return sentences(60), sentences(60, seed=1), domains


@pytest.fixture(scope="module")
def measured(text: Text) -> list[LayerReport]:
    return measure(random_rule(SIZES), *text, encoder_1=7, decoder_2=5)


def choices(layer: str, text: Text) -> list[tuple[int, int, int, int, dict[int, float]]]:
    """(sentence, position, length, piece, gates) of every token of a layer, by plain loops."""
    sources, targets, _ = text
    words, rule, found = Words(*sources, *targets), random_rule(SIZES), []
    for sentence, line in enumerate(sources if layer.startswith("encoder") else targets):
        ids = words.encode_batch([line])[0].tolist()
        ids = [*ids, EOS] if layer.startswith("encoder") else [BOS, *ids]
        for position, piece in enumerate(ids):
            found.append((sentence, position, len(ids), piece, rule(layer, piece, sentence, position)))
    return found


@pytest.mark.parametrize("place", [0, 1])
def test_figures_are_those_of_loops(place: int, text: Text, measured: list[LayerReport]) -> None:
    report = measured[place]
    tokens = choices(report.layer, text)
    slots = [(expert, gate, token) for token in tokens for expert, gate in token[4].items()]
    count, gates, position = Counter(), Counter(), Counter()
    for expert, gate, token in slots:
        count[expert] += 1
        gates[expert] += gate
        position[expert] += token[1] / max(token[2] - 1, 1)
    assert report.num_tokens == len(tokens)
    assert report.k == pytest.approx(len(slots) / len(tokens))
    assert any(not token[4] for token in tokens)
    entropy = -sum(gate * log(gate) for _, gate, _ in slots) / len(tokens)
    assert report.gate_entropy == pytest.approx(entropy, rel=1e-6)
    assert [row.expert for row in report.experts] == list(range(SIZES[report.layer]))
    assert report.experts[-1].share == report.experts[-1].position == report.experts[-1].mean_gate == 0
    assert report.idle_experts == 1
    for row in report.experts[:-1]:
        assert row.share == pytest.approx(count[row.expert] / len(slots))
        assert row.importance == pytest.approx(gates[row.expert] / sum(gates.values()), rel=1e-6)
        assert row.mean_gate == pytest.approx(gates[row.expert] / count[row.expert], rel=1e-6)
        assert row.position == pytest.approx(position[row.expert] / count[row.expert])
    domains = Counter(text[2][token[0]] for _, _, token in slots)
    for row in report.experts[:-1]:
        for name, lift in row.domains.items():
            own = sum(expert == row.expert and text[2][token[0]] == name for expert, _, token in slots)
            assert lift == pytest.approx(own / count[row.expert] / (domains[name] / len(slots)))


def loop_information(pairs: list[tuple[int, object]]) -> float:
    """Mutual information in bits of pairs of labels."""
    both, first, second = Counter(pairs), Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    total = len(pairs)
    return sum(n / total * log2(n * total / (first[a] * second[b])) for (a, b), n in both.items())


@pytest.mark.parametrize("place", [0, 1])
def test_purity_is_the_mutual_information_of_loops(place: int, text: Text, measured: list[LayerReport]) -> None:
    report = measured[place]
    slots = [(expert, token) for token in choices(report.layer, text) for expert in token[4]]
    for purity, labels in (
        (report.token_purity, [(expert, token[3]) for expert, token in slots]),
        (report.domain_purity, [(expert, text[2][token[0]]) for expert, token in slots]),
    ):
        assert purity is not None
        counts = Counter(label for _, label in labels).values()
        entropy = -sum(n / len(labels) * log2(n / len(labels)) for n in counts)
        assert purity.bits == pytest.approx(loop_information(labels))
        assert purity.label_bits == pytest.approx(entropy)
        assert purity.share == pytest.approx(purity.bits / entropy)
        assert 0 < purity.chance_share <= purity.chance_max_share


def test_tokens_are_counted_and_lifted_as_by_loops(text: Text, measured: list[LayerReport]) -> None:
    names = Words(*text[0], *text[1]).names
    shown = 0
    for report in measured:
        tokens = choices(report.layer, text)
        for row in report.experts:
            rate = sum(row.expert in token[4] for token in tokens) / len(tokens)
            least = [role.least_lift for role in row.tokens]
            assert least == sorted(least, reverse=True)
            for role in row.tokens:
                own = [row.expert in token[4] for token in tokens if names[token[3]] == role.piece]
                assert role.count == sum(own) >= MIN_COUNT
                assert role.rate == pytest.approx(sum(own) / len(own))
                assert role.lift == pytest.approx(sum(own) / len(own) / rate)
                assert 1 < role.least_lift < role.lift
                shown += 1
    assert shown > 3


def test_pairs_are_those_of_loops(text: Text, measured: list[LayerReport]) -> None:
    for report in measured:
        together: dict[tuple[int, int], int] = defaultdict(int)
        for token in choices(report.layer, text):
            for pair in permutations(token[4], 2):
                together[pair] += 1
        size = len(report.experts)
        expected_EE = expected_pairs(np.array([[together[i, j] for j in range(size)] for i in range(size)], float))
        for i, j in permutations(range(size - 1), 2):
            assert report.pair_lift[i][j] == pytest.approx(together[i, j] / expected_EE[i, j])
        for listed in report.pairs:
            assert listed.count == together[listed.first, listed.second]
            assert listed.lift == pytest.approx(report.pair_lift[listed.first][listed.second])
            assert listed.lift > 1


def test_a_split_by_domain_is_pure_and_a_random_one_is_not() -> None:
    lines = sentences(300)
    domains = [DOMAINS[i % 3] for i in range(300)]
    split, random = (
        measure(rule, lines, lines, domains, encoder_1=6)[0].domain_purity
        for rule in (lambda _, v, s, t: {s % 3: 1.0}, lambda _, v, s, t: {hash((v, s, t)) % 6: 1.0})
    )
    assert split is not None
    assert split.share == pytest.approx(1.0)
    assert split.chance_max_share < 0.1
    assert random is not None
    assert random.share < 2 * random.chance_max_share < 0.03


def test_languages_are_labels_beside_domains() -> None:
    """Experts chosen by the target language reveal it, and what it says of the source language; lifts are counts."""
    lines = sentences(240)
    directions = [Direction.of(("en-de", "en-fr", "de-en")[i % 3]) for i in range(240)]
    domains = ["news" if i % 2 else "talk" for i in range(240)]
    experts = {"de": 0, "fr": 1, "en": 2}
    router = Router(lambda _, v, s, t: {experts[directions[s].target]: 1.0}, encoder_1=3)
    [report] = expert_report(router, Words(*lines), lines, lines, domains, 0, directions)
    assert report.language_purity["target language"].share == pytest.approx(1.0)
    assert 0.4 < report.language_purity["source language"].share / 0.92 < 1.2
    assert report.domain_purity is not None
    assert report.domain_purity.share < 0.01
    tokens = Counter[str]()
    for line, direction in zip(lines, directions, strict=True):
        tokens.update({direction.target: len(line.split()) + 1})
    total = sum(tokens.values())
    english = report.experts[experts["en"]]
    assert english.languages == pytest.approx(
        {"from de": total / tokens["en"], "from en": 0.0, "to de": 0.0, "to en": total / tokens["en"], "to fr": 0.0}
    )
    assert [name for name, _ in preferred(english)] == ["from de", "to en"]
    [alone] = expert_report(router, Words(*lines), lines, lines, domains)
    assert alone.domain_purity == report.domain_purity
    assert alone.language_purity == {}
    assert [row.domains for row in alone.experts] == [row.domains for row in report.experts]


def test_domain_labels_are_shuffled_over_sentences() -> None:
    """An expert for each sentence knows much of the domain by chance alone; over tokens the baseline would be lower."""
    lines = [line for line in sentences(400) if len(line.split()) > 4][:120]
    generator = np.random.default_rng(5)
    domains = [DOMAINS[i] for i in generator.integers(0, 3, len(lines))]
    purity = measure(lambda _, v, s, t: {s % 40: 1.0}, lines, lines, domains, encoder_1=40)[0].domain_purity
    assert purity is not None
    assert purity.shuffles == 20
    assert 0.25 < purity.chance_share < purity.chance_max_share < 0.6
    assert 0.7 < purity.share / purity.chance_share < 1.3


def test_a_split_by_token_is_pure_and_specialised() -> None:
    lines = sentences(200, vocabulary=6)
    pure = measure(lambda _, v, s, t: {v: 1.0}, lines, lines, encoder_1=12)[0]
    assert pure.token_purity is not None
    assert pure.token_purity.share == pytest.approx(1.0)
    assert pure.token_purity.chance_max_share < 0.1
    assert pure.token_purity.shuffles == 5
    assert pure.domain_purity is None
    busy = [row for row in pure.experts if row.share]
    # All of an expert's tokens are one piece: log2(1 / share) bits.
    for row in busy:
        assert row.specialisation == pytest.approx(-log2(row.share), rel=0.05)
        assert [role.rate for role in row.tokens] == [1.0]


def test_experts_of_few_random_tokens_are_not_specialised() -> None:
    lines = sentences(200, vocabulary=60)
    report = measure(lambda _, v, s, t: {hash((v, s, t)) % 30: 1.0}, lines, lines, encoder_1=30)[0]
    assert abs(sum(row.specialisation for row in report.experts)) / 30 < 0.1
    assert all(not row.tokens for row in report.experts)


def test_no_more_than_the_best_tokens_are_listed() -> None:
    lines = sentences(200, vocabulary=24)
    report = measure(lambda _, v, s, t: {v % 2: 1.0}, lines, lines, encoder_1=2)[0]
    assert [len(row.tokens) for row in report.experts] == [8, 8]
    counts = [role.count for role in report.experts[0].tokens]
    assert counts == sorted(counts, reverse=True)


def test_information_of_a_table() -> None:
    table = np.array([[5.0, 0, 3], [0, 0, 0], [1, 7, 1]])
    expert_C, label_C = np.indices(table.shape).reshape(2, -1)
    bits_E = information(expert_C, label_C, table.ravel(), 3)
    pairs = [(i, j) for i in range(3) for j in range(3) for _ in range(int(table[i, j]))]
    assert bits_E.sum() / table.sum() == pytest.approx(loop_information(pairs))
    column_share = table.sum(0) / table.sum()
    own = table[0] / table[0].sum()
    divergence = sum(p * log2(p / q) for p, q in zip(own, column_share, strict=True) if p)
    assert bits_E[0] / 8 == pytest.approx(divergence)
    assert bits_E[1] == 0


def test_least_rate_is_the_lower_root_of_wilsons_equation() -> None:
    count, trials = np.array([0.0, 1, 5, 5, 50, 500]), np.array([3.0, 1, 5, 20, 200, 500])
    low = least_rate(count, trials)
    np.testing.assert_allclose((count / trials - low) ** 2, Z * Z * low * (1 - low) / trials, atol=1e-12)
    assert (low <= count / trials + 1e-12).all()
    # The same rate counts for more with more trials.
    assert list(np.argsort(least_rate(np.array([1.0, 5, 50]), np.array([1.0, 5, 50])))) == [0, 1, 2]


def test_a_rare_token_does_not_win_over_a_frequent_one() -> None:
    lines = ["often " * 8 + "x y z " * 9] * 20 + ["rare x"] * 6 + ["once x"] * 2
    words = Words(*lines)

    def rule(_: str, piece: int, sentence: int, position: int) -> dict[int, float]:
        name = words.names[piece]
        often = name == "▁often" and (sentence + position) % 20 > 0
        return {0 if often or name in ("▁rare", "▁once") else 1: 1.0}

    roles = measure(rule, lines, lines, encoder_1=2)[0].experts[0].tokens
    assert [role.piece for role in roles] == ["▁often", "▁rare"]
    assert roles[0].lift < roles[1].lift
    assert [len(role.contexts) > 0 for role in roles] == [True, True]


def test_expected_pairs_keep_every_experts_partners() -> None:
    generator = np.random.default_rng(2)
    together = generator.integers(1, 30, (6, 6)).astype(float)
    together += together.T
    expected = expected_pairs(together)
    np.fill_diagonal(together, 0)
    np.testing.assert_allclose(expected.sum(1), together.sum(1))
    # a_i a_j off the diagonal.
    np.testing.assert_allclose(expected[0, 1] * expected[2, 3], expected[0, 3] * expected[2, 1])
    assert not expected.diagonal().any()
    np.testing.assert_allclose(expected_pairs(np.array([[9.0, 9], [9, 9]])), [[0, 9], [9, 0]])
    assert not expected_pairs(np.diag([3.0, 4, 5])).any()


def test_experts_that_like_each_other_are_found() -> None:
    lines = sentences(300)

    def rule(_: str, v: int, s: int, t: int) -> dict[int, float]:
        first, second = np.random.default_rng((v, s, t)).permutation(12)[:2].tolist()
        return {1: 0.5, 3: 0.5} if (s + t) % 4 == 0 else {first: 0.5, second: 0.5}

    report = measure(rule, lines, lines, encoder_1=12)[0]
    assert [(pair.first, pair.second) for pair in report.pairs][:1] == [(1, 3)]
    assert report.pair_lift[1][3] == report.pair_lift[3][1] > 1.3
    assert all(report.pair_lift[i][j] < 1 for i in (1, 3) for j in (0, 2, 4, 11))
    alone = measure(lambda *_: {0: 1.0}, lines, lines, encoder_1=2)[0]
    assert (alone.pairs, alone.pair_lift) == ([], [])


def test_many_experts_have_pairs_but_no_matrix() -> None:
    lines = sentences(40)
    report = measure(lambda _, v, s, t: {v: 0.5, 99: 0.3, v + 20: 0.2}, lines, lines, encoder_1=100)[0]
    assert report.pair_lift == []
    assert 1 <= len(report.pairs) <= 20
    assert all(pair.second == pair.first + 20 for pair in report.pairs)


# ----------------------------------------------------------------------------------------------------- contexts


def roles_of(row: ExpertRow) -> dict[str, list[tuple[str, str, str, str | None]]]:
    return {
        role.piece: [(each.before, each.token, each.after, each.predicts) for each in role.contexts]
        for role in row.tokens
    }


def test_contexts_show_the_words_around() -> None:
    sources = ["a Bahn+hof b", "the Bahn+hof"] * 3 + ["one two three four five six seven Bahn+hof 1 2 3 4 5 6 7 8"] * 2
    words = Words(*sources)
    wanted = words.names.index("hof")

    def rule(layer: str, piece: int, sentence: int, position: int) -> dict[int, float]:
        return {0 if piece == wanted else 1: (sentence + 1) / 10}

    encoder, decoder = measure(rule, sources, sources, encoder_1=2, decoder_1=2)
    assert roles_of(encoder.experts[0]) == {
        "hof": [
            ("two three four five six seven Bahn", "hof", " 1 2 3 4 5 6", None),
            ("the Bahn", "hof", " ⟨end⟩", None),
            ("a Bahn", "hof", " b ⟨end⟩", None),
        ]
    }
    assert [each.gate for each in encoder.experts[0].tokens[0].contexts] == pytest.approx([0.8, 0.6, 0.5])
    assert roles_of(decoder.experts[0])["hof"][1:] == [
        ("⟨start⟩ the Bahn", "hof", "", "⟨end⟩"),
        ("⟨start⟩ a Bahn", "hof", " b", "b"),
    ]


def test_first_and_last_tokens_are_named() -> None:
    lines = ["x y z"] * 9
    encoder, decoder = measure(lambda _, v, s, t: {int(t in (0, 3)): 1.0}, lines, lines, encoder_1=2, decoder_1=2)
    assert roles_of(encoder.experts[1]) == {
        "▁x": [("", "x", " y z ⟨end⟩", None)],
        "</s>": [("x y z ", "⟨end⟩", "", None)],
    }
    assert roles_of(decoder.experts[1])["<s>"] == [("", "⟨start⟩", " x y z", "x")]
    assert roles_of(decoder.experts[1])["▁z"] == [("⟨start⟩ x y ", "z", "", "⟨end⟩")]


def test_contexts_are_those_of_the_largest_gates() -> None:
    lines = [f"w{i} x v{i}" for i in range(40)]
    gates = np.random.default_rng(1).permutation(40) / 40
    encoder = measure(lambda _, v, s, t: {int(t != 1): float(gates[s])}, lines, lines, encoder_1=2)[0]
    best = np.argsort(-gates)[:4]
    (role,) = encoder.experts[0].tokens
    assert [each.before for each in role.contexts] == [f"w{i} " for i in best]
    assert [each.gate for each in role.contexts] == pytest.approx(gates[best].tolist())


# ------------------------------------------------------------------------------------------------ bounds and limits


def test_nothing_depends_on_batches_or_on_how_often_counts_are_settled(
    text: Text, measured: list[LayerReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nmt.experts.report.eval_batches", lambda s, t, _: eval_batches(s, t, 30))
    monkeypatch.setattr("nmt.experts.report._MAX_WAITING", 17)
    again = measure(random_rule(SIZES), *text, encoder_1=7, decoder_2=5)
    for one, other in zip(measured, again, strict=True):
        assert str(one) == str(other)
        assert one.token_purity == other.token_purity
        assert one.domain_purity == other.domain_purity
        assert one.pairs == other.pairs
        assert [row.tokens for row in one.experts] == [row.tokens for row in other.experts]
    assert measure(random_rule(SIZES), *text, encoder_1=7, decoder_2=5) == again


def test_examples_are_bounded(text: Text, measured: list[LayerReport], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmt.experts.report._MAX_EXAMPLES", 20)
    few = measure(random_rule(SIZES), *text, encoder_1=7, decoder_2=5)
    for one, other in zip(measured, few, strict=True):
        assert sum(len(role.contexts) for row in other.experts for role in row.tokens) <= 20
        for before, after in zip(one.experts, other.experts, strict=True):
            assert [role.piece for role in before.tokens] == [role.piece for role in after.tokens]


def test_a_gate_that_chooses_nobody() -> None:
    report = measure(lambda *_: {}, ["a b"], ["a"], ["x"], encoder_1=3)[0]
    assert (report.k, report.num_tokens, report.idle_experts) == (0, 3, 3)
    assert report.token_purity is not None
    assert report.token_purity.share == 0
    assert all(row.tokens == [] and row.share == 0 for row in report.experts)


def test_one_domain_tells_nothing() -> None:
    report = measure(lambda *_: {0: 1.0}, ["a b"] * 4, ["a"] * 4, ["x"] * 4, encoder_1=2)[0]
    assert report.domain_purity is None
    assert report.experts[0].domains == {"x": 1.0}
    assert measure(lambda *_: {0: 1.0}, ["a b"], ["a"], encoder_1=2)[0].experts[0].domains == {}


def test_rank_in_runs() -> None:
    assert rank_in_runs(np.array([4, 4, 4, 7, 9, 9, 4])).tolist() == [0, 1, 2, 0, 0, 1, 0]
    assert rank_in_runs(np.array([], np.int64)).tolist() == []
