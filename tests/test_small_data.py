"""The studies of small data: their jobs fit together and run in order, and their tables are what the records give."""

import json
import time
from pathlib import Path

import pytest

from nmt.compose import compose_config
from scripts.results import small_data
from scripts.results.small_data import STUDIES, Job, Scheduler, Site, text_of_set
from scripts.results.small_data_tables import TABLES, read_records, spread

ROOT = Path(__file__).parents[1]
JOBS = [job for study in STUDIES.values() for job in study()]
PLACES = {"runs": "runs", "multi30k": "data/multi30k", "europarl": "data/europarl", "news": "data/news"}


def site_of(folder: Path, jobs: int) -> Site:
    places = {**PLACES, "runs": str(folder / "runs")}
    return Site(places, folder / "records", "abc", "a card", jobs, time.monotonic() + 60)


def test_jobs_have_names_of_their_own_and_need_earlier_ones() -> None:
    names = [job.name for job in JOBS]
    assert len(set(names)) == len(names) > 90
    for place, job in enumerate(JOBS):
        assert set(job.needs) <= set(names[:place])
        assert all(JOBS[names.index(need)].keeps for need in job.needs), job.name


@pytest.mark.slow
def test_every_training_composes(tmp_path: Path) -> None:
    site = site_of(tmp_path, 1)
    composed = 0
    for job in (job for job in JOBS if job.name.endswith((".1", "general", "teacher"))):
        for command in job.commands:
            words = [site.filled(word, job.name) for word in command if command[0] in ("train", "distill")]
            settings = [word for word in words if "=" in word and not word.startswith("run.start_from")]
            if settings and "experiment=fine_tune" not in settings:
                assert compose_config(settings).run.name == job.name
                composed += 1
    assert composed > 15


def test_every_set_is_two_files_and_a_direction() -> None:
    for job in JOBS:
        for name in job.sets:
            *paths, direction = text_of_set(name)
            assert [path.rsplit(".", 2)[1] for path in paths] == direction.split("-")


def test_jobs_wait_for_those_they_need_and_run_alone_where_they_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    running: list[str] = []
    most: list[int] = []
    order: list[str] = []

    def work(job: Job, site: Site) -> str:
        running.append(job.name)
        most.append(len(running))
        assert not (job.alone and len(running) > 1)
        time.sleep(0.02)
        running.remove(job.name)
        order.append(job.name)
        if job.name != "broken":
            site.records.mkdir(exist_ok=True)
            site.record_of(job).write_text("{}")
        return "done"

    monkeypatch.setattr(small_data, "work", work)
    site = site_of(tmp_path, 3)
    jobs = [
        Job("speed", [], alone=True),
        Job("base", []),
        Job("broken", []),
        *(Job(f"grown.{number}", [], needs=("base",)) for number in range(4)),
        Job("lost", [], needs=("broken",)),
        Job("timed", [], alone=True),
    ]
    assert not Scheduler(jobs, site).run()
    assert order[0] == "speed"
    assert order.index("base") < min(order.index(f"grown.{number}") for number in range(4))
    assert max(most) > 1
    assert "lost" not in order
    assert "lost: not started: there is no broken" in capsys.readouterr().out
    # What has its record is not run again, unless another job needs a run that is not there.
    order.clear()
    (tmp_path / "records" / "grown.0.json").unlink()
    assert Scheduler(jobs[3:4] + jobs[1:2], site).run()
    assert order == ["base", "grown.0"]


def test_tables_are_what_the_records_give() -> None:
    records = read_records()
    assert records.keys() <= {job.name for job in JOBS}
    shown = json.loads((ROOT / "results" / "small_data.json").read_text())["tables"]
    assert {table["of"] for table in shown if "of" in table} == TABLES.keys()
    for table in (table for table in shown if "of" in table):
        made = json.loads(json.dumps(TABLES[table["of"]](records)))
        assert {key: table[key] for key in made} == made, "run python -m scripts.results.small_data_tables"


def test_a_mean_has_its_spread() -> None:
    assert [spread([]), spread([3.14159], 2), spread([1.0, 3.0])] == ["-", "3.14", "2.0 ± 1.4"]
