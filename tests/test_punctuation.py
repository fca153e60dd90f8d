"""corpus.punctuation: what Moses' script makes of text, with the package sacremoses as the oracle."""

import pickle

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sacremoses import MosesPunctNormalizer

from nmt.config.corpus import CorpusConfig
from nmt.data.prepared import prepared_path
from nmt.text.punctuation import normaliser

LANGUAGES = ("en", "fr", "de", "es", "cs")
SENTENCES = (
    "The Commission’s proposal ‘as it is’ — and only that — costs 5 % more…",
    "He said: “We agree,” and “we vote.” Then he left („sofort“).",
    "Le rapport de M. Dupont\u00a0: «\u00a0C’est l’été, d’être aujourd’hui\u00a0!\u00a0» dit-il\u00a0; et alors\u00a0?",
    "Il a dit « oui », puis «non.» (voir l’article 12 ; n° 3) .",
    "Es kostet 1\u00a0000\u00a0000 Euro ( etwa 3,5\u00a0% ) , sagte er ‚gern‘ – „wirklich.“",
    "Temperatura: 25\u00a0ºC, nº\u00a07, 30\u00a0cm,\u00a0y más ``comillas''.",
    "Řekl: „Dobře,“ a odešel; cena je 20\u00a0000 Kč.",
    "Nothing to do here, and nothing there.",
    'A "plain", "quote." and \'single\' one:(x)y (z) ! (w);',
    "",
    "—",
    "\u00a0",
)
TYPOGRAPHY = st.text("ab1É \u00a0„“”–—´‘’‚…«»'\"`.,:;!?%()<º-", max_size=30)


def oracle(text: str, language: str) -> str:
    """Return what sacremoses makes of a text, except for the differences named in nmt/text/punctuation.py.

    Its option `perl_parity` keeps blanks around French quotes; the rule of apostrophes is then set back to its default.
    The line break lets a period and a quote at the end change places. For the package, a no-break space is a blank.
    """
    moses = MosesPunctNormalizer(language, perl_parity=True)
    moses.substitutions = [("’", "'") if each == ("’", '"') else each for each in moses.substitutions]
    moses.substitutions = [
        (pattern.replace(r"\s", r"[ \n]"), plain) if r"\s" in pattern else (pattern, plain)
        for pattern, plain in moses.substitutions
    ]
    return str(moses.normalize(f"{text}\n"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_are_as_sacremoses_writes_them(language: str) -> None:
    normalise = normaliser("moses", language)
    for text in SENTENCES:
        assert normalise(text).strip() == oracle(text, language), text


@pytest.mark.parametrize("language", LANGUAGES)
@given(text=TYPOGRAPHY)
@example(text='."  ."x')
@example(text=',,"')
@example(text="1\u00a02\u00a03")
@example(text="(’’.`` `)")
def test_any_typography_is_as_sacremoses_writes_it(language: str, text: str) -> None:
    assert normaliser("moses", language)(text).strip() == oracle(text, language)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_second_time_changes_nothing(language: str) -> None:
    normalise = normaliser("moses", language)
    for text in SENTENCES:
        assert normalise(normalise(text)) == normalise(text)


@given(text=st.text('a\n\r ’\u2028."(', max_size=20), language=st.sampled_from(LANGUAGES))
def test_lines_stay_lines(text: str, language: str) -> None:
    normalise = normaliser("moses", language)
    assert normalise(text).split("\n") == [normalise(line) for line in text.split("\n")]


def test_languages_move_quotes_in_their_way() -> None:
    text = "“yes”, “no.” 1\u00a02"
    assert normaliser("moses", "en")(text) == '"yes," "no." 1.2'
    assert normaliser("moses", "de")(text) == '"yes", "no". 1,2'
    assert normaliser("moses", "cs")(text) == '"yes", "no." 1,2'
    assert normaliser("moses", "it")(text) == '"yes", "no". 1.2'
    for code in ("de_AT", "de-AT", "DE"):
        assert normaliser("moses", code)(text) == normaliser("moses", "de")(text)


def test_apostrophes_before_accents_are_apostrophes() -> None:
    assert normaliser("moses", "fr")("d’être à l’été") == "d'être à l'été"


def test_keep_changes_nothing() -> None:
    assert all(normaliser("keep", "en")(text) == text for text in SENTENCES)


def test_the_function_goes_to_other_processes() -> None:
    normalise = pickle.loads(pickle.dumps(normaliser("moses", "en")))
    assert normalise("‘a’") == "'a'"


def test_the_setting_is_checked_and_names_the_folder_only_if_used() -> None:
    with pytest.raises(ValueError, match=r"corpus\.punctuation=mosse is not one of keep, moses"):
        CorpusConfig(punctuation="mosse")
    assert prepared_path(CorpusConfig(punctuation="keep")) == prepared_path(CorpusConfig())
    assert prepared_path(CorpusConfig(punctuation="moses")) != prepared_path(CorpusConfig())
