"""A folder laid out like the dataset wmt/wmt14 of the Hugging Face hub, from parallel text files: no network needed.

    python scripts/make_wmt14_mirror.py mirror --languages en de --subset de-en \\
        --train commoncrawl.en.gz commoncrawl.de.gz --train europarl.en.gz europarl.de.gz \\
        --dev newstest2013.en newstest2013.de --test newstest2014.en newstest2014.de
    nmt prepare corpus=wmt14_en_de corpus.source=mirror

The folder holds <subset>/{train,validation,test}-00000-of-00001.parquet with the one column `translation`, a struct of
language -> text, and a README.md that tells the `datasets` library which files belong to which configuration. Further
subsets may be written into the same folder: the README then lists all of them.
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

# Pairs of one row group: what is in memory at a time.
_GROUP_ROWS = 100_000


def corpus_of(options: argparse.Namespace) -> CorpusConfig:
    """The text files as a corpus, so that they are read by the rules of `nmt prepare`: lines, compression, encoding."""
    source, target = options.languages
    corpus = CorpusConfig(source="files", source_language=source, target_language=target, max_pairs=options.max_pairs)
    for split in HUB_SPLITS:
        sides = zip(*getattr(options, split), strict=True)
        setattr(corpus, split, FilesConfig(*(list(files) for files in sides)))
    return corpus


def schema_of(languages: list[str]) -> pa.Schema:
    """The hub's schema: the struct, and the features in the metadata where the `datasets` library looks for them."""
    features = {"translation": {"languages": languages, "_type": "Translation"}}
    struct = pa.struct([(language, pa.string()) for language in languages])
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([("translation", struct)], metadata=metadata)


def write_split(path: Path, pairs: Iterator[SentencePair], languages: tuple[str, str], schema: pa.Schema) -> int:
    """Write pairs of (source, target) languages to a parquet file; returns how many. No file stays if none came."""
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
    """The dataset card's front matter, which lists a configuration for every subfolder with training text."""
    lines = ["---", "configs:"]
    for subset in sorted(path.parent.name for path in folder.glob("*/train-00000-of-00001.parquet")):
        lines += [f"- config_name: {subset}", "  data_files:"]
        for split in HUB_SPLITS.values():
            if any((folder / subset).glob(f"{split}-*.parquet")):
                lines += [f"  - split: {split}", f"    path: {subset}/{split}-*"]
    return "\n".join([*lines, "---", "", "Made by make_wmt14_mirror.py from local text, laid out like wmt/wmt14.", ""])


def make_mirror(options: argparse.Namespace) -> dict[str, int]:
    """Write every split that has files; returns its number of pairs by the hub's name of the split."""
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
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="FOLDER", help="the mirror, made if it is not there")
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
    """Write the mirror and say what is in it."""
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
