"""Which tokens end a text, as the files beside a tokenizer.json say: Hugging Face's four places for it.

config.json and generation_config.json have ``eos_token_id``, an id or several; tokenizer_config.json and special_tokens_map.json
have ``eos_token``, a name. Any of the files may be missing, and any of them may be wrong.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from seqmodels.data import atomic
from seqmodels.data.text.unicode import well_formed
from seqmodels.errors import UserError
from seqmodels.formats import json_text
from seqmodels.formats.limits import excerpt

ID_FILES: Final = ("config.json", "generation_config.json")
NAME_FILES: Final = ("tokenizer_config.json", "special_tokens_map.json")


def read_ids(path: Path, library: Any, report: Callable[[str], None]) -> tuple[int, ...]:
    """The ids that end a text by the files beside a tokenizer.json, its separator first; () where none says anything.

    A model may stop at several tokens, but one of them stands between two texts: the one that has both an id and a name. Where
    the files contradict each other it is the id, unless that is an ordinary word's, as a library's default may be.

    Args:
        path: of the tokenizer.json.
        library: the ``tokenizers.Tokenizer`` in it.
        report: called with one line for each thing a person should know.

    Raises:
        OSError: a file is there and cannot be read now.
    """
    special = set(library.get_added_tokens_decoder())  # marked as special or not: an ordinary word is none of them
    by_id, by_name = {}, {}  # each id, and where it is said
    for file in ID_FILES:
        for token in _as_list(_read(path.with_name(file), "eos_token_id", report)):
            if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 1 << 32 and library.id_to_token(token):
                by_id.setdefault(token, file)
            else:
                report(f"{path.with_name(file)}: eos_token_id {excerpt(token)} is no token of {path.name}, and is passed over")
    for file in NAME_FILES:
        for name in _as_list(_read(path.with_name(file), "eos_token", report)):
            name = name["content"] if isinstance(name, dict) and "content" in name else name
            token = library.token_to_id(name) if isinstance(name, str) and name == well_formed(name) else None
            if token is None:
                report(f"{path.with_name(file)}: eos_token {excerpt(name)} is no token of {path.name}, and is passed over")
            else:
                by_name.setdefault(token, file)
    if not by_name and by_id and not by_id.keys() & special:
        token, file = next(iter(by_id.items()))
        report(f"{path.with_name(file)}: eos_token_id {token} is {library.id_to_token(token)!r}, no special token of {path.name}")
    if not by_id or not by_name:
        return tuple(by_id or by_name)
    both = [token for token in by_id if token in by_name]
    separator = [*both, *(token for token in by_id if token in special), *by_name][0]
    if not both:
        said = " and ".join(f"{library.id_to_token(token)!r} in {file}" for token, file in (by_id | by_name).items())
        report(f"{path.parent} names {said}; {library.id_to_token(separator)!r} is taken to stand between two texts")
    ends = dict.fromkeys([separator, *by_id, *by_name])
    words = [token for token in ends if token != separator and token not in special and token not in by_name]
    for token in words if both else ():  # else it is said already
        said = f"{path.with_name(by_id[token])}: eos_token_id {token} is the ordinary {library.id_to_token(token)!r}"
        report(f"{said}; it is not taken to end a text")
    return tuple(token for token in ends if token not in words)


def write_ids(path: Path, name: str, ends: Sequence[int]) -> None:
    """Say beside a tokenizer.json what ends a text, so that `beside` and transformers find it.

    Raises:
        UserError: the disk refuses.
    """
    files = {NAME_FILES[0]: {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": name}}
    if len(ends) > 1:
        files[ID_FILES[1]] = {"eos_token_id": list(ends)}
    for file, content in files.items():
        atomic.write_text(path.with_name(file), json.dumps(content, indent=2) + "\n")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _read(path: Path, field: str, report: Callable[[str], None]) -> Any:
    """A field of a JSON file; None where the file or the field is missing, or damaged."""
    if not path.is_file():
        return None
    try:
        content = json_text.read(path, infinity=True)
    except UserError as error:
        report(f"{path} cannot be read, and what it says of the end of text is passed over ({error})")
        return None
    return content[field] if isinstance(content, dict) and field in content else None
