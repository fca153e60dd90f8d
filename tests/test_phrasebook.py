import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import islice, permutations

import pytest

from nmt.corpus import phrasebook as module
from nmt.corpus.lexicon import Words
from nmt.corpus.phrasebook import LANGUAGES, Phrase, phrasebook, phrasebook_slots
from nmt.resources import resource_dir

SINGULARS = ("Woche", "Tag", "Stunde", "Minute", "Nacht", "Person")


@pytest.fixture(scope="module")
def train():
    """20,000 training sentences in the three languages."""
    return list(islice(module._generate("train", LANGUAGES, 0), 20_000))


@pytest.fixture(scope="module")
def book():
    return module._load(resource_dir("data/phrasebook"))


def render(book, text, language, **values):
    """One text of a frame with given words (by their English form) or values."""
    slots = [(name, "") for name in values]
    parts = {language: module._parse(text, slots, book.kinds, language)}
    chosen = []
    for name, value in values.items():
        kind = book.kinds[name]
        if isinstance(value, str):
            value = ([word["en"][""] for word in kind.words].index(value),)
        chosen.append(value)
    return module._render(module._Frame("", "", slots, parts), tuple(chosen), book.kinds, language).text


def test_yields_labelled_pairs():
    pairs = list(phrasebook("train", "en", "de", 50))
    assert len(pairs) == 50
    assert all(isinstance(pair, Phrase) and pair.source and pair.target and pair.domain for pair in pairs)


def test_deterministic_and_a_longer_run_begins_with_the_shorter():
    long = list(phrasebook("train", "en", "fr", 400, seed=3))
    assert list(phrasebook("train", "en", "fr", 150, seed=3)) == long[:150]
    assert list(phrasebook("train", "en", "fr", 150, seed=4)) != long[:150]


def test_same_in_another_process_with_another_hash_seed():
    code = "from nmt.corpus.phrasebook import phrasebook; print(*phrasebook('test', 'de', 'fr', 40), sep='\\n')"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "77", "PYTHONUTF8": "1", "LC_ALL": "C", "TZ": "Asia/Tokyo"},
        cwd=resource_dir("data/phrasebook").parent.parent,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert run.stdout.splitlines() == [str(pair) for pair in phrasebook("test", "de", "fr", 40)]


def test_the_same_content_in_every_language_pair():
    sentences = [sentence.texts for sentence in islice(module._generate("dev", LANGUAGES, 1), 300)]
    for source, target in permutations(range(3), 2):
        pairs = list(phrasebook("dev", LANGUAGES[source], LANGUAGES[target], 300, seed=1))
        assert [(p.source, p.target) for p in pairs] == [(t[source], t[target]) for t in sentences]


def test_held_out_values_and_sentences_are_disjoint(train):
    values = {"train": {v for sentence in train for v in sentence.held_out}}
    texts = {"train": {sentence.texts[0] for sentence in train}}
    for split in ("dev", "test"):
        sentences = list(islice(module._generate(split, LANGUAGES, 0), 2000))
        values[split] = {v for sentence in sentences for v in sentence.held_out}
        texts[split] = {sentence.texts[0] for sentence in sentences}
    for one, other in (("train", "test"), ("train", "dev"), ("dev", "test")):
        assert values[one]
        assert not values[one] & values[other]
        assert not texts[one] & texts[other]


def test_no_duplicates(train):
    assert len({sentence.texts[0] for sentence in train}) == len(train)
    test = [pair.source for pair in phrasebook("test", "en", "de", 2000)]
    assert len(set(test)) > 0.99 * len(test)


def test_split_sizes():
    splits = Counter(module._split_of(f"number:{i}") for i in range(5000))
    assert 0.77 < splits["train"] / 5000 < 0.83
    assert splits["dev"] > 400
    assert splits["test"] > 400


def test_many_balanced_frames_and_domains(book, train):
    assert len(book.domains) >= 8
    assert all(len(frames) >= 15 for frames in book.domains)
    assert sum(len(frames) for frames in book.domains) >= 120
    counts = Counter(sentence.domain for sentence in train)
    expected = len(train) / len(book.domains)
    assert all(0.9 * expected < count < 1.1 * expected for count in counts.values())


def test_every_frame_and_every_form_renders(book):
    rng = module.random.Random(1)
    for frame in (frame for frames in book.domains for frame in frames):
        for _ in range(5):
            values = module._draw_values(frame, book.kinds, "train", rng)
            for language in LANGUAGES:
                assert re.fullmatch(r"\S.*[.?]", module._render(frame, values, book.kinds, language).text)


