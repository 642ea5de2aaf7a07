"""What a compiled program over several devices does: FLOPs, temporaries and collectives of one device, read from XLA."""

import collections
import dataclasses
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8,
    "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_ALONE = re.compile(r"replica_groups=(\{\{\d+\}(,\{\d+\})*\}|\[\d+,1\])")
_CALLS = re.compile(r"(?:to_apply|calls|body|condition|branch_computations)=\{?%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program.

    Attributes:
      kind: one of KINDS.
      shapes: of the results on one device, ``(dtype, dimensions)``; several arrays may travel together.
      in_loop: whether it is repeated: a ``while`` runs it.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    in_loop: bool

    @property
    def bytes(self) -> int:
        return sum(BYTES[dtype] * math.prod(dimensions) for dtype, dimensions in self.shapes)


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program but for those of single devices, each once, however often a loop runs it.

    Args:
      text: ``compiled.as_text()``.
    """
    lines_of, name = collections.defaultdict(list), None
    for line in text.splitlines():
        begins = re.match(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if begins:
            name = begins[1]
        elif line.startswith("}"):
            name = None
        elif name is not None:
            lines_of[name].append(line)
    in_loop, todo = set(), re.findall(r"body=%?([\w.\-]+)", text)
    while todo:
        computation = todo.pop()
        if computation not in in_loop:
            in_loop.add(computation)
            todo += _CALLS.findall("\n".join(lines_of[computation]))
    found = []
    for computation, lines in lines_of.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match and not _ALONE.search(line):
                found.append(Collective(match[2], _shapes(match[1]), computation in in_loop))
    return found


def _shapes(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", text) if dtype in BYTES
    )  # fmt: skip


@contextmanager
def compiler_messages() -> Iterator[list[str]]:
    """What XLA, which is no Python, writes to standard error inside; complete once the context is left."""
    lines = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def rematerialisations(messages: list[str]) -> list[str]:
    """Those messages that say that an array was gathered whole because no better way between two shardings was known."""
    return [line for line in messages if "involuntary full rematerialization" in line.lower()]
