"""Write results/small_data.json, and a picture of growth, from results/small_data/*.json.

  python -m scripts.results.small_data_tables                # then python -m scripts.results.pages

The records are those of scripts/results/small_data.py. The picture needs matplotlib: pip install -e '.[plots]'.
"""

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from scripts.results.small_data import GROWN_AT, GROWTH_TOKENS

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "results" / "small_data"
PICTURE = "growth.svg"

Record = dict[str, Any]

WAYS = {
    "scratch": "from scratch, with a vocabulary of its own",
    "tuned": "fine-tuned",
    "mixed": "fine-tuned, mixed 1:1 with Europarl",
    "frozen": "fine-tuned, all experts frozen",
    "added": "fine-tuned, three new experts beside each frozen old one",
    "redrawn": "the same, half of each new expert redrawn",
}
GROWTH = {
    "none": "no MoE, trained on",
    "none_longer": "no MoE, trained on for as many seconds as 32 experts",
    "none_grown": "no MoE, 32 experts added",
    "moe_8": "8 experts, trained on",
    "moe_8_longer": "8 experts, trained on for as many seconds as 32 experts",
    "moe_8_unlearned": "8 experts, grown to 32, without a gradient for the choice among copies",
    "moe_8_grown": "8 experts, grown to 32",
    "moe_8_redrawn": "8 experts, grown to 32, half of each copy redrawn",
    "moe_32": "32 experts from the start",
}
STUDENTS = {
    "teacher": "teacher: 32 experts, 3 + 2 LSTMs",
    "alone": "student: no experts, 2 + 2 LSTMs, without a teacher",
    "started": "student, started from the teacher's parameters",
    "taught": "student, started so and taught by its translations",
    "words": "student, taught by its probabilities too",
}


