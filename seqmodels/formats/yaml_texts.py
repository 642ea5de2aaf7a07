"""A YAML list of texts, and nothing else that YAML can say: no anchors, aliases, tags or nested values.

The file's events are read, and no object of Python is constructed from them, so neither a tag nor an alias of an alias
does anything.
"""

import os
from typing import Final

import yaml

from seqmodels.formats.limits import Malformed, excerpt, read_text

MOST_BYTES: Final = 8 << 20
MOST_TEXTS: Final = 1_000_000

_TEXT_TAG: Final = "tag:yaml.org,2002:str"


def read(path: str | os.PathLike[str]) -> list[str]:
    """The texts in a file, at least one.

    Raises:
        Malformed: it is not YAML, not a list of texts, or larger than the limits allow.
        OSError: the system cannot read it.
    """
    content = read_text(path, MOST_BYTES)
    wanted = f"{path} must be a YAML list of texts"
    try:
        texts = _texts(content, path, wanted)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, Malformed):
            raise
        raise Malformed(f"{path} is not YAML: {excerpt(' '.join(str(error).split()), 300)[1:-1]}") from None
    if not texts:
        raise Malformed(f"{wanted}, '- Once upon a time' one below the other")
    return texts


def _texts(content: str, path: str | os.PathLike[str], wanted: str) -> list[str]:
    texts, is_list = [], False
    for event in yaml.parse(content, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.DocumentStartEvent) and is_list:
            raise Malformed(f"{wanted}, not several documents")
        if isinstance(event, (yaml.StreamStartEvent, yaml.StreamEndEvent, yaml.DocumentStartEvent, yaml.DocumentEndEvent)):
            continue
        if not is_list:
            if not isinstance(event, yaml.SequenceStartEvent):
                raise Malformed(f"{wanted}, '- Once upon a time' one below the other")
            is_list = True
        elif isinstance(event, yaml.SequenceEndEvent):
            continue
        elif isinstance(event, yaml.ScalarEvent):
            texts.append(_text(event, f"{wanted}; entry {len(texts) + 1} is"))
        else:
            kind = type(event).__name__.removesuffix("Event").removesuffix("Start").lower()
            raise Malformed(f"{wanted}; entry {len(texts) + 1} is a {kind}: put it in quotes")
        if len(texts) > MOST_TEXTS:
            raise Malformed(f"{path} is not read: it has more than {MOST_TEXTS:,} texts")
    return texts


def _text(event: yaml.ScalarEvent, entry: str) -> str:
    """A scalar that is a text: not what YAML takes for a number, a date or a truth value where it is not quoted."""
    if event.tag not in (None, "!", _TEXT_TAG):
        raise Malformed(f"{entry} tagged {excerpt(event.tag)}: write it without")
    if event.tag is None and event.implicit[0]:
        meant = yaml.SafeLoader("").resolve(yaml.ScalarNode, event.value, (True, False))
        if meant != _TEXT_TAG:
            raise Malformed(f"{entry} {excerpt(event.value)[1:-1]} ({meant.rpartition(':')[2]}): put it in quotes")
    return event.value
