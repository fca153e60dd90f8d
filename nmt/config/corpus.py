"""Settings of the corpus: where text comes from, which pairs are dropped, how text is split into subwords."""

import re
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from nmt.config.checks import above, at_least, fraction, one_of, plain_name
from nmt.config.filters import FilterConfig

SPLITS = ("train", "dev", "test")
SUBWORD_KINDS = ("unigram", "bpe")
NORMALISATIONS = ("nfc", "nmt_nfkc", "nfkc", "identity")
PUNCTUATIONS = ("keep", "moses")
NUM_ADDED_PIECES = 328
"""Pieces that every new vocabulary has in addition to the learned ones: 4 special, 68 reserved and 256 bytes."""
MOST_LANGUAGES = 32
"""Target languages of a corpus at most: each has a reserved symbol of the vocabulary."""
MOST_TAGS = 8
"""Tags of a corpus at most, likewise."""
# Languages and tags are parts of names of files.
_PLAIN = re.compile(r"[A-Za-z0-9_]+")


class Direction(NamedTuple):
    """From a source language to a target language, by their codes. As text, "en-de"."""

    source: str
    target: str

    @classmethod
    def of(cls, text: str) -> "Direction":
        """Return the direction of a text such as "en-de". ValueError if it is not two different codes and a hyphen."""
        source, hyphen, target = text.partition("-")
        if not (source and hyphen and target) or "-" in target or source == target:
            raise ValueError(
                f"{text!r} is not a direction: give two different language codes, such as en-de or en-pt_BR"
            )
        return cls(source, target)

    @property
    def reverse(self) -> "Direction":
        """The direction between the same languages the other way."""
        return Direction(self.target, self.source)

    def __str__(self) -> str:
        return f"{self.source}-{self.target}"


@dataclass
class FilesConfig:
    """Parallel text of one split. Line n of `source` pairs with line n of `target`.

    Files may be compressed (.gz, .xz, .zst, .bz2); the compression is detected from their content. With a dataset of
    the hub, dev and test can come from files, but training text cannot.
    """

    source: list[str] = field(default_factory=list)
    """Text files in the source language, one sentence per line. Several files are read one after the other."""
    target: list[str] = field(default_factory=list)
    """Text files in the target language, in the same order."""
    pairs: list[str] = field(default_factory=list)
    """Files with both sides: .tsv, .csv, .jsonl, .parquet or .tmx. See `columns`."""
    columns: list[str] = field(default_factory=list)
    """Source column and target column of `pairs` or of a dataset of the hub. Give two names, such as [source, target];
    .tsv and .csv files must then start with a line of names. Or give two numbers counted from 1, such as [1, 3], for
    files without a line of names. Empty: the columns named after the two languages, inside the column `translation` if
    there is one. A .tsv or .csv file without a line of names must then have two columns, source and target."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Text files of each language, for `corpus.directions`: {en: [a.en, b.en], de: [a.de, b.de]}. Line n of all
    languages belongs together; where a line is blank, that language is missing. Each language has as many files as the
    others. Languages of no direction are not read."""
    domains: list[str] = field(default_factory=list)
    """Kind of text in each file: one label per file of `source`, then one per file of `pairs`; or one per file of each
    language of `texts`; empty: none. `nmt experts` shows which domains an expert prefers. A column `domain` overrides
    the label."""
    tags: list[str] = field(default_factory=list)
    """For train: tag of each file, in the order of `domains`, such as ["", bt] if the second one is back-translated;
    empty: none. Each source of such a file begins with the symbol of its tag, so that the model can distinguish origins
    or domains. There are 8 tags at most."""
    scores: list[str] = field(default_factory=list)
    """For train: what `nmt score` wrote for each file of `source` and `target`, in the same order: a log-probability
    per line. `corpus.filters.min_score` drops pairs by it."""
    from_train: int = 0
    """For dev and test: hold out this many pairs of the training text instead of naming files. The choice depends on
    the pairs, not on their order. All copies of these pairs are removed from the training text."""


