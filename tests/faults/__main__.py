"""Faults injected into real training, in one process and in several: what survives, and whether a bit changes.

    python -m tests.faults            everything, about a quarter of an hour on two cores
    python -m tests.faults --quick    what every change must pass, about a minute and a half
    python -m tests.faults --only kill --only disk --keep
    python -m tests.faults --gpus     one of two processes on two GPUs is killed, hangs, raises, is told to stop

Every case trains a tiny model on a few sentences of the phrasebook through the command line, does something to it from
outside (signals, files, limits, full disks; tests/faults/hooks for what has to happen at one place inside), and
checks what README.md promises. A run that went on must end with the same bits as one that nothing interrupted:
parameters, moments, state, every logged figure (on GPUs: with nearly the same perplexity). The end is a table; the
status is 1 if any promise was broken.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.faults import crashes, damage, disk, memory, nonfinite, preparation, ranks, settings, stops
from tests.faults.box import Box, Shared, Tally

MODULES = (ranks, crashes, stops, disk, memory, damage, nonfinite, settings, preparation)
QUICK_STEPS, STEPS = 20, 60
ON_GPUS = (ranks.rank_hangs, ranks.rank_killed, ranks.rank_raises, ranks.rank_exits, stops.signals_two)


def run_case(case: object, shared: Shared, quick: bool) -> tuple[str, Tally]:
    """One case to its end, whatever happens in it, and its line."""
    name = case.__name__  # type: ignore[attr-defined]
    box, started = Box(name, shared, quick), time.monotonic()
    try:
        case(box)
    except TimeoutError as error:
        box.promise(False, f"hung: {error}")
    except Exception:
        box.promise(False, f"the case itself failed: {traceback.format_exc()}")
    finally:
        box.close()
    tally, title = box.tally, (case.__doc__ or name).splitlines()[0].rstrip(".")
    result = "ok    " if not tally.broken else "BROKEN"
    equal = f", {tally.equal} of {tally.compared} bit-equal" if tally.compared else ""
    notes = f" ({'; '.join(tally.notes)})" if tally.notes else ""
    seconds = time.monotonic() - started
    print(f"{result} {name}: {tally.survived} of {tally.injected} survived{equal}{notes}, {seconds:.0f} s", flush=True)
    for each in tally.broken:
        print(f"         {each}", flush=True)
    return title, tally


def main() -> int:
    """Run the cases, print the table; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer faults of the kinds that matter most")
    parser.add_argument("--gpus", action="store_true", help="what two GPUs do with the processes on them")
    parser.add_argument("--only", action="append", default=[], help="cases whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="cases at the same time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="leave the folder with all runs and logs")
    options = parser.parse_args()
    cases = list(ON_GPUS) if options.gpus else [case for module in MODULES for case in module.CASES]
    if options.only:
        cases = [case for case in cases if any(part in case.__name__ for part in options.only)]
    elif options.quick and not options.gpus:
        cases = [case for case in cases if case not in {each for module in MODULES for each in module.LONG}]
    folder, started = Path(tempfile.mkdtemp(prefix="nmt-faults-")), time.monotonic()
    try:
        shared = Shared(folder, options.seed, QUICK_STEPS if options.quick or options.gpus else STEPS, options.gpus)
        with ThreadPoolExecutor(options.jobs) as pool:
            results = list(pool.map(lambda case: run_case(case, shared, options.quick), cases))
    finally:
        if options.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{'':88} injected  survived  bit-equal")
    total = Tally()
    for title, tally in results:
        print(f"{title:88} {tally.injected:8}  {tally.survived:8}  {_of(tally)}")
        for name in ("injected", "survived", "compared", "equal"):
            setattr(total, name, getattr(total, name) + getattr(tally, name))
        total.broken += tally.broken
    print(f"{'all':88} {total.injected:8}  {total.survived:8}  {_of(total)}")
    print(f"\n{len(total.broken)} promises broken, {time.monotonic() - started:.0f} s, seed {options.seed}")
    return 1 if total.broken or total.survived < total.injected else 0


def _of(tally: Tally) -> str:
    return f"{f'{tally.equal}/{tally.compared}':>9}" if tally.compared else f"{'-':>9}"


if __name__ == "__main__":
    sys.exit(main())
