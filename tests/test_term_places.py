"""Required terms put in by attention: where, with which flags, and what becomes of places in the text."""

import numpy as np
import pytest

from nmt.decoding.terms import Attention, Placed, place_terms
from nmt.text.checks import Flag
from nmt.text.terms import Match, Terms, find_terms, words


def attention(source: str, target: str, links: dict[int, int], weight: float = 0.9) -> Attention:
    """One subword per word, and the end; target word t attends to links[t] with `weight`, and to the end else."""
    source_S, target_T = ([*(word.start for word in words(text)), -1] for text in (source, target))
    weight_TS = np.zeros((len(target_T), len(source_S)))
    for number in range(len(target_T)):
        weight_TS[number, links.get(number, -1)] += weight
        weight_TS[number, -1] += 1 - weight
    return Attention(np.array(source_S), np.array(target_T), weight_TS)


def place(source: str, target: str, links: dict[int, int], terms: dict[str, str | None], weight: float = 0.9) -> Placed:
    return place_terms(target, find_terms(source, [Terms.of(terms)]), attention(source, target, links, weight))


def test_the_word_with_the_most_attention_is_replaced() -> None:
    placed = place("the pump is new", "das Gerät ist neu", {0: 0, 1: 1, 2: 2, 3: 3}, {"pump": "Pumpe"})
    assert placed.text == "das Pumpe ist neu"
    assert placed.flags == (Flag("term", "pump: Pumpe replaces Gerät"),)


def test_a_term_that_is_there_changes_nothing() -> None:
    placed = place("the pump", "die Pumpen", {0: 0, 1: 1}, {"pump": "Pumpe"})
    assert placed[:2] == ("die Pumpen", ())


def test_without_attention_to_a_term_it_is_missing() -> None:
    flags = (Flag("term", "pump: Pumpe is missing"),)
    for weight, links in ((0.05, {0: 0, 1: 1}), (0.9, {0: 0})):
        placed = place("the pump", "das Gerät", links, {"pump": "Pumpe"}, weight)
        assert placed[:2] == ("das Gerät", flags)
    assert place("the pump", "", {}, {"pump": "Pumpe"})[:2] == ("", flags)
    assert place_terms("das Gerät", [Match(4, 8, "pump", "Pumpe")], None)[:2] == ("das Gerät", flags)


def test_a_term_of_several_words_replaces_a_run() -> None:
    terms: dict[str, str | None] = {"heat pump": "Wärmepumpe"}
    placed = place("a heat pump is new", "eine warme Pumpe ist neu", {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}, terms)
    assert placed.text == "eine Wärmepumpe ist neu"
    # Its words are far apart, so what is between them belongs to others.
    placed = place("a heat pump is new", "pompe qui est à chaleur", {0: 2, 1: 3, 2: 3, 3: 4, 4: 1}, terms)
    assert placed.text == "Wärmepumpe"
    placed = place("a heat pump is new", "Pumpe ist neu und auch warm", {0: 2, 1: 3, 2: 4, 3: 0, 5: 1}, terms)
    assert placed.text == "Pumpe ist neu und auch warm"
    assert placed.flags == (Flag("term", "heat pump: Wärmepumpe is missing"),)


def test_of_two_occurrences_the_missing_one_is_put_in() -> None:
    source, links = "a pump and a pump", {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}
    terms: dict[str, str | None] = {"pump": "Pumpe"}
    assert place(source, "ein Gerät und eine Pumpe", links, terms).text == "ein Pumpe und eine Pumpe"
    assert place(source, "eine Pumpe und ein Gerät", links, terms).text == "eine Pumpe und ein Pumpe"
    both = place(source, "ein Gerät und ein Gerät", links, terms)
    assert both.text == "ein Pumpe und ein Pumpe"
    assert len(both.flags) == 2


def test_the_words_of_other_terms_are_not_replaced() -> None:
    terms: dict[str, str | None] = {"pump": "Pumpe", "valve": "Ventil"}
    placed = place("pump valve", "Ventil Ding", {0: 0, 1: 1}, terms)
    assert placed.text == "Ventil Ding"
    assert placed.flags == (Flag("term", "pump: Pumpe is missing"),)


@pytest.mark.parametrize(("target", "text"), [("pompe", "Pompe ist"), (None, "pump ist")])
def test_capital_at_the_beginning(target: str | None, text: str) -> None:
    assert place("pump is", "Gerät ist", {0: 0, 1: 1}, {"pump": target}).text == text


def test_places_move_with_the_text() -> None:
    placed = place(
        "a pump and a valve on", "x Ding y z Gerät auf", {0: 0, 1: 1, 4: 4, 5: 5}, {"pump": "P", "valve": "Ventile"}
    )
    assert placed.text == "x P y z Ventile auf"
    assert placed.attention is not None
    assert placed.attention.target_T.tolist() == [*(word.start for word in words(placed.text)), -1]


def test_subwords_of_a_word_add_up() -> None:
    """Two subwords with little attention each count more than one word with more."""
    matches = [Match(0, 4, "pump", "Pumpe")]
    weight_TS = np.array([[0.5, 0.5], [0.4, 0.6], [0.4, 0.6], [0.0, 1.0]])
    found = place_terms("ein Gerät", matches, Attention(np.array([0, -1]), np.array([0, 4, 7, -1]), weight_TS))
    assert found.text == "ein Pumpe"
    assert found.attention is not None
    assert found.attention.target_T.tolist() == [0, 4, 4, -1]  # a subword inside the word begins the new one
