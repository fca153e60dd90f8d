"""Memory that runs out: status 6 and one line, and no update before it is lost."""

from tests.faults.box import Box, differences, newest_step, one_line, status


def no_memory(box: Box) -> None:
    """memory runs out in an update, in a validation, in one of two processes"""
    cases = [
        ("update", {"kind": "in_step", "step": 13}, 1, "out of memory in step 13"),
        ("validation", {"kind": "in_validation"}, 1, "out of memory in the validation at step 10"),
        ("one-of-two", {"kind": "in_step", "step": 13, "rank": 1}, 2, "rank 1 of 2"),
    ]
    for run, fault, processes, words in cases[1:2] if box.quick else cases:
        process = box.train(run, processes=processes, faults=[fault | {"do": "no_memory"}])
        told = status(box.run(run))
        kept = process.popen.returncode == 6 and one_line(process, words) and bool(process.happened(str(fault["kind"])))
        kept = kept and (told.get("state"), told.get("code"), newest_step(box.run(run))) == ("failed", 6, 10)
        if not box.fault(kept, f"{run}: status {process.popen.returncode}, {told}", process):
            continue
        if run != "validation":
            box.finish(run, processes=processes)
            continue
        # It goes on from where it failed. All it lacks is what that validation would have said.
        process = box.train(run)
        found = [each for each in differences(box.run(run), box.shared.whole(1)) if not each.startswith("dev line")]
        box.tally.compared += 1
        box.tally.equal += not found
        box.promise(process.popen.returncode == 0 and not found, f"{run} went on otherwise: {found[:3]}", process)


CASES = (no_memory,)
LONG: tuple = ()
