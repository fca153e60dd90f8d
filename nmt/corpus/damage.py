"""Find damage of encodings: UTF-8 that some program has read as Latin-1 or Windows-1252, such as "Ã©" for "é"."""

import re

# How Windows-1252 shows the bytes 80 to 9f; the five that it lacks stay control characters, as in Latin-1.
_HIGH = "".join(bytes([byte]).decode("cp1252", errors="ignore") or chr(byte) for byte in range(0x80, 0xA0))
_REST = re.escape(_HIGH) + "\x80-\x9f\u00a0-\u00bf"  # of a character: bytes 80 to bf
# The first byte of a character decides how many others follow it.
_DAMAGED = re.compile(f"[\u00c2-\u00df][{_REST}]|[\u00e0-\u00ef][{_REST}]{{2}}|[\u00f0-\u00f4][{_REST}]{{3}}")
_BYTES = {character: 0x80 + place for place, character in enumerate(_HIGH)}
_REPLACEMENT = "\ufffd"


def num_damaged(text: str) -> int:
    """Return the number of places of a text where its encoding was damaged, U+FFFD included.

    Such a place is what a character of UTF-8 looks like in Windows-1252 or Latin-1. Two characters of a correct text
    may look like one by chance: a capital such as Â before a sign such as ©, which is rare. So a place counts if the
    character meant is a letter or a sign of punctuation or currency, as in most texts.
    """
    if text.isascii():
        return 0
    found = text.count(_REPLACEMENT)
    for match in _DAMAGED.finditer(text):
        found += _is_likely(match[0])
    return found


def _is_likely(shown: str) -> bool:
    try:
        was = bytes(_BYTES.get(character, ord(character) & 0xFF) for character in shown).decode("utf-8")
    except UnicodeDecodeError:
        return False
    # What stays one byte of Latin-1, such as "Â »" for a no-break space before », is found in correct text.
    return was.isalpha() or was in _USUAL


_USUAL = frozenset("’‘“”„‚«»…–—•€£©®°§\u00a0¿¡½¼¾²³")
