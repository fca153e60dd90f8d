"""Settings of the text: where it comes from, what is dropped, how it is cut into pieces."""

from dataclasses import dataclass, field

from nmt.config.checks import at_least, one_of, plain_name

SUBWORD_KINDS = ("unigram", "bpe")
NORMALISATIONS = ("nfc", "nmt_nfkc", "nfkc", "identity")
NUM_ADDED_PIECES = 328
"""Pieces that every new vocabulary has on top of the learned ones: 4 special, 68 reserved and 256 bytes."""


@dataclass
class FilesConfig:
    """Parallel text of one split. Line n of `source` pairs with line n of `target`.

    Files may be compressed (.gz, .xz, .zst, .bz2), which is told by their content. A dataset of the hub reads no
    training text from files; dev and test may be files beside it.
    """

    source: list[str] = field(default_factory=list)
    """Text files of the source language, one sentence per line; several are read one after the other."""
    target: list[str] = field(default_factory=list)
    """Text files of the target language, in the same order."""
    pairs: list[str] = field(default_factory=list)
    """Files that hold both sides: .tsv, .csv, .jsonl or .parquet. See `columns`."""
    columns: list[str] = field(default_factory=list)
    """The two columns of `pairs`, or of a dataset of the hub, that hold source and target: by name ([source, target];
    .tsv and .csv then begin with a line of names) or by number from 1 ([1, 3]; no line of names). Empty: the columns
    that are called as the two languages, in the column `translation` if there is one; .tsv and .csv without a line of
    names must then have just two columns, source and target."""
    domains: list[str] = field(default_factory=list)
    """The kind of text in each file: one label for each of `source`, then one for each of `pairs`; empty: none.
    `nmt experts` shows which domains an expert prefers. A column `domain` in a row goes before the label."""
    from_train: int = 0
    """dev and test: hold out this many pairs of the training text instead of naming files. A function of the pairs
    alone, not of their order; no copy of them stays in the training text."""


@dataclass
class FilterConfig:
    """What a training pair must satisfy; dev and test are never filtered. 0 or false switches a filter off."""

    blank: bool = True
    """Drop pairs of which one side is blank."""
    identical: bool = False
    """Drop pairs whose two sides are the same text (untranslated lines of web corpora)."""
    duplicates: bool = False
    """Drop pairs seen before. Costs about 100 bytes of memory a pair."""
    max_words: int = 150
    """Drop pairs with more blank-separated words on either side."""
    max_length_ratio: float = 0.0
    """Drop pairs whose longer side has more than this many times the words of the shorter one."""
    max_pieces: int = 200
    """Drop pairs with more subword pieces on either side."""

    def __post_init__(self) -> None:
        for name in ("max_words", "max_length_ratio", "max_pieces"):
            at_least(f"corpus.filters.{name}", getattr(self, name), 0)


@dataclass
class SubwordConfig:
    """One SentencePiece vocabulary for both languages (GNMT section 4: a shared vocabulary makes copying trivial)."""

    kind: str = "unigram"
    """unigram or bpe."""
    vocab_size: int = 32000
    """Pieces learned from the text; 328 special, reserved and byte pieces come on top. Digits stand alone. A multiple
    of 8 keeps the softmax on the fast matrix path."""
    character_coverage: float = 1.0
    """Share of the text's characters that get a piece of their own; the rest are spelled in bytes, as is whatever a
    user types later. Below 1 for huge texts with stray characters of many scripts."""
    normalisation: str = "nfc"
    """nfc composes letters and marks, and makes control characters blanks. nmt_nfkc and nfkc lose meaning as well: m²
    becomes m2, ½ becomes 1⁄2, full-width punctuation ASCII. identity changes nothing."""
    training_sentences: int = 400000
    """Sentences, of both languages together, drawn evenly from the corpus to learn the pieces from."""

    def __post_init__(self) -> None:
        one_of("corpus.subwords.kind", self.kind, SUBWORD_KINDS)
        one_of("corpus.subwords.normalisation", self.normalisation, NORMALISATIONS)
        at_least("corpus.subwords.vocab_size", self.vocab_size, 16)
        at_least("corpus.subwords.training_sentences", self.training_sentences, 1)
        if not 0.9 <= self.character_coverage <= 1.0:
            raise ValueError(f"corpus.subwords.character_coverage={self.character_coverage} must lie in 0.9 .. 1.0")

    @property
    def num_pieces(self) -> int:
        """Pieces of a new vocabulary, the added ones included: the rows of the embeddings and the softmax."""
        return self.vocab_size + NUM_ADDED_PIECES


