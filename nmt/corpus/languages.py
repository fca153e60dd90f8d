"""Recognise which of two languages a text is in. Only this file uses py3langid.

The library compares two languages only, so that short texts of related languages are not taken for a third one.
"""

from functools import cache
from typing import Any

from nmt.errors import DataError


def probability(text: str, language: str, other: str) -> float:
    """Return the probability that a text is in `other` rather than in `language`, which are codes such as en or pt_BR.

    DataError for a code that the library does not know.
    """
    codes = _code(language), _code(other)
    if codes[0] == codes[1]:
        return 0.0  # pt_PT and pt_BR
    return dict(_identifier(*sorted(codes)).rank(text))[codes[1]]


def check_codes(languages: tuple[str, ...]) -> None:
    """Raise DataError if one of the codes is not known to the library."""
    for language in languages:
        if _code(language) not in _known():
            raise DataError(
                f"corpus.filters.wrong_language cannot recognise the language {language}: its codes are those of ISO "
                "639-1, such as en or pt_BR; switch the rule off with 0"
            )


def _code(language: str) -> str:
    return language.replace("_", "-").partition("-")[0].lower()


@cache
def _identifier(first: str, second: str) -> Any:
    identifier = _loaded()
    identifier.set_languages([first, second])
    return identifier


@cache
def _known() -> frozenset[str]:
    return frozenset(_loaded().labels)


def _loaded() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
