"""The device and the precision that a command computes in."""

import torch

from nmt.errors import UserError


def pick_device(name: str, key: str) -> torch.device:
    """The torch device for a setting `key` with value auto, cpu or cuda. ValueError for cuda where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{key}=cuda, but PyTorch sees no GPU: use {key}=cpu")
    # The GPU has its number: torch.cuda.set_device, which a thread must call, takes none without.
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass: matrix products in bf16 if `precision` says so (auto: on a GPU)."""
    enabled = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def set_fast_math(device: torch.device) -> None:
    """Let float32 products on a GPU (gates, mostly) use tf32: their inputs come from bf16 anyway."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