def test_clean_text(train):
    for sentence in train:
        assert 4 <= len(sentence.texts[0].split()) <= 24
        for text in sentence.texts:
            assert not re.search(r"[\u202f\u00a0\n\r\t{}_]|  |^ | $", text), text
            assert not text[0].islower(), text


def test_no_grammar_slips(train):
    english = re.compile(r"\ba [aeio]|\ban [^aeiou]|(?<![\d.,])\b1 (\w+s|people)\b(?<!ss)")
    german = re.compile(r"\b(von dem|zu dem|zu der|bei dem|in dem|an dem)\b|\b1 (Tage|Wochen|Stunden|Personen)\b")
    french = re.compile(r"\b(à les?\b|de les?\b(?! servir)|de [aeiouéâê]\w|la [aeiouéâê]|le [aeiouéâê]\w)", re.I)
    for texts in (sentence.texts for sentence in train):
        assert not english.search(texts[0]), texts[0]
        assert not german.search(texts[1]), texts[1]
        assert not french.search(texts[2]), texts[2]


def test_singular_and_plural(book, train):
    assert render(book, "{days}", "de", days=(1, 100)) == "1 Woche"
    assert render(book, "{days}", "de", days=(1, 200)) == "2 Wochen"
    assert render(book, "in {days:dem}", "de", days=(0, 300)) == "In 3 Tagen"
    assert render(book, "{days}", "fr", days=(0, 100)) == "1 jour"
    assert render(book, "{volume}", "fr", volume=(1, 150)) == "1,5 litre"
    assert render(book, "{volume}", "en", volume=(1, 150)) == "1.5 litres"
    assert render(book, "{money}", "en", money=(0, 100)) == "1 euro"
    assert render(book, "{money}", "fr", money=(0, 125050)) == "1 250,50 euros"
    assert render(book, "{money}", "de", money=(0, 125050)) == "1.250,50 Euro"
    words = " ".join(sentence.texts[1] for sentence in train)
    assert all(len(re.findall(rf"\b1 {word}\b", words)) >= 5 for word in SINGULARS)


def test_prepositions_and_articles(book):
    german = {"Switzerland": "in der Schweiz", "the United States": "in den USA", "Spain": "in Spanien"}
    french = {"Switzerland": "en Suisse", "the United States": "aux États-Unis", "Portugal": "au Portugal"}
    origin = {"Spain": "d'Espagne", "Portugal": "du Portugal", "France": "de France", "Cuba": "de Cuba"}
    for country, expected in german.items():
        assert render(book, "x {country:in}", "de", country=country) == f"X {expected}"
    for country, expected in french.items():
        assert render(book, "x {country:en}", "fr", country=country) == f"X {expected}"
    for country, expected in origin.items():
        assert render(book, "x {country:aus}", "fr", country=country) == f"X {expected}"
    assert render(book, "x {country:nach}", "de", country="the Netherlands") == "X in die Niederlande"
    assert render(book, "x {country:in}", "de", country="the Netherlands") == "X in den Niederlanden"
    assert render(book, "{place:zum}", "de", place="station") == "Zum Bahnhof"
    assert render(book, "{place:zum}", "de", place="library") == "Zur Bibliothek"
    assert render(book, "{place:au}", "fr", place="hospital") == "À l'hôpital"
    assert render(book, "{place:du}", "fr", place="museum") == "Du musée"
    assert render(book, "{ingredient:de}", "fr", ingredient="onions") == "D'oignons"
    assert render(book, "mit {ingredient:mit}", "de", ingredient="mushrooms") == "Mit Pilzen"
    assert render(book, "{city:de}", "fr", city="Athens") == "D'Athènes"


def test_dates_times_and_numbers(book):
    assert render(book, "am {date}", "de", date=(0, 3, 3)) == "Am 3. März"
    assert render(book, "le {date}", "fr", date=(0, 3, 1)) == "Le 1er mars"
    assert render(book, "am {weekdate:dem}", "de", weekdate=(2025, 3, 3)) == "Am Montag, dem 3. März 2025"
    inside = render(book, "am {weekdate:dem} um {time}", "de", weekdate=(2025, 3, 3), time=(9, 0))
    assert inside == "Am Montag, dem 3. März 2025, um 9 Uhr"
    assert render(book, "am {weekdate:dem}.", "de", weekdate=(2025, 3, 3)) == "Am Montag, dem 3. März 2025."
    assert render(book, "{weekdate}", "en", weekdate=(2025, 3, 3)) == "Monday, 3 March 2025"
    assert [render(book, "{time}", code, time=(9, 5)) for code in LANGUAGES] == ["9:05", "9:05 Uhr", "9 h 05"]
    assert render(book, "{number:words}", "fr", number=(0, 8000)) == "Quatre-vingts"
    assert render(book, "{temperature}", "fr", temperature=(0, -500)) == "Moins 5 degrés Celsius"
    assert [render(book, "{percent}", code, percent=(0, 1250)) for code in LANGUAGES] == [
        "12.5%",
        "12,5 %",
        "12,5 %",
    ]


