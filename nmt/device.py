"""The device and the precision that a command computes in."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nmt.config import uses_bf16
from nmt.errors import MemoryLimitError, UserError

# How PyTorch words a refusal on the host, where it has no exception of its own.
_NO_HOST_MEMORY = ("can't allocate memory", "not enough memory")
# The limits of control groups (containers, batch systems), versions 2 and 1.
_GROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def pick_device(name: str, key: str) -> torch.device:
    """The torch device for a setting `key` with value auto, cpu or cuda. ValueError for cuda where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{key}=cuda, but PyTorch sees no GPU: use {key}=cpu")
    # The GPU has its number: torch.cuda.set_device, which a thread must call, takes none without.
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def product_dtype(device: torch.device, precision: str) -> torch.dtype:
    """What `precision` makes of matrix products: bf16, fp32, or auto: bf16 on a GPU."""
    return torch.bfloat16 if uses_bf16(precision, device.type == "cuda") else torch.float32


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass in training: matrix products in bf16 if `precision` says so."""
    enabled = product_dtype(device, precision) == torch.bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def set_float32_products(device: torch.device, precision: str) -> None:
    """How float32 products on a GPU are computed.

    Where the others are bf16 those that remain (gates, mostly) may use tf32: their inputs come from bf16 anyway. With
    precision=fp32 every product is float32 in full, those of cuDNN's LSTM too.
    """
    if device.type == "cuda":
        tf32 = product_dtype(device, precision) == torch.bfloat16
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32


@contextmanager
def shortage_told(where: Callable[[], str], remedy: str) -> Iterator[None]:
    """MemoryLimitError, in one line, instead of whatever says that memory ran out on a GPU or on the host."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        on_host = any(words in text for words in _NO_HOST_MEMORY)
        if not on_host and not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        tried = re.search(r"ried to allocate ([\d.]+) (\w+)", text)
        size = ""
        if tried:
            size = f" ({int(tried[1]) / 1e9:.3g} GB" if tried[2] == "bytes" else f" ({tried[1]} {tried[2]}"
            size += " more were asked for)"
        raise MemoryLimitError(f"out of memory in {where()}{size}: {remedy}") from error


def memory_bytes(device: torch.device) -> int:
    """All memory of a GPU; for the CPU that of the machine, or what its control group may use of it if that is less."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in _GROUP_LIMITS:
        limit = path.read_text().strip() if path.is_file() else ""
        limits += [int(limit)] if limit.isdigit() else []
    return min(limits)
