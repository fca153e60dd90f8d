"""Read files of pairs row by row: .tsv, .csv, .jsonl, .tmx and .parquet."""

import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nmt.corpus.pairs import Columns, ReadReport, SentencePair, ending
from nmt.corpus.segments import read_tmx
from nmt.errors import DataError
from nmt.textfile import MOST_BYTES, TextReader, open_input, open_text

ENDINGS = (".tsv", ".csv", ".jsonl", ".tmx", ".parquet")
_ROWS = 1000
# No text of a language compresses like this. Data that do could fill the memory with a single cell.
_MOST_SHRUNK = 200
_HARMLESS_BYTES = 1 << 26
_SHARED_BYTES = 1 << 26  # of texts in memory at a time


def read_table(path: Path, key: str, columns: Columns, report: ReadReport) -> Iterator[SentencePair]:
    """Yield the pairs of one file, named by the setting `key`. Blank rows and rows with a null are only counted.

    Raises DataError, with the file and the line or row, for what cannot be read.
    """
    kind = ending(path)
    where = f"{key}: {path}"
    if path.suffix.lower() == ".parquet":
        yield from _parquet(path, key, columns, report)
        return
    if kind == ".tmx":
        yield from (SentencePair(*texts) for texts in read_tmx(path, key, columns.languages, report))
        return
    if kind not in ENDINGS[:3]:
        raise DataError(
            f"{where} must end in .tsv, .csv, .jsonl or .tmx (each also with .gz, .xz, .zst or .bz2) or .parquet"
        )
    with open_text(path, key, several=True) as lines:
        try:
            if kind == ".jsonl":
                yield from _objects(lines, where, columns, report)
            else:
                fields = _tsv(lines) if kind == ".tsv" else _csv(lines, where)
                yield from _delimited(fields, where, columns, report)
        finally:  # also if the caller stops early
            report.invalid_lines += lines.num_invalid


# ------------------------------------------------------------------------------------------- .tsv and .csv


def _tsv(lines: TextReader) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the line, fields). Quotation marks have no special meaning."""
    for number, line in enumerate(lines, start=1):
        yield number, line.split("\t")


def _csv(lines: TextReader, where: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the last line of a row, fields), by RFC 4180: fields in quotation marks may contain line ends.

    Commas separate fields, or semicolons if the first line has semicolons and no comma.
    """
    texts = iter(lines)
    first = next(texts, None)
    if first is None:
        return
    delimiter = ";" if ";" in first and "," not in first else ","
    # A missing quotation mark would turn the rest of the file into one field, but the library allows 128 KiB at most.
    rows = csv.reader((f"{line}\n" for line in itertools.chain([first], texts)), delimiter=delimiter, strict=True)
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise DataError(
                f"{where} line {rows.line_num}: not valid CSV ({error}): correct its quotation marks"
            ) from error
        if row is None:
            return
        yield rows.line_num, [field.replace("\n", " ") for field in row]


def _delimited(
    rows: Iterator[tuple[int, list[str]]], where: str, columns: Columns, report: ReadReport
) -> Iterator[SentencePair]:
    places: tuple[int, ...] = ()
    for number, row in rows:
        if not any(field.strip() for field in row):
            report.empty_rows += 1
            continue
        if not places:
            places, is_header = _places(row, f"{where} line {number}", columns)
            if is_header:
                report.notes.append(f"{where}: its first line was read as column names")
                continue
        if len(row) <= max(places) or (len(row) != 2 and not columns.given and max(places) == 1):
            wanted = f"for {columns}" if columns.given else "instead of the two of the first line"
            raise DataError(f"{where} line {number}: {len(row)} columns {wanted}: correct or remove the line")
        yield SentencePair(row[places[0]], row[places[1]])


def _places(first: list[str], where: str, columns: Columns) -> tuple[tuple[int, ...], bool]:
    """Return (places of source and target, whether the first row contains column names)."""
    if columns.numbers:
        return columns.numbers, False
    names = [name.strip() for name in first]
    lower = [name.lower() for name in names]
    if columns.given:
        missing = [name for name in columns.names if name not in names]
        if missing:
            raise DataError(
                f"{where}: no column {missing[0]} of {columns} among {', '.join(names)[:200]}: the first line must "
                "name the columns; without such a line, choose them by number"
            )
        return tuple(map(names.index, columns.names)), True
    for pair in (tuple(map(str.lower, columns.names)), ("source", "target")):
        if all(name in lower for name in pair):
            return tuple(map(lower.index, pair)), True
    if len(first) != 2:
        raise DataError(f"{where}: {len(first)} columns instead of source and target: {columns.remedy}, such as [1, 2]")
    return (0, 1), False


# ------------------------------------------------------------------------------------------ .jsonl, .parquet


