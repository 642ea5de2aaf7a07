"""Short names for contents: the keys of the cache and the fingerprints of files."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Final

from seqmodels import failures

_FORMAT: Final = 1
"""Of the cache as a whole: raise it when a cached file changes its meaning."""


def key_of(description: dict[str, Any]) -> str:
    """A short name for a description (JSON): equal descriptions, equal names."""
    canonical = json.dumps({"format": _FORMAT} | description, sort_keys=True)
    return hashlib.blake2b(canonical.encode("utf-8"), digest_size=12).hexdigest()


def content_sample(path: Path) -> str:
    """A digest of 16 blocks spread over a file: finds nearly every change at a cost that does not grow."""
    block, blocks = 1 << 16, 16
    size = path.stat().st_size
    sample = hashlib.blake2b(str(size).encode(), digest_size=16)
    with open(path, "rb") as file:
        for i in range(blocks):
            file.seek(max(0, size - block) * i // (blocks - 1))
            sample.update(file.read(block))
    return sample.hexdigest()


def of_file(path: Path) -> dict[str, Any]:
    """What tells one state of a file from another: place, size, time of change, a sample of its content."""
    with failures.named(path):
        status = path.stat()
        return {
            "path": os.path.abspath(path),
            "bytes": status.st_size,
            "modified_ns": status.st_mtime_ns,
            "sample": content_sample(path),
        }
