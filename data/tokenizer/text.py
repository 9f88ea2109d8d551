"""What all tokenizers do with text: mend it, cut giant ones where no id changes, spell bytes as characters."""

from __future__ import annotations

import re
from collections.abc import Iterator

# Bounds the memory of one call into a library. Below the million characters of white space in one run at which
# tiktoken's engine of regular expressions overflows its stack.
SLICE_CHARACTERS = 500_000

_SURROGATE = re.compile("[\ud800-\udfff]")
# Where GPT-2's pattern always begins a pre-token, and takes what is in front of it as it would at the end of a text:
# before the last character of a run of white space (it opens " word" or stands alone; those before it are one
# pre-token), and between a letter and a mark of East Asian text, which may go on for pages without any space. Other
# patterns join a line's end to the mark before it. White space is what Unicode calls so; Python counts U+001C to U+001F
# too, which are marks to the patterns' engines.
GPT2_CUTS = re.compile(
    r"[^\S\x1c-\x1f](?=[\S\x1c-\x1f])|(?<=[\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3])(?=[\u3002\u3001\uff0c\uff01\uff1f])"
)


def replace_surrogates(text: str) -> str:
    """Replace each lone surrogate, which has no UTF-8 form, by U+FFFD."""
    try:
        text.encode()  # many times faster than a search for what is hardly ever there
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", text)
    return text


def slices(text: str, limit: int, cuts: re.Pattern[str]) -> Iterator[str]:
    """Cut a text before matches of ``cuts``, each at the first one beyond ``limit`` characters."""
    begin = 0
    while len(text) - begin > limit:
        cut = cuts.search(text, begin + limit)
        if cut is None:
            break
        yield text[begin : cut.start()]
        begin = cut.start()
    yield text[begin:] if begin else text


def byte_to_character() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself where printable in Latin-1, else the next of U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return {byte: chr(byte if byte in printable else next(spare)) for byte in range(256)}


def character_to_byte() -> dict[str, int]:
    """The inverse of `byte_to_character`."""
    return {character: byte for byte, character in byte_to_character().items()}