def test_every_word_is_frequent_in_30k_training_pairs(book):
    counts = Counter()
    for frame, values in islice(module._draws(book, "train", 0), 30_000):
        counts.update((name, value) for (name, _), value in zip(frame.slots, values, strict=True))
    for name, kind in book.kinds.items():
        if isinstance(kind, Words):
            assert min(counts[name, (i,)] for i in range(len(kind.words))) >= 20, name


def test_a_source_sentence_has_one_target(train):
    for source, target in permutations(range(3), 2):
        targets = defaultdict(set)
        for sentence in train:
            targets[sentence.texts[source]].add(sentence.texts[target])
        assert not [texts for texts in targets.values() if len(texts) > 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("valid", "en", "de", 1), "split is 'valid'; it must be one of train, dev, test"),
        (("train", "en", "es", 1), "language is 'es'; it must be one of en, de, fr"),
        (("train", "xx", "de", 1), "language is 'xx'"),
        (("train", "de", "de", 1), "both 'de'"),
        (("train", "en", "de", 0), "num_pairs is 0; it must be at least 1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        phrasebook(*arguments)
    assert "\n" not in str(error.value)


GOOD = {"en": "{date} and {time}.", "de": "{date} und {time}.", "fr": "{date} et {time}."}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"de": None}, "no text for de"),
        ({"en": "{date} and {tiem}."}, r"unknown slot \{tiem\} \(en\)"),
        ({"fr": "{date} et."}, "slot time is not in fr"),
        ({"de": "{date} und {time} und {city}."}, r"slot \{city\} is in de but not in en"),
        ({"de": "{date:zum} und {time}."}, r"unknown form in \{date:zum\} \(de\)"),
        ({"de": "{date} und {time} und {."}, "braces that are not a slot"),
        ({"en": "Hi.", "de": "Hallo.", "fr": "Salut."}, "0 combinations"),
    ],
)
def test_broken_frames_name_file_and_frame(tmp_path, monkeypatch, change, message):
    for name in ("grammar.toml", "lexicon.toml"):
        shutil.copy(resource_dir("data/phrasebook") / name, tmp_path)
    frames = ""
    for table in (GOOD, {**GOOD, **change}):
        lines = [f"{code} = {text!r}" for code, text in table.items() if text is not None]
        frames += "\n".join(["[[frame]]", *lines, ""])
    (tmp_path / "chat.toml").write_text(frames, "utf-8")
    monkeypatch.setattr(module, "resource_dir", lambda name: tmp_path)
    with pytest.raises(ValueError, match=rf"^chat.toml: frame 2 \(.*\): .*{message}") as error:
        phrasebook("train", "en", "de", 1)
    assert "\n" not in str(error.value)


def test_a_new_frame_works_at_once(tmp_path, monkeypatch):
    for name in ("grammar.toml", "lexicon.toml"):
        shutil.copy(resource_dir("data/phrasebook") / name, tmp_path)
    frame = "\n".join(["[[frame]]", *(f"{code} = {text!r}" for code, text in GOOD.items())])
    (tmp_path / "chat.toml").write_text(frame, "utf-8")
    monkeypatch.setattr(module, "resource_dir", lambda name: tmp_path)
    pair = next(phrasebook("train", "en", "de", 1))
    assert pair.domain == "chat"
    assert " and " in pair.source
    assert " und " in pair.target


@pytest.mark.slow
@pytest.mark.parametrize("target", ["de", "fr"])
def test_slots_are_where_their_values_are(target):
    """Also behind the comma after a German date. Codes are the same text on both sides."""
    found = list(phrasebook_slots("test", "en", target, 3000))
    assert [phrase for phrase, _ in found] == list(phrasebook("test", "en", target, 3000))
    seen = Counter()
    for phrase, slots in found:
        for slot in slots:
            values = phrase.source[slice(*slot.source)], phrase.target[slice(*slot.target)]
            for text, (start, end), value in zip(phrase[:2], (slot.source, slot.target), values, strict=True):
                assert value == value.strip(" ,.")
                assert not any(each.isalnum() for each in (text[start - 1 : start], text[end : end + 1])), (text, value)
            if slot.kind in ("flight", "year"):
                assert values[0] == values[1]
            seen[slot.kind] += 1
    assert seen["weekdate"] > 20
    assert seen["flight"] > 10
