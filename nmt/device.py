"""Choose the device and precision of a command, and report when memory runs out."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nmt.config import DecodingConfig, uses_bf16
from nmt.errors import MemoryLimitError, UserError

# PyTorch's messages when the host's memory runs out, for which it has no exception class.
_NO_HOST_MEMORY = ("can't allocate memory", "not enough memory")
# Files with the memory limits of control groups (containers, batch systems), versions 2 and 1.
_GROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def pick_device(name: str, key: str) -> torch.device:
    """Return the torch device for a setting `key` of auto, cpu or cuda. Raises UserError for cuda without a GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{key}=cuda, but PyTorch sees no GPU: use {key}=cpu")
    # With an index: threads must call torch.cuda.set_device, which rejects a device without one.
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def product_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Return the type of matrix products for a `precision` of bf16, fp32 or auto (bf16 on a GPU)."""
    return torch.bfloat16 if uses_bf16(precision, device.type == "cuda") else torch.float32


def search_dtype(device: torch.device, decoding: DecodingConfig) -> torch.dtype:
    """Return the type of matrix products in a search. UserError if the device cannot do what `decoding` asks for.

    On a CPU, auto is bf16 only if the processor has matrix units for it. Processors with vector instructions for bf16
    alone were not faster than in float32 (docs/decoding.md). A measurement would be no better guide: other work on the
    machine changes its outcome, and then the translations.
    """
    if decoding.quantize == "int8":
        if device.type != "cpu":
            raise UserError("decoding.quantize=int8 works on a CPU only: give decoding.device=cpu, or leave it out")
        return torch.float32
    if device.type == "cpu" and decoding.precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise UserError("decoding.precision=bf16: this processor cannot compute in bf16; use decoding.precision=fp32")
    on_amx = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if uses_bf16(decoding.precision, device.type == "cuda" or on_amx) else torch.float32


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context of a forward pass in training, with matrix products in bf16 if `precision` selects it."""
    enabled = product_dtype(device, precision) == torch.bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def set_float32_products(device: torch.device, precision: str) -> None:
    """Set how a GPU computes float32 matrix products.

    If most products are bf16, the remaining float32 ones (mostly gates) may use tf32: their inputs come from bf16
    products. With precision=fp32, every product is full float32, also in cuDNN's LSTM.
    """
    if device.type == "cuda":
        tf32 = product_dtype(device, precision) == torch.bfloat16
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32


@contextmanager
def shortage_told(where: Callable[[], str], remedy: str) -> Iterator[None]:
    """Replace any error that means that the memory of a GPU or the host ran out with a MemoryLimitError of one line."""
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
            size += " more were requested)"
        raise MemoryLimitError(f"out of memory in {where()}{size}: {remedy}") from error


def memory_bytes(device: torch.device) -> int:
    """Return a GPU's memory in bytes; for the CPU, the machine's, or the limit of the control group if that is less."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in _GROUP_LIMITS:
        limit = path.read_text().strip() if path.is_file() else ""
        limits += [int(limit)] if limit.isdigit() else []
    return min(limits)
