"""Parts of the network by name, as `training.freeze` names them."""

import re
from collections.abc import Sequence

PARTS = ("embeddings", "softmax", "encoder", "decoder", "attention", "lstms", "gates", "experts")
_SLICE = re.compile(r"experts\[(-?[0-9]{0,9}):(-?[0-9]{0,9})(?::(-?[0-9]{1,9})?)?\]")


def expert_slice(part: str) -> slice | None:
    """Return the slice in "experts[START:STOP:STEP]", whose numbers may be left out; None if this is no such text."""
    found = _SLICE.fullmatch(part)
    if not found or "-" in found.groups():
        return None
    numbers = [int(number) if number else None for number in found.groups()]
    return None if numbers[2] == 0 else slice(*numbers)


def check_parts(key: str, parts: Sequence[str]) -> None:
    """Reject a name that is neither in `PARTS` nor a slice of experts."""
    for part in parts:
        if part not in PARTS and expert_slice(part) is None:
            raise ValueError(
                f"{key}: {part} is not a part of the network; name {', '.join(PARTS)}, or some experts as "
                "experts[START:STOP:STEP]"
            )
