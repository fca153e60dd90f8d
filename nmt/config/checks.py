"""Checks of settings. Each raises a ValueError with the full key, the value and what is allowed."""

import math
from collections.abc import Collection
from typing import Any

from nmt.wording import shortened

_LONGEST_NAME = 200  # bytes; the file system allows 255, and names of files are made of it
MOST = {
    "model.hidden_size": 65_536,
    "model.cell_size": 262_144,
    "model.num_encoder_layers": 1_000,
    "model.num_decoder_layers": 1_000,
    "model.bidirectional_layers": 1_000,
    "model.residual_from": 1_000_000,
    "model.attention.size": 65_536,
    "model.attention.heads": 1_024,
    "model.moe.num_experts": 1_000_000,
    "model.moe.num_experts_at": 1_000_000,
    "model.moe.hidden_sizes": 1_000_000,
    "training.batch_tokens": 10**9,
    "training.micro_batches": 10**6,
    "training.max_steps": 10**12,
    "training.expert_rate": 1_000,
    "training.r_drop": 1_000,
    "training.teacher_weight": 1,
    "training.decay_share": 1,
    "training.seed": 2**63 - 1,
    "parallel.timeout_seconds": 10**7,
    "decoding.average_checkpoints": 10_000,
    "decoding.beam_size": 10_000,
    "decoding.alpha": 10,
    "decoding.beta": 1_000,
    "decoding.max_length_ratio": 100,
    "decoding.min_length": 10_000,
    "decoding.max_length": 1_000_000,
    "decoding.no_repeat_ngram": 1_000,
    "decoding.prune_margin": 1_000_000,
    "decoding.temperature": 1_000,
    "decoding.top_k": 10**9,
    "decoding.top_p": 1,
    "decoding.seed": 2**63 - 1,
    "decoding.max_source_pieces": 1_000_000,
    "decoding.batch_tokens": 10**9,
    "corpus.subwords.vocab_size": 1_000_000,
}
"""Largest value of a setting, or of each value in it; all are far above what anybody needs. Without these bounds, a
run received from somebody could require more memory or time than exists, or numbers outside the range of float32."""


LEAST_TEMPERATURE = 0.01
"""Lowest temperature of sampling: quotients of logits stay in the range of float32."""


def one_of(key: str, value: Any, allowed: Collection[Any]) -> None:
    """Reject a value that is not in `allowed`."""
    if value not in allowed:
        raise ValueError(f"{key}={value} is not one of {', '.join(map(str, allowed))}")


def at_least(key: str, value: float, minimum: float) -> None:
    """Reject a value below `minimum` or above its bound in `MOST`."""
    # `not >=` rejects NaN too.
    if not value >= minimum:
        raise ValueError(f"{key}={value} must be at least {minimum}")
    _not_beyond_most(key, value)


def above(key: str, value: float, bound: float) -> None:
    """Reject a value that is not greater than `bound`, or above its bound in `MOST`."""
    if not value > bound:
        raise ValueError(f"{key}={value} must be greater than {bound}")
    _not_beyond_most(key, value)


def _not_beyond_most(key: str, value: float) -> None:
    # Options of a call have the names, and so the bounds, of settings decoding.*.
    names = (f"{key}.", f"decoding.{key}.")
    most = next((most for name, most in MOST.items() if any(each.startswith(f"{name}.") for each in names)), math.inf)
    if value > most:
        raise ValueError(f"{key}={value} must be at most {most}")
    if value == math.inf:
        raise ValueError(f"{key}={value} must be finite")


def fraction(key: str, value: float) -> None:
    """Reject a value outside 0 <= value < 1."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{key}={value} must lie in 0 <= value < 1")


def plain_name(key: str, value: str) -> None:
    """Reject a value that cannot name a file in a folder: "." or "..", a long one, or one with a slash or a control."""
    if len(value.encode(errors="replace")) > _LONGEST_NAME:
        raise ValueError(f"{key}={shortened(value, 40)!r} must have at most {_LONGEST_NAME} bytes: it becomes a folder")
    if "/" in value or value in (".", "..") or not value.isprintable():
        raise ValueError(f"{key}={value!r} must be a plain name: it becomes a folder")


def check_search(options: Any, section: str = "") -> None:
    """Check settings of a search: those in `decoding.`, or the options of a call, which have the same names."""
    for name in ("beam_size", "max_source_pieces"):
        at_least(f"{section}{name}", getattr(options, name), 1)
    for name in ("alpha", "beta", "experts_per_token", "batch_tokens", "min_length", "max_length", "no_repeat_ngram"):
        at_least(f"{section}{name}", getattr(options, name), 0)
    for name in ("prune_margin", "temperature", "top_k", "seed"):
        at_least(f"{section}{name}", getattr(options, name), 0)
    for name in ("max_length_ratio", "top_p"):
        above(f"{section}{name}", getattr(options, name), 0.0)
    if 0 < options.max_length < options.min_length:
        given = f"{section}max_length={options.max_length}"
        raise ValueError(f"{given} must be 0 (any) or at least {section}min_length={options.min_length}")
    if 0.0 < options.temperature < LEAST_TEMPERATURE:
        raise ValueError(
            f"{section}temperature={options.temperature} must be 0 (no sampling) or at least {LEAST_TEMPERATURE}"
        )
    for name, unused in (("top_k", 0), ("top_p", 1)):
        if options.temperature == 0.0 and getattr(options, name) != unused:
            raise ValueError(
                f"{section}{name}={getattr(options, name)} is for sampling: set {section}temperature=1 too, or "
                f"{section}{name}={unused}"
            )
