"""Triton kernels in tests: interpreted where there is no GPU, and compiled for GPUs that are not there.

A test gives a fused function tensors of DEVICE. On a GPU the kernel runs as it does in training. Elsewhere it runs in
Triton's interpreter, one program after the other in numpy: keep the grid small. Kernels are compiled in a process of
their own, since Triton decides for a whole process whether it interprets.
"""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
"""Compute capabilities that kernels must compile for, times ten, and the most shared memory of a block there."""

_ROOT = Path(__file__).parents[1]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install 'nmt-moe[dev]' on Linux"
)


class Compiled(NamedTuple):
    """A kernel as ptxas made it for one compute capability."""

    kernel: str
    capability: int
    registers: int
    """Of each thread."""
    spilled: int
    """Bytes of each thread that found no register."""
    shared: int
    """Bytes of shared memory of each block."""


def interpret_without_gpu() -> None:
    """Make Triton interpret kernels in this process and those that it starts, unless there is a GPU.

    Triton must not be imported yet.
    """
    if DEVICE == "cpu":
        assert "triton" not in sys.modules
        os.environ["TRITON_INTERPRET"] = "1"


def compile_launches(function: Callable[[], Any], *capabilities: int) -> list[Compiled]:
    """Call `function`, a function of a test module without arguments, and compile every kernel that it launches.

    Each kernel is compiled for `capabilities`, by default all of SHARED_BYTES. It is specialised for the arguments of
    the launch: their types, which of them are multiples of 16, constants, warps and stages. Nothing runs: outputs keep
    their contents. The function makes its tensors on the CPU. Raises an AssertionError, with Triton's message, for a
    kernel that does not compile, and for one that needs too much shared memory.
    """
    name = f"{function.__module__}:{function.__qualname__}"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_CACHE_DIR", str(_ROOT / ".pytest_cache" / "triton"))
    command = [sys.executable, "-m", "tests.kernels", name, *map(str, capabilities or SHARED_BYTES)]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compiled = [Compiled(*each) for each in json.loads(done.stdout.splitlines()[-1])]
    assert compiled, f"{name} launches no kernel"
    assert [each for each in compiled if each.shared > SHARED_BYTES[each.capability]] == []
    return compiled


def _compile_launches(function: Callable[[], Any], capabilities: list[int]) -> list[Compiled]:
    """`compile_launches` in a process that does not interpret."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    class Absent:
        """Stands for the driver of a GPU of `capability`; the number is also that of the device."""

        capability = 0

        def get_current_device(self) -> int:
            return self.capability

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", self.capability, 32)

    compiled: dict[tuple[str, int, bytes], Compiled] = {}
    run = JITFunction.run

    def only_compile(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        for gpu.capability in capabilities:
            found = run(kernel, *arguments, grid=grid, warmup=True, **options)
            figures = Compiled(kernel.__name__, gpu.capability, *_resources(found.asm["cubin"]), found.metadata.shared)
            compiled[kernel.__name__, gpu.capability, found.asm["cubin"]] = figures

    gpu = Absent()
    driver.set_active(gpu)
    JITFunction.run = only_compile
    function()
    return list(compiled.values())


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes on the stack) of each thread of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    return registers, stack


if __name__ == "__main__":
    _module, _, _name = sys.argv[1].partition(":")
    _function = getattr(importlib.import_module(_module), _name)
    print(json.dumps(_compile_launches(_function, list(map(int, sys.argv[2:])))))
