"""Which direction of a run is meant."""

import pytest

from nmt.config import Direction
from nmt.data.symbols import Symbols
from nmt.decoding.directions import Directions
from nmt.errors import UserError

SEVERAL = Directions(
    "demo",
    tuple(map(Direction.of, ("en-de", "de-en", "en-fr", "cs-en"))),
    Symbols(("de", "en", "fr")),
)
ONE = Directions("demo", (Direction("en", "de"),))


@pytest.mark.parametrize(
    ("source", "target", "found"),
    [("en", "de", "en-de"), (None, "fr", "en-fr"), ("de", None, "de-en"), ("cs", None, "cs-en")],
)
def test_the_languages_given_choose_among_the_directions(source, target, found):
    assert str(SEVERAL.choose(source, target)) == found
    assert not SEVERAL.is_zero_shot(Direction.of(found))


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        (None, None, "demo translates 4 directions: give --from and --to; it has: en-de, de-en, en-fr, cs-en"),
        ("en", None, "demo translates en-de, en-fr: give --to, too"),
        (None, "en", "demo translates de-en, cs-en: give --from, too"),
        ("en", "cs", "demo does not translate en-cs; it has: en-de, de-en, en-fr, cs-en"),
        ("ru", "en", "demo does not translate ru-en; it has: "),
        ("en", "en", "demo does not translate en-en; it has: "),
        (None, "cs", "demo does not translate to cs; it has: "),
        ("fr", None, "demo does not translate from fr; it has: "),
    ],
)
def test_other_languages_are_refused_with_what_the_run_has(source, target, says):
    with pytest.raises(UserError) as error:
        SEVERAL.choose(source, target)
    assert str(error.value).startswith(says)


@pytest.mark.parametrize("pair", [("de", "fr"), ("fr", "de"), ("fr", "en"), ("cs", "fr")])
def test_a_direction_that_was_not_trained_is_zero_shot_if_its_target_has_a_symbol(pair):
    assert SEVERAL.is_zero_shot(SEVERAL.choose(*pair))


def test_a_run_of_one_direction_needs_none_and_takes_only_its_own():
    assert ONE.choose(None, None) == ONE.choose("en", None) == ONE.choose(None, "de") == ONE.choose("en", "de")
    for other in (("en", "fr"), ("de", "en"), (None, "fr"), ("de", None)):
        with pytest.raises(UserError, match=r"it has: en-de$"):
            ONE.choose(*other)


def test_symbols_that_a_run_inherited_are_directions_too():
    inherited = Directions("fine", (Direction("en", "fr"),), Symbols(("de", "fr")))
    assert inherited.choose(None, None) == ("en", "fr")
    assert inherited.is_zero_shot(inherited.choose("en", "de"))
    assert inherited.is_zero_shot(inherited.choose("de", "fr"))