@dataclass
class CorpusConfig:
    """Where sentence pairs come from and how they become numbers (`nmt prepare`)."""

    name: str = "corpus"
    """Names the prepared corpus; it lies in `directory`/`name`-<fingerprint of this whole section>."""
    directory: str = "data/prepared"
    """Folder of all prepared corpora."""
    source: str = "phrasebook"
    """phrasebook (embedded), files (train/dev/test below), or a dataset of the Hugging Face hub such as wmt/wmt14,
    or a local folder laid out like one."""
    subset: str = ""
    """Hub datasets: the configuration, e.g. de-en."""
    source_language: str = "en"
    """Language code; where text has columns, the one that is called so (see `train.columns`)."""
    target_language: str = "de"
    """Language code; where text has columns, the one that is called so (see `train.columns`)."""
    root: str = ""
    """Folder that the file names below are relative to; empty: the working directory."""
    train: FilesConfig = field(default_factory=FilesConfig)
    """Training text, for `source: files`."""
    dev: FilesConfig = field(default_factory=FilesConfig)
    """Validation text: files, or held out of the training text. Empty: the split `validation` of the hub."""
    test: FilesConfig = field(default_factory=FilesConfig)
    """Test text, in the same ways. May be empty: then `nmt evaluate` wants --source and --reference."""
    max_pairs: int = 0
    """Read only this many training pairs (0: all; for the phrasebook 0 means 30,000)."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """What is dropped from the training text."""
    subwords: SubwordConfig = field(default_factory=SubwordConfig)
    """The vocabulary."""

    def __post_init__(self) -> None:
        at_least("corpus.max_pairs", self.max_pairs, 0)
        plain_name("corpus.name", self.name)
        if not self.name:
            raise ValueError("corpus.name is empty: it becomes a folder")
        for side in ("source_language", "target_language"):
            if not getattr(self, side):
                raise ValueError(f"corpus.{side} is empty: give a code of your choice, such as en")
        if self.source_language == self.target_language:
            raise ValueError(f"corpus.source_language and corpus.target_language are both {self.source_language!r}")
        for split in ("train", "dev", "test"):
            files: FilesConfig = getattr(self, split)
            _check_files(f"corpus.{split}", files)
            has_columns = files.pairs or (self.source not in ("files", "phrasebook") and not files.source)
            if files.columns and not has_columns:
                raise ValueError(
                    f"corpus.{split}.columns=[{', '.join(files.columns)}] is for corpus.{split}.pairs, which names no "
                    "file: name it there, or empty the columns"
                )
        if self.train.from_train:
            raise ValueError("corpus.train.from_train must be 0: it is dev and test that are held out of train")


def _check_files(key: str, files: FilesConfig) -> None:
    """ValueError for settings of one split that contradict each other."""
    at_least(f"{key}.from_train", files.from_train, 0)
    if bool(files.source) != bool(files.target):
        lacking, given = ("target", "source") if files.source else ("source", "target")
        raise ValueError(f"{key}.{lacking} is empty, but {key}.{given} is not: name its files")
    if files.from_train and (files.source or files.pairs):
        raise ValueError(f"{key} names files and has from_train={files.from_train}: choose one of the two")
    if files.columns:
        numbers = [column.isascii() and column.isdigit() for column in files.columns]
        if len(files.columns) != 2 or any(numbers) != all(numbers) or files.columns[0] == files.columns[1]:
            raise ValueError(
                f"{key}.columns=[{', '.join(files.columns)}] must be the column of the source and that of the target, "
                "as two names or as two numbers"
            )
        if all(numbers) and "0" in (column.lstrip("0") or "0" for column in files.columns):
            raise ValueError(f"{key}.columns=[{', '.join(files.columns)}]: columns are counted from 1")
    num_files = len(files.source) + len(files.pairs)
    if files.domains and len(files.domains) != num_files:
        raise ValueError(
            f"{key}.domains has {len(files.domains)} labels for {num_files} files: give one for each of {key}.source, "
            f"then one for each of {key}.pairs"
        )
