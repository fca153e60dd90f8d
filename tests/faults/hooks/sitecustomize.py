"""Faults that cannot be injected from outside a process: Python imports this file before the program starts.

The environment says what shall happen. NMT_FAULTS is a list of {"kind": .., "rank": .., ...} in JSON; a fault without
`rank` happens in all processes that train. Each writes a line to the file NMT_FAULTS_LOG when it happens, so that none
can fail to happen unseen. The program itself knows nothing of this.
"""

import errno
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

Fault = dict[str, Any]
RANK = int(os.environ.get("RANK", "0"))


def note(*words: object) -> None:
    """One line of the log, at once; several processes append to it."""
    line = " ".join(map(str, (time.time(), RANK, os.getpid(), *words))) + "\n"
    descriptor = os.open(os.environ["NMT_FAULTS_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def before(owner: Any, name: str, action: Callable[..., None]) -> None:
    """Let `action` see the arguments of every call of owner.name first."""
    original = getattr(owner, name)

    def call(*arguments: Any, **keywords: Any) -> Any:
        action(*arguments)
        return original(*arguments, **keywords)

    setattr(owner, name, call)


def act(fault: Fault, where: str) -> None:
    """What happens at a place: a signal, an exception, an end, or nothing for ever."""
    note(fault["kind"], fault["do"], where)
    match fault["do"]:
        case "raise":
            raise RuntimeError("injected")
        case "no_memory":
            import torch

            torch.empty(1 << 60, dtype=torch.uint8)
        case "exit":
            sys.exit(0)
        case "sleep":
            time.sleep(3600)
        case "signal":
            target = os.getppid() if fault.get("to") == "parent" else os.getpid()
            for number in fault["signals"]:
                os.kill(target, number)
                time.sleep(fault.get("pause", 0.0))


# ------------------------------------------------------------------------------------------------ at a moment


def in_step(fault: Fault) -> None:
    """Act in the middle of an update: after the forward pass, before the backward pass; if recorded, after both."""
    from nmt.training.recording import Recording
    from nmt.training.update import Updater

    original, seed, finish = Updater._forward, Updater._seed, Recording.finish
    at, done = 0, False

    def seeded(self: Updater, step: int, index: int) -> None:
        nonlocal at
        at = step
        seed(self, step, index)

    def now() -> None:
        nonlocal done
        if at == fault["step"] and not done:
            done = True
            act(fault, f"step {at}")

    def forward(self: Updater, batch: Any) -> Any:
        output = original(self, batch)
        now()
        return output

    def finished(self: Recording) -> Any:
        now()
        return finish(self)

    Updater._seed, Updater._forward, Recording.finish = seeded, forward, finished


def in_validation(fault: Fault) -> None:
    """Act at the start of a validation."""
    import nmt.training.validation

    before(nmt.training.validation, "perplexity", lambda *_: act(fault, "validation"))


def before_first_step(fault: Fault) -> None:
    """Act when the run is open and nothing is trained yet."""
    from nmt.training.reports import Reports

    before(Reports, "introduce", lambda *_: act(fault, "start"))


def slow_steps(fault: Fault) -> None:
    """Every update takes longer, so that a signal from outside meets it."""
    from nmt.training.trainer import Trainer

    before(Trainer, "_update", lambda *_: time.sleep(fault["seconds"]))


# ------------------------------------------------------------------------------------------------- while writing


def writing_calls(action: Callable[[str], None]) -> None:
    """Call `action(name)` before everything that changes the disk."""
    import shutil
    from pathlib import Path

    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    from nmt.metrics.writer import MetricsWriter

    calls = [(HuggingFaceStorageWriter, "write_data"), (MetricsWriter, "write"), (shutil, "rmtree"), (os, "fsync")]
    calls += [(Path, name) for name in ("write_text", "write_bytes", "mkdir", "rename", "replace")]
    for owner, name in calls:
        before(owner, name, lambda *_, name=name: action(name))


def in_save(fault: Fault) -> None:
    """At call number `number` of the thread that saves, counted over all saves: stay there, or act.

    Or, when `saves` saves are done, at a call named `call` that follows one named `after`.
    """
    count = saves = 0
    previous = ""

    def action(name: str) -> None:
        nonlocal count, saves, previous
        if threading.current_thread().name != "Saver":
            return
        count += 1
        saves += name == "rename"
        named = name == fault.get("call") and previous == fault["after"] and saves >= fault["saves"]
        previous = name if name != "fsync" else previous
        if count == fault.get("number") or named:
            act(fault, f"call {count} {name}")

    writing_calls(action)


def slow_save(fault: Fault) -> None:
    """The thread that saves waits before each call, and notes it."""

    def action(name: str) -> None:
        if threading.current_thread().name == "Saver":
            note("slow_save", name)
            time.sleep(fault["seconds"])

    writing_calls(action)


def full_disk(fault: Fault) -> None:
    """All writing calls from number `number` on fail, counted from the first update."""
    from nmt.training.trainer import Trainer

    count = 0
    training = False

    def begin(*_: Any) -> None:
        nonlocal training
        training = True

    def action(name: str) -> None:
        nonlocal count
        if not training or name == "rmtree":  # a full disk does not keep files from being removed
            return
        count += 1
        if count >= fault["number"]:
            if count == fault["number"]:
                note("full_disk", name)
            code = getattr(errno, fault["errno"])
            raise OSError(code, os.strerror(code))

    before(Trainer, "_loop", begin)
    writing_calls(action)


# --------------------------------------------------------------------------------------------- numbers that are none


def nan(fault: Fault) -> None:
    """NaN in the loss, in a gradient or in the gate of a layer, in the updates `first` to `last`."""
    import torch

    from nmt.training.trainer import Trainer
    from nmt.training.update import Updater

    original, forward, seed = Trainer._update, Updater._forward, Updater._seed
    at = 0

    def hit(step: int) -> bool:
        return fault["first"] <= step <= fault["last"]

    def update(trainer: Trainer, *arguments: Any) -> None:
        handles = []
        if hit(trainer.progress.step + 1):
            note("nan", fault["where"], trainer.progress.step + 1)
            if fault["where"] == "gate":
                name = fault["layer"].replace(".", ".moe_layers.moe.") + ".gate"
                gate = trainer.model.get_submodule(name)
                handles.append(gate.register_forward_pre_hook(lambda _, inputs: (inputs[0] * math.nan,)))
            if fault["where"] == "gradient":
                parameter = next(p for name, p in trainer.model.named_parameters() if fault["parameter"] in name)
                handles.append(parameter.register_hook(lambda gradient: torch.full_like(gradient, fault["value"])))
        original(trainer, *arguments)
        for handle in handles:
            handle.remove()

    def seeded(self: Updater, step: int, index: int) -> None:
        nonlocal at
        at = step
        seed(self, step, index)

    def poisoned(self: Updater, batch: Any) -> Any:
        output = forward(self, batch)
        if fault["where"] == "loss" and hit(at):
            return output._replace(loss=output.loss * math.nan)
        return output

    fault = {"value": math.nan} | fault
    Trainer._update = update
    Updater._seed, Updater._forward = seeded, poisoned


def fingerprints(fault: Fault) -> None:
    """Note the hash of all parameters and moments of this process before and after the updates `steps`."""
    from nmt.training.optim import tensors_to_save
    from nmt.training.trainer import Trainer

    original = Trainer._update

    def fingerprint(trainer: Trainer) -> str:
        digest = hashlib.sha256()
        for tensors in tensors_to_save(trainer.model, trainer.optimizer).values():
            for tensor in tensors.values():
                digest.update(tensor.detach().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def update(trainer: Trainer, *arguments: Any) -> None:
        step = trainer.progress.step + 1
        old = fingerprint(trainer)
        original(trainer, *arguments)
        if step in fault["steps"]:
            note("fingerprint", step, old, fingerprint(trainer))

    Trainer._update = update


def lean(fault: Fault) -> None:
    """Every token prefers the first experts by far: all go to the same, the others stay idle."""
    import torch

    import nmt.model.gating

    plain, noisy = nmt.model.gating.top_k_gate, nmt.model.gating.noisy_top_k
    noted = False

    def leaning(logits: torch.Tensor, num_experts: int) -> torch.Tensor:
        """Return logits, of which the first of a row are those of the experts, with the preference."""
        nonlocal noted
        if not noted:
            note("lean")
            noted = True
        preference = torch.arange(num_experts, 0, -1, dtype=logits.dtype)
        return logits + torch.nn.functional.pad(fault["by"] * preference, (0, logits.shape[-1] - num_experts))

    def top_k_gate(logits: torch.Tensor, *rest: Any) -> object:
        return plain(leaning(logits, logits.shape[-1]), *rest)

    def noisy_top_k(logits: torch.Tensor, noise: torch.Tensor, *arguments: Any) -> object:
        return noisy(leaning(logits, noise.shape[-1]), noise, *arguments)

    vars(nmt.model.gating).update(top_k_gate=top_k_gate, noisy_top_k=noisy_top_k)


KINDS = (in_step, in_validation, before_first_step, slow_steps, in_save, slow_save, full_disk, nan, fingerprints, lean)

# The launcher and torchrun only start the others.
if "NMT_FAULTS" in os.environ and not {"--processes", "torch.distributed.run"} & set(sys.orig_argv):
    kinds = {kind.__name__: kind for kind in KINDS}
    for each in json.loads(os.environ["NMT_FAULTS"]):
        if each.get("rank", RANK) == RANK:
            if each.get("do") == "signal":
                each["signals"] = [getattr(signal, number) for number in each["signals"]]
            kinds[each["kind"]](each)