@dataclass
class SubwordConfig:
    """One SentencePiece vocabulary for both languages (GNMT section 4: a shared vocabulary makes copying trivial)."""

    kind: str = "unigram"
    """Method of segmentation: unigram or bpe."""
    vocab_size: int = 32000
    """Number of subwords learned from the text; 328 special, reserved and byte pieces are added. Every digit is a
    subword by itself. With a multiple of 8, the softmax uses the fast matrix products of a GPU."""
    character_coverage: float = 1.0
    """Share of the text's characters that are subwords themselves. All other characters are encoded as bytes, also when
    translating. Choose less than 1 for huge texts with stray characters of many scripts."""
    normalisation: str = "nfc"
    """nfc composes letters and marks, and replaces control characters with blanks. nmt_nfkc and nfkc also lose meaning:
    m² becomes m2, ½ becomes 1⁄2, and full-width punctuation becomes ASCII. identity changes nothing."""
    training_sentences: int = 400000
    """Number of sentences, of both languages together, that the subwords are learned from. They are drawn evenly from
    the corpus."""
    vocabulary: str = "auto"
    """learn: a vocabulary learned from the training text. Or the vocabulary of a run, an exported model, a prepared
    corpus (folder) or a .model file, taken as it is with the meanings of its symbols. Settings of learning, such as
    vocab_size, then have no effect. auto: that of `run.start_from` if it is set, else learn."""
    sampling: float = 0.0
    """0: training text always has the same subwords. Above 0: they are drawn anew in each epoch. With a vocabulary of
    kind bpe, this is the probability that a merge is left out (BPE-dropout, Provilkov et al. 2020); 0.1 is usual. With
    one of kind unigram, it is the exponent alpha of the probability of a segmentation (Kudo 2018). There, 0.2 is usual,
    and smaller numbers give more variety."""

    @property
    def inherits(self) -> bool:
        """Whether the vocabulary is taken from elsewhere."""
        return self.vocabulary not in ("auto", "learn")

    def __post_init__(self) -> None:
        if not self.vocabulary:
            raise ValueError("corpus.subwords.vocabulary is empty: give auto, learn, a run, a corpus or a .model file")
        one_of("corpus.subwords.kind", self.kind, SUBWORD_KINDS)
        one_of("corpus.subwords.normalisation", self.normalisation, NORMALISATIONS)
        at_least("corpus.subwords.vocab_size", self.vocab_size, 16)
        at_least("corpus.subwords.training_sentences", self.training_sentences, 1)
        if not 0.98 <= self.character_coverage <= 1.0:  # SentencePiece learns with no less
            raise ValueError(f"corpus.subwords.character_coverage={self.character_coverage} must lie in 0.98 .. 1.0")
        fraction("corpus.subwords.sampling", self.sampling)

    @property
    def num_pieces(self) -> int:
        """Size of a new vocabulary, added pieces included: the rows of the embeddings and the softmax."""
        return self.vocab_size + NUM_ADDED_PIECES


@dataclass
class ExamplesConfig:
    """Training pairs that are rewritten: with the vocabulary's reserved symbols, or as other texts are written.

    A pair is rewritten in one way at most. A share is the part of all pairs that are tried. Pairs without a suitable
    place stay as they are, and so do dev and test.
    """

    slots: float = 0.0
    """Share of pairs where a span that is equal on both sides, such as a number, a name or a URL, becomes a slot symbol
    on both sides. The model then keeps placeholders in their place. 0: none; 0.1 to 0.3 are useful."""
    terms: float = 0.0
    """Share of pairs where a source word is marked with its translation, found by counting which words occur together.
    The model then uses the translations of `nmt translate --terms`. 0: none; 0.1 to 0.3 are useful."""

    quoted: float = 0.0
    """Share of pairs with quotation marks, ", around both sides. Speeches and captions have few quotes, news have many;
    0.02 is useful."""
    title_case: float = 0.0
    """Share of pairs whose source is written Like a Headline in English. The target stays as it is, because other
    languages do not write headlines so."""
    lower_case: float = 0.0
    """Share of pairs whose source is in lower case, as people type. The target stays as it is."""
    upper_case: float = 0.0
    """Share of pairs with both sides in upper case, so that THE TRANSLATION OF SUCH A TEXT is in upper case too."""

    def __post_init__(self) -> None:
        shares = {each.name: getattr(self, each.name) for each in fields(self)}
        for name, share in shares.items():
            fraction(f"corpus.examples.{name}", share)
        if sum(shares.values()) > 1.0:
            given = " and ".join(f"corpus.examples.{name}={share:g}" for name, share in shares.items() if share)
            raise ValueError(f"{given} are more than 1 together: lower them")


