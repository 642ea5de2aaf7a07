"""Text is Unicode before anything counts, encodes or writes it: every reader, prompt and tokenizer passes through here.

A Python string may hold a lone surrogate, half of a character of UTF-16, which no encoding of Unicode can write: JSON may
spell one (``"\\ud83d"``, half an emoji), and Python puts one where a command line has a byte that is not UTF-8.

U+FEFF is a byte order mark at the beginning of a file, and dropped there. Anywhere else, at the beginning of a document too, it is a
character of the text (zero width no-break space), and kept; of a split one line says how many documents have it (`shards`).
"""

from typing import Final

MARK: Final = "\ufeff"


def without_mark(text: str) -> str:
    """The text of a file without the byte order mark that it may begin with."""
    return text.removeprefix(MARK)


def well_formed(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, and one character for each pair; the same object where there is none."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
