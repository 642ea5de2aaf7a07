"""The papers behind the mixers and the method: BibTeX entries, their keys and addresses.

`references.bib` beside this file has them. A mixer's paper is the one whose arXiv number its header names first; one that has no
entry there is cited by the title and the number in its header, so that a new mixer is one file still.
"""

import dataclasses
import functools
import re
from pathlib import Path

from seqmodels import mixers

FILE = Path(__file__).with_suffix(".bib")


@dataclasses.dataclass(frozen=True)
class Reference:
    """A BibTeX entry."""

    key: str
    bibtex: str
    arxiv: str | None  # its number

    @property
    def url(self) -> str | None:
        """Of its abstract on arXiv."""
        return None if self.arxiv is None else f"https://arxiv.org/abs/{self.arxiv}"


@functools.cache
def references() -> dict[str, Reference]:
    """The entries of references.bib by their keys."""
    found = {}
    for entry in re.findall(r"^@\w+\{.*?^\}", FILE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE):
        key, number = re.match(r"@\w+\{([^,\s]+),", entry)[1], re.search(r"eprint = \{([^}]*)\}", entry)
        found[key] = Reference(key, entry, number and number[1])
    return found


@functools.cache
def of_mixer(name: str) -> Reference | None:
    """The paper of a mixer; None if its header names no arXiv number.

    Raises:
        UserError: there is no such mixer.
    """
    header = mixers.load(name).__doc__ or ""
    number = re.search(r"arXiv[\s:]+(\d{4}\.\d{4,5})", header)
    if number is None:
        return None
    known = next((each for each in references().values() if each.arxiv == number[1]), None)
    if known is not None:
        return known
    title = re.search(r'"([^"]+)",?\s+arXiv[\s:]+' + re.escape(number[1]), header)
    fields = {
        "title": " ".join(title[1].split()) if title else name, "year": f"20{number[1][:2]}", "eprint": number[1],
        "archivePrefix": "arXiv",
    }  # fmt: skip
    body = ",\n".join(f"  {field} = {{{value}}}" for field, value in fields.items())
    return Reference(f"{name}_{number[1]}", f"@misc{{{name}_{number[1]},\n{body}\n}}", number[1])


def mixers_in(text: str) -> list[str]:
    """The mixers of a pattern, each once, in order; those that are no longer in the folder are left out."""
    names = re.split(r"[\s+]+", re.sub(r"\([^()]*\)", " ", text))
    return [name for name in dict.fromkeys(names) if name in mixers.names()]
