"""Numbers that are none, gates that lean, batches of next to nothing; in two processes."""

import math

from nmt.checkpoint import list_checkpoints
from tests.faults.box import Box, Process, corpus_settings, differences, lines, newest, one_line, status

_NAN = {
    "loss": {"where": "loss", "rank": 1},
    "gradient": {"where": "gradient", "parameter": "embedding", "rank": 0},
    "expert": {"where": "gradient", "parameter": "experts.weights", "value": math.inf, "rank": 1},
    "encoder.1": {"where": "gate", "layer": "encoder.1", "rank": 1},
    "decoder.1": {"where": "gate", "layer": "decoder.1", "rank": 0},
}


def _fault(name: str, first: int, last: int) -> dict[str, object]:
    return {"kind": "nan", "first": first, "last": last} | _NAN[name]


def _skipped_by_all(process: Process, step: int) -> bool:
    """Whether no process changed a bit in that update, and both did in the next one."""
    changed: dict[int, list[bool]] = {}
    for _time, _rank, _pid, _kind, at, old, new in process.happened("fingerprint"):
        changed.setdefault(int(at), []).append(old != new)
    return changed.get(step) == [False, False] and changed.get(step + 1) == [True, True]


def nan_once(box: Box) -> None:
    """NaN or infinity once, on one of two processes: in the loss, a gradient, a gate"""
    step = box.random.randint(3, box.shared.steps - 3)
    first = None
    for name in ("decoder.1",) if box.quick else tuple(_NAN):
        run = f"nan-{name}"
        faults = [_fault(name, step, step), {"kind": "fingerprints", "steps": [step, step + 1]}]
        process = box.train(run, processes=2, faults=faults)
        told = [line for line in process.errors().splitlines() if "skipped: gradient" in line]
        named = f"(first gate not finite: {name})" in "".join(told) if "." in name else "gate" not in "".join(told)
        counted = [line["step"] for line in lines(box.run(run)) if line["skipped_updates"]] == [step]
        kept = process.popen.returncode == 0 and _skipped_by_all(process, step) and len(told) == 1 and named and counted
        kept = kept and told[0].startswith(f"step {step}: 1 step skipped") and bool(process.happened("nan"))
        if not box.fault(kept, f"{run} at step {step}: {told}", process):
            continue
        if first is None:
            first = box.run(run)
            continue
        # Whatever made it skip the update: the rest is the same.
        found = [each for each in differences(box.run(run), first) if each != f"train line {step}"]
        box.tally.compared += 1
        box.tally.equal += not found
        box.promise(not found, f"{run} differs from {first.name}: {found[:3]}")


def nan_for_ever(box: Box) -> None:
    """NaN in every update from one on: status 5, the last good checkpoint stays, no NaN is the best"""
    step = 13
    for name in ("loss",) if box.quick else ("loss", "encoder.1"):
        run = f"for-ever-{name}"
        process = box.train(run, processes=2, faults=[_fault(name, step, 10**6)])
        told, checkpoint = status(box.run(run)), newest(box.run(run))
        good = checkpoint is not None and checkpoint.step >= 10
        scores = [each.score for each in list_checkpoints(box.run(run) / "checkpoints")]
        good = good and all(score is None or math.isfinite(score) for score in scores)
        kept = process.popen.returncode == 5 and one_line(process) and (told["state"], told["code"]) == ("failed", 5)
        kept = kept and "no finite gradient" in process.errors()
        if box.fault(kept and good, f"{run}: status {process.popen.returncode}, {told}", process):
            box.finish(run, processes=2)


def _alike(box: Box, name: str, *changes: str, faults: tuple[dict[str, object], ...] = ()) -> None:
    """Two processes do what one does, up to rounding, in every update."""
    runs = []
    for processes in (1, 2):
        process = box.train(
            f"{name}-{processes}", *changes, "training.max_steps=12", processes=processes, faults=faults
        )
        happened = not faults or process.happened(str(faults[0]["kind"]))
        if not box.promise(process.popen.returncode == 0 and bool(happened), f"{name}-{processes} failed", process):
            box.fault(False, f"{name}: did not train")
            return
        runs.append(lines(box.run(f"{name}-{processes}")))
    figures = ("loss", "gradient_norm", "encoder.1.importance_loss", "decoder.1.load_loss")
    apart = max(
        abs(a[figure] - b[figure]) / max(abs(a[figure]), 1e-3)
        for a, b in zip(*runs, strict=True)
        for figure in figures
        if figure in a
    )
    finite = all(math.isfinite(line["loss"]) and line["skipped_updates"] == 0 for line in runs[1])
    box.fault(finite and apart < 1e-4, f"{name}: apart by {apart:.1e}, finite {finite}")


def leaning_gates(box: Box) -> None:
    """all tokens go to the experts of one of two processes, the others get none"""
    lean = ({"kind": "lean", "by": 1e4},)
    _alike(box, "lean", faults=lean)
    if not box.quick:
        _alike(box, "softmax", "model.moe.gating=softmax_top_k", faults=lean)
        hierarchical = (
            "model.moe.gating=hierarchical",
            "model.moe.branching=2",
            "model.moe.primary_k=1",
            "model.moe.k=1",
        )
        _alike(box, "groups", *hierarchical, faults=lean)


def small_batches(box: Box) -> None:
    """batches of one token beside batches of many, unequal in every update"""
    text, data = box.folder / "text", box.folder / "data"
    text.mkdir()
    for language, word in (("en", "a"), ("de", "b")):
        odd = [word if number % 2 else " ".join([word, *"cdefghijk"] * (1 + number % 5)) for number in range(60)]
        for split, count in (("train", 60), ("dev", 4), ("test", 2)):
            (text / f"{split}.{language}").write_text("".join(f"{line}\n" for line in odd[:count]))
    given = {each.partition("=")[0]: each for each in corpus_settings(text, data)}
    given["corpus.subwords.vocab_size"] = "corpus.subwords.vocab_size=16"
    settings = [*given.values(), "training.batch_tokens=1"]
    for gating in ("noisy_top_k", "softmax_top_k", "strictly_balanced"):
        _alike(box, gating, *settings, f"model.moe.gating={gating}")


CASES = (nan_once, nan_for_ever, leaning_gates, small_batches)
LONG = (nan_for_ever, small_batches, leaning_gates)
