"""Text is split where sentences end, and nowhere else; the sentences are the text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmt.text.sentences import sentences

PARTS = [
    *".!?…,:;-()[]\"'“”„«»‚’ \n\r\t\x00\x1c\x85\u2028\u3000。！？।؟\u0301\u200d\ud800",
    "a",
    "B",
    "1",
    "犬",
    "य",
    "ع",
]
PARTS += ["Dr", "z. B. ", "M. ", "e.g. ", "J.-C. ", "3.14", "http://a.b", "\r\n", "👩\u200d🚀"]
TEXT = st.lists(st.sampled_from(PARTS)).map("".join)


@given(
    text=TEXT | st.text(), language=st.sampled_from(["en", "de", "fr", "zh", "ar", "pt_BR", "zh-Hant", "", "x", "\x00"])
)
def test_the_sentences_are_the_text(text: str, language: str) -> None:
    found = sentences(text, language)
    assert "".join(found) == text
    assert all(found) or text == ""
    assert all(each.strip() for each in found) or not text.strip()


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ("en", ["Dr. Smith met Mr. J. S. Bach. ", "It cost approx. 5 euros, e.g. No. 3 of vol. 2. ", "He left."]),
        ("en", ["He came at 3 p.m. ", "Then he left. ", "It was Sgt. Smith of Mt. Vernon. ", "Good."]),
        ("de", ["Hr. Weiß kennt z. B. Frl. Gray und Dr. J. S. Bach. ", "Am 3. Oktober war er da, vgl. S. 5. ", "Ende"]),
        ("de", ["Im 20. Jh. kam d. h. Prof. Maier, Nr. 4 bzw. Abs. 2. ", "Es war 7 Uhr.  ", "Dann ging er."]),
        (
            "fr",
            ["M. Dupont et Mme. Martin ont vu le Dr. House. ", "L’art. 5, p. 3, av. J.-C. et J.-P. Sartre. ", "Oui."],
        ),
        ("es", ["El Sr. García y la Dña. Ana. ", "Véase pág. 5 y núm. 3, p. ej. Madrid. ", "¿Qué? ", "¡Sí! ", "Bien."]),
        ("it", ["Il Sig. Rossi e l’On. Prodi. ", "Vedi pag. 5 e n. 3, cfr. Verdi, a.C. e dopo. ", "Poi basta."]),
        ("pt", ["O Sr. Silva na Av. Brasil com D. Pedro. ", "Veja pág. 5 e n.º 3, p. ex. Lisboa. ", "Sim."]),
        ("nl", ["Dhr. Jansen en mevr. De Vries, o.a. Piet. ", "Zie blz. 5 en nr. 3, bijv. Amsterdam. ", "Ja."]),
        ("pl", ["To m.in. Warszawa, ul. Długa i św. Jan. ", "Zob. str. 5, godz. 7 i dr. Nowak. ", "Tak."]),
        ("cs", ["Je to např. Praha a sv. Jan, ul. Dlouhá. ", "Viz str. 5 a č. 3, 5. května. ", "Ano."]),
        ("sv", ["Det är t.ex. Stockholm och s.k. Gamla stan. ", "Se s. 5 och nr. 3. ", "Ja."]),
        ("zh", ["狗听到了牛2次，猫在睡觉。", "“好！”", "他说。", "我们走吧"]),
        ("ja", ["「はい。」", "そうです。 ", "ABCです！"]),
        ("hi", ["यह एक वाक्य है। ", "यह दूसरा है।"]),
        ("ar", ["هل هذا صحيح؟ ", "نعم. ", "لا."]),
        ("el", ["Είναι έτσι; ", "Ναι. ", "Όχι."]),
        ("", ["One. ", "Two 犬。", "三。 ", "Four."]),
    ],
)
def test_sentences_of_a_language(language: str, expected: list[str]) -> None:
    assert sentences("".join(expected), language) == expected


@pytest.mark.parametrize(
    "expected",
    [
        ["The train leaves at 7:00. ", "It is late! ", "Is it? ", "“Yes.” ", "Three are here… ", "Good."],
        ["“Go. Now,” he said. ", "(It rained. It snowed.) The sun came."],
        ["“Is it?” he asked. ", "“Yes!” she said."],
        ["He left.” ", "Then (as he said.) it rained."],
        ["Wait... ", "Well… maybe not. ", "What?! ", "Ok."],
        ["Pi is 3.14, node.js, a.k.a. pi... or so. ", "1,000.5 is more. ", "See www.example.org."],
        ["A heading\n", "The first sentence. ", "The second\r\n\r\n", "Another heading\u2028", "1. The third."],
        ["\n\n One. ", "Two.\n\n  ", "Three.\n"],
        ["hello. ", "how are you? ", "fine."],
        ["1. First. ", "2. Second. "],
        ["..."],
        [""],
    ],
)
def test_places_that_are_easily_mistaken(expected: list[str]) -> None:
    assert sentences("".join(expected), "en") == expected


@pytest.mark.parametrize("language", ["en", "fr"])
@pytest.mark.parametrize(
    "part",
    [".", "a. ", '"', "'", "«", "“a. ", "(a. ", "。", "a", "\n", ". \n", "1. ", "e.g. ", "…", "A\ud800. ", "B. "],
)
def test_nothing_takes_long(part: str, language: str) -> None:
    """A row of marks that is read again from each of them would take minutes."""
    text = part * (100_000 // len(part))
    assert "".join(sentences(text, language)) == text


def test_a_line_of_100_000_words_has_the_sentences_of_its_parts() -> None:
    """However long a line is, it is read in blocks, and where a block ends does not matter."""
    few = [
        "Dr. Smith met the dog at 7.30, vol. 3. ",
        "He said: “Yes.” ",
        "It rained for 3 days… ",
        "Then it was over! ",
    ]
    assert sentences("".join(few * 5000), "en") == few * 5000