@dataclass
class CorpusConfig:
    """Where sentence pairs come from and how they are encoded (`nmt prepare`)."""

    name: str = "corpus"
    """Name of the prepared corpus. Its folder is `directory`/`name`-<fingerprint of this whole section>."""
    directory: str = "data/prepared"
    """Folder that contains all prepared corpora."""
    source: str = "phrasebook"
    """Where text comes from: phrasebook (embedded in the program), or files (named in train, dev and test). Or name a
    dataset of the Hugging Face hub such as wmt/wmt14, or a local folder with the layout of one."""
    subset: str = ""
    """Configuration of a dataset of the hub, such as de-en."""
    source_language: str = "en"
    """Language code. In text with columns, also the default name of the source column (see `train.columns`)."""
    target_language: str = "de"
    """Language code. In text with columns, also the default name of the target column (see `train.columns`)."""
    directions: list[str] = field(default_factory=list)
    """Directions of one model of many languages, such as [en-de, de-en, en-fr]; empty: source_language to
    target_language. Text comes from `texts` of the splits, or from the phrasebook. Text in two languages can also come
    from elsewhere; the two languages above then say which side is which. A symbol before each source names its target
    language."""
    root: str = ""
    """Folder that the file names below are relative to; empty: the working directory."""
    train: FilesConfig = field(default_factory=FilesConfig)
    """Training text, for `source: files`."""
    dev: FilesConfig = field(default_factory=FilesConfig)
    """Validation text: files, or pairs held out of the training text. Empty: the split `validation` of the hub."""
    test: FilesConfig = field(default_factory=FilesConfig)
    """Test text, given like `dev`. Empty: the split `test` of the hub, or none; `nmt evaluate` then needs --source and
    --reference."""
    max_pairs: int = 0
    """Maximum number of training pairs to read, or of lines of `texts`; 0: all, or 30,000 of the phrasebook."""
    punctuation: str = "keep"
    """keep: punctuation stays as written. moses: as Moses' normalize-punctuation.perl writes it, with ASCII quotes,
    apostrophes and dashes. Then both sides of training text are normalised, and everything that the model reads."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    subwords: SubwordConfig = field(default_factory=SubwordConfig)
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)
    mixture: dict[str, float] = field(default_factory=dict)
    """Other corpora that a run is trained on together with this one, with their weights. With {general: 1}, the corpus
    of the run general is mixed in, one pair of it for one of this corpus. A name is that of a run or the path of a
    prepared folder. All have the same vocabulary."""
    weight: float = 1.0
    """Weight of this corpus in the mixture. With {general: 1} and 3 here, there are three pairs of this corpus for one
    of general. Weights that are the numbers of pairs use each pair once per epoch."""
    temperature: float = 1.0
    """T: within a corpus of several directions or tags, a part of n pairs has a share in proportion to n^(1/T). 1: each
    pair is used as often as any other. Higher values give small parts more: 5 is usual for many languages (Arivazhagan
    et al. 2019)."""

    @property
    def sides(self) -> Direction:
        """Languages of the two sides of text that is not in `texts`."""
        return Direction(self.source_language, self.target_language)

    @property
    def direction(self) -> Direction:
        """The direction of a corpus that has a single one, else the first."""
        return self.all_directions()[0]

    def all_directions(self) -> list[Direction]:
        """Return the directions of the corpus: one for a corpus in two languages."""
        return [Direction.of(text) for text in self.directions] or [self.sides]

    def language_pairs(self) -> list[Direction]:
        """Return one direction for each pair of languages: the first of its directions. Text is stored in these."""
        found: list[Direction] = []
        for direction in self.all_directions():
            if direction not in found and direction.reverse not in found:
                found.append(direction)
        return found

    @property
    def languages(self) -> list[str]:
        """Languages of all directions, in order of first appearance."""
        return list(dict.fromkeys(language for direction in self.all_directions() for language in direction))

    def __post_init__(self) -> None:
        at_least("corpus.max_pairs", self.max_pairs, 0)
        at_least("corpus.temperature", self.temperature, 1)
        one_of("corpus.punctuation", self.punctuation, PUNCTUATIONS)
        self._check_weights()
        plain_name("corpus.name", self.name)
        if not self.name:
            raise ValueError("corpus.name is empty: it becomes a folder")
        for side in ("source_language", "target_language"):
            if not getattr(self, side):
                raise ValueError(f"corpus.{side} is empty: give a code of your choice, such as en")
        if self.source_language == self.target_language:
            raise ValueError(f"corpus.source_language and corpus.target_language are both {self.source_language!r}")
        for split in SPLITS:
            files: FilesConfig = getattr(self, split)
            _check_files(f"corpus.{split}", files)
            has_columns = files.pairs or self._is_of_hub(files)
            if files.columns and not has_columns:
                raise ValueError(
                    f"corpus.{split}.columns=[{', '.join(files.columns)}] is for corpus.{split}.pairs, which is empty: "
                    "name a file there, or leave out the columns"
                )
        if self.train.from_train:
            raise ValueError("corpus.train.from_train must be 0: only dev and test can be held out of train")
        self._check_tags()
        self._check_directions()

    def _is_of_hub(self, files: FilesConfig) -> bool:
        return self.source not in ("files", "phrasebook") and not (files.source or files.texts)

    def _check_tags(self) -> None:
        for split in ("dev", "test"):
            files: FilesConfig = getattr(self, split)
            if files.tags:
                raise ValueError(f"corpus.{split}.tags must be empty: only training text has tags")
            if files.from_train and self.train.tags and "" not in self.train.tags:
                raise ValueError(
                    f"corpus.{split}.from_train={files.from_train} holds out pairs without a tag, but in "
                    f"corpus.train.tags every file has one: name files in corpus.{split}"
                )
        tags = {tag for tag in self.train.tags if tag}
        if odd := sorted(tag for tag in tags if not _PLAIN.fullmatch(tag)):
            raise ValueError(f"corpus.train.tags: {odd[0]!r} must be of letters, digits and _")
        if len(tags) > MOST_TAGS:
            raise ValueError(f"corpus.train.tags has {len(tags)} different tags: {MOST_TAGS} at most have a symbol")

    def _check_directions(self) -> None:
        given = f"corpus.directions=[{', '.join(self.directions)}]"
        if not self.directions:
            for split in SPLITS:
                if getattr(self, split).texts:
                    raise ValueError(
                        f"corpus.{split}.texts is for corpus.directions, which is empty: name directions there, such "
                        "as [en-de, de-en], or name the files in source and target"
                    )
            return
        for number, text in enumerate(self.directions):
            try:
                direction = Direction.of(text)
            except ValueError as error:
                raise ValueError(f"corpus.directions: {error}") from error
            if odd := [language for language in direction if not _PLAIN.fullmatch(language)]:
                raise ValueError(f"corpus.directions: language {odd[0]!r} must be of letters, digits and _")
            if text in self.directions[:number]:
                raise ValueError(f"{given} has {text} twice")
        if (count := len({direction.target for direction in self.all_directions()})) > MOST_LANGUAGES:
            raise ValueError(f"corpus.directions has {count} target languages: {MOST_LANGUAGES} at most have a symbol")
        for name in ("terms", "title_case", "lower_case"):
            if share := getattr(self.examples, name):
                raise ValueError(
                    f"corpus.examples.{name}={share:g} rewrites the source side of a text that {given} may use both "
                    "ways: set it to 0"
                )
        for split in SPLITS:
            self._check_languages(split, given)

    def _check_languages(self, split: str, given: str) -> None:
        """Raise ValueError if the text of a split is not in the languages of the directions."""
        files: FilesConfig = getattr(self, split)
        if files.from_train and len(self.languages) > 2:
            raise ValueError(
                f"corpus.{split}.from_train={files.from_train} holds out pairs, but {given} has {len(self.languages)} "
                f"languages: name files in corpus.{split}.texts"
            )
        if lacking := [language for language in self.languages if files.texts and language not in files.texts]:
            raise ValueError(f"corpus.{split}.texts has no files of {lacking[0]}, a language of {given}")
        in_two = bool(files.source or files.pairs) or self._is_of_hub(files)
        if in_two and not files.from_train and set(self.languages) != set(self.sides):
            raise ValueError(
                f"corpus.{split} is text in corpus.source_language={self.source_language} and corpus.target_language="
                f"{self.target_language}, which are not the languages of {given}: set these two, or name the files of "
                f"each language in corpus.{split}.texts"
            )

    def _check_weights(self) -> None:
        for reference, weight in self.mixture.items():
            above(f"corpus.mixture.{reference}", weight, 0.0)
        above("corpus.weight", self.weight, 0.0)
        if self.weight != 1.0 and not self.mixture:
            raise ValueError(
                f"corpus.weight={self.weight:g} is the weight of this corpus beside those of corpus.mixture, which is "
                "empty: name another corpus there, such as {general: 1}, or leave out the weight"
            )


def _check_files(key: str, files: FilesConfig) -> None:
    """Raise ValueError if settings of one split contradict each other."""
    if files.scores and (len(files.scores) != len(files.source) or key != "corpus.train"):
        raise ValueError(
            f"{key}.scores names {len(files.scores)} files for {len(files.source)} of {key}.source: give one for each, "
            "for training text only"
        )
    at_least(f"{key}.from_train", files.from_train, 0)
    if bool(files.source) != bool(files.target):
        lacking, given = ("target", "source") if files.source else ("source", "target")
        raise ValueError(f"{key}.{lacking} is empty, but {key}.{given} is not: name its files")
    if files.texts and (files.source or files.pairs):
        raise ValueError(
            f"{key}.texts and {key}.{'source' if files.source else 'pairs'} name files: choose one of the two"
        )
    if files.from_train and (files.source or files.pairs or files.texts):
        raise ValueError(f"{key} names files and has from_train={files.from_train}: choose one of the two")
    if files.columns:
        numbers = [column.isascii() and column.isdigit() for column in files.columns]
        if len(files.columns) != 2 or any(numbers) != all(numbers) or files.columns[0] == files.columns[1]:
            raise ValueError(
                f"{key}.columns=[{', '.join(files.columns)}] must be the source column and the target column, as two "
                "names or as two numbers"
            )
        if all(numbers) and "0" in (column.lstrip("0") or "0" for column in files.columns):
            raise ValueError(f"{key}.columns=[{', '.join(files.columns)}]: columns are counted from 1")
    counts = {language: len(names) for language, names in files.texts.items()}
    first = next(iter(counts), "")
    for language, count in counts.items():
        if not count:
            raise ValueError(f"{key}.texts.{language} is empty: name its files, or leave {language} out")
        if count != counts[first]:
            raise ValueError(
                f"{key}.texts has {count} files of {language} but {counts[first]} of {first}: give as many of each, "
                "since line n of a file belongs to line n of its counterparts"
            )
    num_files = len(files.source) + len(files.pairs) + counts.get(first, 0)
    for name in ("domains", "tags"):
        labels = getattr(files, name)
        if labels and len(labels) != num_files:
            where = (
                f"each file of a language in {key}.texts"
                if counts
                else f"each of {key}.source, then one for each of {key}.pairs"
            )
            raise ValueError(f"{key}.{name} has {len(labels)} labels for {num_files} files: give one for {where}")
