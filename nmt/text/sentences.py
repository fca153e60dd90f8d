"""Split text into sentences, with sentencex (MIT licence) and abbreviations of our own. Only this file imports it.

sentencex knows the full stops of some 300 languages and many abbreviations. It splits after others, such as the French
"M." and "Dr.". So its boundaries are taken away after an abbreviation of the tables below, after an initial, after an
ordinal number such as the German "3.", before a lower-case letter, and inside a word.

A line break always ends a sentence, as a heading has no full stop. The sentences contain the whole text with its
blanks: "".join(sentences) == text.
"""

import re
from collections.abc import Iterator

import sentencex

# Words before a name or the rest of a phrase: no sentence ends with them. A capital must be one; small letters may be
# capitals.
_BEFORE_WORDS = {
    "cs": "mj. např. tj. tzv. tzn. resp. popř. ing. mgr. judr. mudr. phdr. dr. prof. doc. sv. ul. nám.",
    "de": "z.B. d.h. u.a. Hr. Hrn. Fr. Frl. Dr. Prof. Dipl. Ing. Mag. St. bzw. bes. betr. ca. evtl. geb. gest. ggf. "
    "Hrsg. hrsg. inkl. exkl. sog. vgl. Fa. Bf. usw. v. zzgl.",
    "en": "Mr. Mrs. Ms. Messrs. Mx. Dr. Prof. St. Sts. Gen. Sen. Rep. Gov. Rev. Hon. Lt. Col. Capt. Cpl. Cmdr. Sgt. "
    "Maj. Adm. Mt. vs. viz. cf. e.g. i.e. approx. Supt. Pres.",
    "es": "Sr. Sra. Sres. Sras. Srta. D. Dña. Dr. Dra. Dres. Dras. Prof. Profa. Ing. Lic. Arq. Gral. Cnel. Cap. "
    "Sto. Sta. Mons. Excmo. Excma. Ilmo. Ilma. Fr. Hno. Hna. avda. Av. cf. p.ej. ej.",
    "fr": "M. MM. Mme. Mmes. Mlle. Mlles. Mgr. Me. Mes. Dr. Drs. Dre. Pr. Prof. St. Ste. Sts. Vve. Gal. Cdt. Cne. "
    "Col. Lt. cf. c.-à-d. p.ex. ex. env. av. apr. boul. bd. pl. éd. dir. tél. R.P.",
    "it": "Sig. Sigg. Sig.ra Sig.na Dott. Dott.ssa Dr. Prof. Prof.ssa Ing. Avv. Arch. Geom. Rag. On. Sen. Mons. "
    "Gen. Col. Cap. Ten. Cav. Egr. Gent. Spett. Ss. cfr. p.es. es. c.d.",
    "nl": "dhr. mevr. mw. mej. dr. drs. ir. ing. prof. mr. ds. st. jhr. jkvr. gen. kol. bijv. bv. d.w.z. o.a. m.n. "
    "incl. excl. ca. vgl. m.b.t. i.p.v. t.a.v. a.u.b. resp.",
    "pl": "np. tzn. tzw. m.in. tj. ul. al. pl. os. dr. prof. inż. mgr. hab. św. gen. płk. kpt. ks. abp. bp. im. ww.",
    "pt": "Sr. Sra. Srs. Sras. Srta. D. Dr. Dra. Drs. Dras. Prof. Profa. Eng. Arq. Exmo. Exma. Ilmo. Ilma. Gen. "
    "Cel. Cap. Sto. Sta. Mons. Pe. Fr. av. trav. cf. p.ex. ex. aprox.",
    "sv": "t.ex. bl.a. d.v.s. dvs. s.k. m.fl. fr.o.m. t.o.m. ca. dr. prof. doc. ing. st. jfr. resp. inkl. exkl. obs.",
}
# Words before a number: no sentence ends with them if a digit comes next.
_BEFORE_NUMBER = {
    "cs": "č. čl. s. str. odst. kap. obr. tab. r. roč. tel.",
    "de": "Nr. Art. Abs. Abschn. Abb. Tab. Bd. Kap. S. Ziff. Anm. Aufl. Tel. Str. Jh. max. min. mind. ca. ab. Jg. lfd.",
    "en": "No. Nos. p. pp. vol. vols. ch. chap. sec. sect. fig. figs. eq. eqs. art. arts. est. ca. c. para. paras. "
    "ed. Jan. Feb. Mar. Apr. Jun. Jul. Aug. Sept. Sep. Oct. Nov. Dec. tel. ext. ver. op. max. min.",
    "es": "núm. núms. nº. art. arts. pág. págs. p. pp. vol. cap. fig. tel. aprox. apdo. ap. ed. c. máx. mín. nro. s.",
    "fr": "art. p. pp. vol. chap. fig. n. no. nos. al. tél. réf. t. éd. env. tab. sect. vers. ann. coll. max. min.",
    "it": "n. nn. nr. art. artt. pag. pagg. p. pp. vol. cap. fig. figg. tel. c. ca. circa. co. ed. tab. sez. all. "
    "max. min.",
    "nl": "nr. nrs. art. blz. p. pp. afb. fig. hfst. par. tel. dl. jrg. vol. tab. max. min. plm. ca. lid.",
    "pl": "nr. art. ust. pkt. str. s. rys. tab. godz. tel. rozdz. t. par. poz. ok. max. min. r. lit. wyd. zł.",
    "pt": "n. núm. nº. art. arts. pág. págs. p. pp. vol. cap. fig. tel. ed. aprox. c. inc. par. máx. mín. s.",
    "sv": "nr. art. s. sid. kap. fig. tel. bd. st. tab. bil. ca. max. min. kl. mom. vol. uppl. avd. par.",
}
# Languages that write ordinal numbers with a full stop.
_WITH_ORDINALS = ("cs", "da", "de", "et", "fi", "hr", "hu", "is", "lv", "nb", "nn", "no", "pl", "sk", "sl", "sr", "tr")
# Not the number in "S. 5."
_ORDINAL = re.compile(r"(?<![\w.,:/-])(?<!\. )\d{1,2}\.$")
# J. and the last letter of z. B. and J.-P.
_INITIAL = re.compile(r"(?<![^\W_])(?<!\.)(?:[^\W\d_]\.[- \u00a0])*([^\W\d_])\.$")
# The number or letter of an item in a list.
_ITEM = re.compile(r"[^\w]*(?:\d{1,3}|[^\W_]|[ivxIVX]{1,5})[.)]+$")
_WORD = re.compile(r"[^\s\"'“”„’‘«»‹›()\[\]{}]+$")
_LINE_END = re.compile(r"[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]\s*")
_LONGEST_TAIL = 24  # characters that are looked at before a boundary
# sentencex takes quadratic time for a long row of quotation marks. In blocks, the time is linear.
_BLOCK = 4096
_READ_AS = {**dict.fromkeys(range(0xD800, 0xE000), "\ufffd"), ord("…"): "."}


