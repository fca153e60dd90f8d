"""Make a folder with the layout of the hub's dataset wmt/wmt14 from parallel text files. Needs no network.

    python scripts/make_wmt14_mirror.py mirror --languages en de --subset de-en \\
        --train commoncrawl.en.gz commoncrawl.de.gz --train europarl.en.gz europarl.de.gz \\
        --dev newstest2013.en newstest2013.de --test newstest2014.en newstest2014.de
    nmt prepare corpus=wmt14_en_de corpus.source=mirror

The folder contains <subset>/{train,validation,test}-00000-of-00001.parquet with one column, `translation`, a struct of
language -> text. Its README.md lists the files of each configuration for the `datasets` library. You can write further
subsets into the same folder; the README.md then lists all of them.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nmt.config import CorpusConfig, FilesConfig
from nmt.corpus.hub import HUB_SPLITS
from nmt.corpus.pairs import SentencePair
from nmt.corpus.sources import read_pairs
from nmt.errors import DataError
from nmt.files import replacing

# Pairs per row group, which are in memory at the same time.
_GROUP_ROWS = 100_000


def corpus_of(options: argparse.Namespace) -> CorpusConfig:
    """Return the text files as a corpus, read by the rules of `nmt prepare` for lines, compression and encoding."""
    source, target = options.languages
    corpus = CorpusConfig(source="files", source_language=source, target_language=target, max_pairs=options.max_pairs)
    for split in HUB_SPLITS:
        sides = zip(*getattr(options, split), strict=True)
        setattr(corpus, split, FilesConfig(*(list(files) for files in sides)))
    return corpus


def schema_of(languages: list[str]) -> pa.Schema:
    """Return the hub's schema: the struct, and its features in the metadata that the `datasets` library reads."""
    features = {"translation": {"languages": languages, "_type": "Translation"}}
    struct = pa.struct([(language, pa.string()) for language in languages])
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([("translation", struct)], metadata=metadata)


def write_split(path: Path, pairs: Iterator[SentencePair], languages: tuple[str, str], schema: pa.Schema) -> int:
    """Write pairs of (source, target) languages to a Parquet file and return their number. Without pairs, no file."""
    source, target = languages
    struct = schema.field("translation").type
    num_pairs = 0
    group = list(itertools.islice(pairs, _GROUP_ROWS))
    if not group:
        return 0
    with replacing(path) as stream, pq.ParquetWriter(stream, schema) as writer:
        while group:
            rows = [{source: pair.source, target: pair.target} for pair in group]
            writer.write_table(pa.table([pa.array(rows, struct)], schema=schema))
            num_pairs += len(group)
            group = list(itertools.islice(pairs, _GROUP_ROWS))
    return num_pairs


def readme(folder: Path) -> str:
    """Return the dataset card's front matter, with a configuration for every subfolder with training text."""
    lines = ["---", "configs:"]
    for subset in sorted(path.parent.name for path in folder.glob("*/train-00000-of-00001.parquet")):
        lines += [f"- config_name: {subset}", "  data_files:"]
        for split in HUB_SPLITS.values():
            if any((folder / subset).glob(f"{split}-*.parquet")):
                lines += [f"  - split: {split}", f"    path: {subset}/{split}-*"]
    return "\n".join([*lines, "---", "", "Made by make_wmt14_mirror.py from local text, laid out like wmt/wmt14.", ""])


def make_mirror(options: argparse.Namespace) -> dict[str, int]:
    """Write every split that has files. Returns the number of pairs by the hub's name of the split."""
    corpus = corpus_of(options)
    languages = options.subset.split("-")
    if sorted(languages) != sorted(options.languages):
        raise DataError(f"--subset {options.subset} does not name the languages {' and '.join(options.languages)}")
    folder = options.out / options.subset
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split, hub_split in HUB_SPLITS.items():
        path = folder / f"{hub_split}-00000-of-00001.parquet"
        path.unlink(missing_ok=True)
        if getattr(options, split):
            pairs = read_pairs(corpus, split)
            counts[hub_split] = write_split(path, pairs, tuple(options.languages), schema_of(languages))
    (options.out / "README.md").write_text(readme(options.out), encoding="utf-8")
    return counts


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="FOLDER", help="the mirror, created if missing")
    for split, required in (("train", True), ("dev", True), ("test", False)):
        parser.add_argument(
            f"--{split}",
            nargs=2,
            action="append",
            default=[],
            required=required,
            metavar=("SRC", "TGT"),
            help=f"parallel {split} text, plain or .gz, .xz, .zst; may be given several times",
        )
    parser.add_argument("--languages", nargs=2, default=["en", "de"], metavar=("SRC", "TGT"), help="default: en de")
    parser.add_argument("--subset", default="de-en", help="the hub's configuration: de-en (default), fr-en, ...")
    parser.add_argument("--max-pairs", type=int, default=0, metavar="N", help="only the first N training pairs")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Write the mirror and print what it contains."""
    options = parse(arguments)
    try:
        counts = make_mirror(options)
    except (ValueError, OSError) as error:
        print(f"make_wmt14_mirror: {error}", file=sys.stderr)
        return 3
    for split, num_pairs in counts.items():
        print(f"{options.subset} {split}: {num_pairs:,} pairs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