def read_records(folder: Path = RECORDS) -> dict[str, Record]:
    """Return all records by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def of_seeds(records: Mapping[str, Record], stem: str) -> list[Record]:
    """Return the records STEM.1, STEM.2, ..., or the record STEM."""
    return [record for name, record in records.items() if re.fullmatch(rf"{re.escape(stem)}(\.\d)?", name)]


def spread(figures: Iterable[float], digits: int = 1) -> str:
    """Return mean and standard deviation, such as "40.1 ± 0.3"; the figure itself if there is one, "-" if none."""
    found = list(figures)
    if not found:
        return "-"
    mean = f"{statistics.fmean(found):.{digits}f}"
    return mean if len(found) == 1 else f"{mean} ± {statistics.stdev(found):.{digits}f}"


def scores(records: Iterable[Record], of: str, beam: int = 4, name: str = "BLEU") -> list[float]:
    """Return one score of each record that has it."""
    return [each["scores"][of][str(beam)][name] for each in records if of in each["scores"]]


def table(columns: Mapping[str, str], rows: list[Record]) -> Record:
    """Return columns and rows as scripts/results/pages.py takes them; `columns` has cells by title."""
    return {"columns": [{"title": name, "cell": cell} for name, cell in columns.items()], "rows": rows}


def transfer(records: Mapping[str, Record]) -> Record:
    """The table of a few pairs of another domain."""
    general = of_seeds(records, "transfer.general")
    sizes = (1000, 5000, 29000)
    rows = [{"way": "the general model itself", "europarl": spread(scores(general, "europarl"))}]
    rows[0] |= {f"captions_{size}": spread(scores(general, "multi30k:en-fr")) for size in sizes}
    for way, name in WAYS.items():
        row = {"way": name}
        for size in sizes:
            found = of_seeds(records, f"transfer.{way}.{size}")
            row[f"captions_{size}"] = spread(scores(found, "multi30k:en-fr"))
            row[f"europarl_{size}"] = spread(scores(found, "europarl"))
        row["europarl"] = " / ".join(row[f"europarl_{size}"].split(" ")[0] for size in sizes)
        rows.append(row)
    columns = {"": "{way}"} | {f"captions, {size:,} pairs": f"{{captions_{size}}}" for size in sizes}
    return table(columns | {"Europarl afterwards": "{europarl}"}, rows)


def languages(records: Mapping[str, Record]) -> Record:
    """The table of one model for twelve directions."""
    together = of_seeds(records, "languages.all")
    rows = []
    for name in together[0]["scores"]:
        direction = name.partition(":")[2]
        alone = of_seeds(records, f"languages.{direction}")
        rows.append({"direction": direction, "all": spread(scores(together, name)), "one": spread(scores(alone, name))})
    means = [statistics.fmean(each["4"]["BLEU"] for each in record["scores"].values()) for record in together]
    rows.append({"direction": "mean of 12", "all": spread(means), "one": "-"})
    columns = {"direction": "{direction}", "one model of 12 directions": "{all}", "a model of its own": "{one}"}
    return table(columns, rows)


def growth(records: Mapping[str, Record]) -> Record:
    """The table of networks that grow."""
    rows = []
    for stem, name in GROWTH.items():
        found = of_seeds(records, f"growth.{stem}")
        if not found:
            continue
        last = max(map(int, found[0]["dev_perplexities"]))
        row = {"network": name, "steps": last, "parameters": found[0]["parameters"] / 1e6}
        row |= {"ppl": spread([each["dev_perplexities"][str(last)] for each in found], 2), "seeds": len(found)}
        rows.append(row)
    columns = {
        "network": "{network}",
        "parameters": "{parameters:.1f}M",
        "steps": "{steps:,}",
        "dev perplexity": "{ppl}",
        "seeds": "{seeds}",
    }
    return table(columns, rows)


def students(records: Mapping[str, Record]) -> Record:
    """The table of teacher and students."""
    rows = []
    for stem, name in STUDENTS.items():
        found = of_seeds(records, f"students.{stem}")
        if not found:
            continue
        row = {"system": name, "parameters": found[0]["parameters"] / 1e6, "ops": found[0]["ops_per_timestep"] / 1e6}
        row["ppl"] = spread([each["dev_perplexity"] for each in found], 2)
        for beam in (1, 4):
            for of in ("europarl", "news"):
                row[f"{of}_{beam}"] = spread(scores(found, of, beam), 2)
                row[f"{of}_chrf_{beam}"] = spread(scores(found, of, beam, "chrF2"), 2)
        rows.append(row)
    columns = {
        "system": "{system}",
        "parameters": "{parameters:.1f}M",
        "ops/token": "{ops:.1f}M",
        "dev perplexity": "{ppl}",
        "beam 1: BLEU": "{europarl_1}",
        "beam 4: BLEU": "{europarl_4}",
        "chrF2": "{europarl_chrf_4}",
        "news, beam 4: BLEU": "{news_4}",
    }
    return table(columns, rows)


TABLES = {"transfer": transfer, "languages": languages, "growth": growth, "students": students}


def draw_growth(records: Mapping[str, Record], path: Path) -> None:
    """Draw dev perplexity over the seconds of a GPU, as the mean of all seeds, for each network of the table."""
    import matplotlib.pyplot as plt

    speeds = {name: record["tokens_per_second"] for name, record in records.items() if name.startswith("growth.speed.")}
    plt.rcParams["svg.fonttype"] = "none"
    picture, axes = plt.subplots(figsize=(7, 4.5))
    for stem, name in GROWTH.items():
        found = of_seeds(records, f"growth.{stem}")
        if not found or stem.endswith("_longer"):
            continue
        curves: dict[int, list[float]] = defaultdict(list)
        for record in found:
            for step, perplexity in record["dev_perplexities"].items():
                curves[int(step)].append(perplexity)
        start = re.sub(r"_(grown|redrawn|unlearned)$", "", stem)
        after = start if stem == start else "moe_32" if start == "none" else "grown"
        seconds = _seconds(sorted(curves), speeds[f"growth.speed.{start}"], speeds[f"growth.speed.{after}"])
        axes.plot(seconds, [statistics.fmean(curves[step]) for step in sorted(curves)], label=name)
    axes.set(xlabel="seconds of one H100 in steps", ylabel="dev perplexity", yscale="log", ylim=(None, 32))
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3, which="both")
    picture.tight_layout()
    picture.savefig(path, dpi=150)


def _seconds(steps: list[int], before: float, after: float) -> list[float]:
    """Return the seconds after which each step ended, from tokens per second before and after growth."""
    return [GROWTH_TOKENS * (min(step, GROWN_AT) / before + max(step - GROWN_AT, 0) / after) for step in steps]


def main() -> None:
    """Write the file and the picture."""
    path = ROOT / "results" / "small_data.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    records = read_records()
    for old in (each for each in result["tables"] if "of" in each):
        old |= TABLES[old["of"]](records)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draw_growth(records, ROOT / "docs" / "results" / PICTURE)


if __name__ == "__main__":
    main()