def _objects(lines: TextReader, where: str, columns: Columns, report: ReadReport) -> Iterator[SentencePair]:
    for number, line in enumerate(lines, start=1):
        row = None
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{where} line {number}: not valid JSON ({error}): a line must be one object"
                ) from error
        if isinstance(row, list):  # columns of an array are numbered
            row = {str(place): value for place, value in enumerate(row, start=1)}
        pair = columns.pair(row, (columns.names[0], columns.names[1]), f"{where} line {number}", report)
        if pair:
            yield pair


def _parquet(path: Path, key: str, columns: Columns, report: ReadReport) -> Iterator[SentencePair]:
    from pyarrow import ArrowException, parquet

    where = f"{key}: {path}"
    number = 0
    try:
        with open_input(path, key) as stream:
            file = parquet.ParquetFile(stream)
            names, leaves = _leaves(file.schema_arrow, columns, where)
            _check_cells(file.metadata, leaves, where)
            for batch in _batches(file, stream, leaves):
                rows = f"{where} rows {number + 1} to {number + batch.num_rows}"
                texts = {name: _texts(array, rows) for name, array in _flat(batch)}
                for cells in zip(*texts.values(), strict=True):
                    number += 1
                    row = dict(zip(texts, cells, strict=True))
                    pair = columns.pair(row, names, f"{where} row {number}", report)
                    if pair:
                        yield pair
    except (ArrowException, OSError) as error:
        reason = str(error).split("\n", 1)[0]
        raise DataError(f"{where} is damaged or not a Parquet file ({reason}): get it again") from error


def _batches(file: Any, stream: BinaryIO, leaves: list[str]) -> Iterator[Any]:
    """Yield the rows of a file, so few at a time that their texts fit in memory."""
    from pyarrow import parquet

    # Read as dictionaries: a long text that many rows share is then in memory once.
    shared = parquet.ParquetFile(stream, metadata=file.metadata, read_dictionary=leaves)
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        columns = [group.column(place) for place in range(group.num_columns)]
        size = max(each.total_uncompressed_size for each in columns if each.path_in_schema in leaves)
        longest = max(1, size // max(1, group.num_rows))  # the average, a lower bound
        if size * min(_ROWS, group.num_rows) > _SHARED_BYTES:
            for first in itertools.islice(shared.iter_batches(1, [number], leaves), 1):
                longest = max(longest, *(_longest(array) for _, array in _flat(first)))
        yield from file.iter_batches(min(_ROWS, max(1, _SHARED_BYTES // longest)), [number], leaves)


def _longest(array: Any) -> int:
    """Return the bytes of the longest text of a column, or of its dictionary if it is dictionary-encoded."""
    from pyarrow import compute

    return compute.max(compute.binary_length(getattr(array, "dictionary", array))).as_py() or 0


def _check_cells(metadata: Any, leaves: list[str], where: str) -> None:
    """Raise DataError if a column of `leaves` is far larger in memory than in the file, which no text is."""
    for group in range(metadata.num_row_groups):
        for place in range(metadata.num_columns):
            column = metadata.row_group(group).column(place)
            size = column.total_uncompressed_size
            if (
                column.path_in_schema in leaves
                and size > _HARMLESS_BYTES
                and size > _MOST_SHRUNK * column.total_compressed_size
            ):
                raise DataError(
                    f"{where}: column {column.path_in_schema} expands from {column.total_compressed_size:,} to "
                    f"{size:,} bytes: this is not text; remove the file"
                )


def _leaves(schema: Any, columns: Columns, where: str) -> tuple[tuple[str, str], list[str]]:
    """Return (names of the two columns, columns to read). Raises DataError if one is missing or not text."""
    from pyarrow import types

    nested = "translation" in schema.names and types.is_struct(schema.field("translation").type)
    fields = {field.name: field for field in (schema.field("translation").type if nested else schema)}
    names = columns.named(list(fields), where)
    columns.check(names, list(fields), where)
    for name in names:
        if not _is_text(fields[name].type):
            raise DataError(f"{where}: column {name} is {fields[name].type}, not text: {columns.remedy}")
    leaves = [f"translation.{name}" if nested else name for name in names]
    has_domains = "domain" in schema.names and "domain" not in names and _is_text(schema.field("domain").type)
    return names, [*leaves, *(["domain"] if has_domains else [])]


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    kinds = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return any(is_it(kind) for is_it in kinds)


def _flat(batch: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, array) for each column, with the fields of `translation` as columns."""
    for name in batch.schema.names:
        array = batch.column(name)
        if name == "translation" and hasattr(array.type, "num_fields") and array.type.num_fields:
            children = (array.type.field(place).name for place in range(array.type.num_fields))
            yield from zip(children, array.flatten(), strict=True)
        else:
            yield name, array


def _texts(array: Any, where: str) -> list[Any]:
    """Return the cells of a column. Raises DataError if one is longer than a line may be."""
    if _longest(array) > MOST_BYTES:
        raise DataError(f"{where}: a text has more than {MOST_BYTES:,} bytes: a text is one sentence; remove it")
    return array.to_pylist()