def _either_case(table: dict[str, str]) -> dict[str, frozenset[str]]:
    return {
        language: frozenset(form for word in words.split() for form in (word, word[0].upper() + word[1:]))
        for language, words in table.items()
    }


_WORDS, _NUMBERED = _either_case(_BEFORE_WORDS), _either_case(_BEFORE_NUMBER)
_NONE: frozenset[str] = frozenset()


def sentences(text: str, language: str = "") -> list[str]:
    """Return the sentences of a text in a language, whose code is as in `corpus.source_language`.

    An unknown language has the rules that are common to all. Blanks, and blank lines, are part of the sentence before
    them.
    """
    language = re.split("[-_]", language)[0].lower()
    found: list[str] = []
    start = 0
    for match in _LINE_END.finditer(text, len(text) - len(text.lstrip())):
        found += _of_line(text[start : match.end()], language)
        start = match.end()
    return found + _of_line(text[start:], language) if start < len(text) or not found else found


def _of_line(line: str, language: str) -> list[str]:
    places = list(_boundaries(line, language))
    cased = any(character.isupper() for character in line)
    starts = [0]
    for place, after in zip(places, [*places, len(line)][1:], strict=True):
        if _ends(line, starts[-1], place, after, language, cased):
            starts.append(place)
    return [line[start:end] for start, end in zip(starts, [*starts[1:], len(line)], strict=True)]


def _boundaries(line: str, language: str) -> Iterator[int]:
    """Yield the places inside a line where sentencex begins a sentence."""
    start = 0
    while start < len(line):
        end = start + _BLOCK
        if end < len(line):
            end = line.rfind(" ", start + 1, end) + 1 or end
        block = line[start:end]
        found = sentencex.segment(language or "en", block if block.isascii() else block.translate(_READ_AS))
        if sum(map(len, found)) != len(block):
            # It left out characters, so its boundaries are not to be relied on.
            found = [block]
        for sentence in found[:-1]:
            start += len(sentence)
            yield start
        # The last sentence of a block may continue in the next one, so it is read again, unless it is the whole block.
        if end >= len(line):
            return
        if len(found) == 1:
            start = end


def _ends(line: str, start: int, place: int, after: int, language: str, cased: bool) -> bool:
    """Return whether the sentence from `start` ends at `place`, a boundary of sentencex; `after` is the next one.

    `cased`: the text has capital letters, so that a sentence begins with one.
    """
    first = next((character for character in line[place:after] if character.isalnum()), "")
    if not first or (cased and first.islower()):
        return False
    before = line[max(start, place - _LONGEST_TAIL) : place]
    tail = before.rstrip()
    if not tail.endswith("."):
        return any(character.isalnum() for character in before)
    if tail == before:  # inside a word
        return False
    if len(before) == place - start and _ITEM.fullmatch(tail):
        return False
    initial, word = _INITIAL.search(tail), _WORD.search(tail)
    if initial and (len(initial[0]) > 2 or initial[1].isupper()):
        return False
    written = word[0] if word else ""
    if written in _WORDS.get(language, _NONE) or (first.isdecimal() and written in _NUMBERED.get(language, _NONE)):
        return False
    return not (language in _WITH_ORDINALS and _ORDINAL.search(tail))
