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
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CHAIN = re.compile(r'channel_id=\d+,.*chain_id="\d+"')
_KNOWN = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_LIMIT = re.compile(r"ROOT .* compare\(.*[ %]([\w.\-]+)\), direction=LT")
_ALONE = re.compile(r"replica_groups=(\{\{\d+\}(,\{\d+\})*\}|\[\d+,1\])")
_CALLS = re.compile(r"(?:to_apply|calls|body|condition|branch_computations)=\{?%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program.

    Attributes:
      kind: one of KINDS.
      shapes: of the results on one device, ``(dtype, dimensions)``; several arrays may travel together.
      in_loop: whether it is repeated: a ``while`` runs it.
      runs: how often loops run it; one of which XLA does not say how often it runs counts once.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    in_loop: bool
    runs: int = 1

    @property
    def bytes(self) -> int:
        return sum(BYTES[dtype] * math.prod(dimensions) for dtype, dimensions in self.shapes)


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program but for those of single devices, each once, however often a loop runs it.

    One that a TPU overlaps with computation is written several times, with one number of its chain. Its reduce-scatter is a fusion
    of that name, an all-reduce of which each device slices its part.

    Args:
      text: ``compiled.as_text()``.
    """
    lines_of, results_of, name = collections.defaultdict(list), {}, None
    for line in text.splitlines():
        begins = re.match(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if begins:
            name = begins[1]
            results_of[name] = line.rpartition("->")[2]
        elif line.startswith("}"):
            name = None
        elif name is not None:
            lines_of[name].append(line)
    in_loop, runs, found = set(), collections.Counter(), []
    todo = [(name, 1, False) for name in re.findall(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)]
    while todo:
        computation, times, looped = todo.pop()
        runs[computation] += times
        in_loop |= {computation} if looped else set()
        for line in lines_of[computation]:
            is_loop = " while(" in line
            repeats = _repeats(line, lines_of) if is_loop else 1
            todo += [(name, times * repeats, looped or is_loop) for name in _CALLS.findall(line)]
    found, chains = [], set()
    for computation, lines in lines_of.items():
        for line in lines:
            match, chain = _COLLECTIVE.search(line), _CHAIN.search(line)
            if match and not _ALONE.search(line) and (chain is None or (match[2], chain[0]) not in chains):
                chains.add(chain and (match[2], chain[0]))
                nested = match[3] and (match[2] != "all-reduce" or match[1].startswith("(("))
                kind, results = match[2], _results(match[1]) if nested else match[1]
                if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                    kind, results = "reduce-scatter", results_of[computation]
                found.append(Collective(kind, _shapes(results), computation in in_loop, runs[computation] or 1))
    return found


def _repeats(line: str, lines_of: dict[str, list[str]]) -> int:
    """How often a ``while`` runs its body; 1 where XLA does not say.

    libtpu's compiler does not write what it knows; there it is the constant below which the condition wants the counter, which JAX's
    loops count from 0 by 1.
    """
    known, condition = _KNOWN.search(line), re.search(r"condition=%?([\w.\-]+)", line)
    if known or not condition:
        return int(known[1]) if known else 1
    inside = lines_of[condition[1]]
    limit = next((match[1] for match in map(_LIMIT.search, inside) if match), None)
    constants = (re.search(r"%?([\w.\-]+) = .* constant\((\d+)\)", each) for each in inside)
    return next((int(match[2]) for match in constants if match and match[1] == limit), 1)


def bytes_received(text: str) -> dict[str, int]:
    """Bytes of the results of a compiled program's collectives on one device, by kind, as often as loops run them."""
    received = collections.Counter()
    for each in collectives(text):
        received[each.kind] += each.runs * each.bytes
    return dict(received)


def _results(text: str) -> str:
    """Of the type of an operation's start that of its results: ``((operands), (results), ...)``, or one of each without the inner
    parentheses; an all-reduce's may be the results alone."""
    depth, parts = 0, [""]
    for letter in re.sub(r"\{[^{}]*\}", "", text)[1:-1]:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts[1] if len(parts) > 1 else text


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
