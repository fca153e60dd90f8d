"""Settings have bounds, so that a configuration from anybody asks for nothing impossible."""

import math
from collections.abc import Iterator
from typing import Any

import pytest

from nmt.config import Config
from nmt.config.checks import MOST
from nmt.config.reading import known_settings, setting_type


def nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def impossible() -> Iterator[tuple[str, Any]]:
    for key, most in MOST.items():
        kind = setting_type(Config, key)
        wrap = {dict[str, int]: lambda value: {"encoder.2": value}, list[int]: lambda value: [value]}
        yield key, wrap.get(kind, lambda value: value)(most + 1)
    for key in known_settings(Config):
        if setting_type(Config, key) in (float, float | None):
            yield from ((key, value) for value in (math.inf, math.nan, -math.inf))
    yield "model.moe.num_experts_at", {"encoder.2": -1}
    yield "model.moe.hidden_sizes", [8] * 101
    yield "model.num_encoder_layers", 10**7
    yield "model.hidden_size", int("9" * 4000)


@pytest.mark.parametrize(("key", "value"), impossible(), ids=lambda each: str(each)[:40])
def test_what_nobody_needs_is_refused_with_its_key(key: str, value: Any) -> None:
    changes = {"model": {"cell_size": 262_144}} if key == "model.hidden_size" else {}
    settings = nested(key, value)
    if changes:
        settings["model"] |= changes["model"]
    with pytest.raises(ValueError, match=rf"^{key}"):
        Config.from_dict(settings)


@pytest.mark.parametrize("name", ["a/b", ".", "..", "a\nb", "a\x1b]0;x\x07", "a\x00b"])
@pytest.mark.parametrize("section", ["run", "corpus"])
def test_a_name_is_plain(section: str, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{section}\.name"):
        Config.from_dict({section: {"name": name}})


@pytest.mark.parametrize("key", ["run.directory", "corpus.root", "corpus.source"])
def test_no_text_has_a_nul(key: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key} contains a NUL character"):
        Config.from_dict(nested(key, "a\x00b"))
