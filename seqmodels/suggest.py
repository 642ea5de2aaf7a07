"""The nearest of the names that there are: what every refusal of an unknown name offers."""

import difflib
import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path

# What other programs call our fields.
ALIASES = {
    "lr": "learning_rate", "wd": "weight_decay", "warmup": "warmup_steps", "clip": "clip_norm", "grad_clip": "clip_norm",
    "bs": "batch_size", "batch": "batch_size", "context": "seq_len", "context_length": "seq_len", "block_size": "seq_len",
    "max_len": "seq_len", "width": "d_model", "dim": "d_model", "hidden_size": "d_model", "n_embd": "d_model",
    "embed_dim": "d_model", "layers": "repeats", "num_layers": "repeats", "n_layer": "repeats", "depth": "repeats",
    "heads": "num_heads", "n_head": "num_heads", "max_steps": "steps", "iterations": "steps", "dataset": "source",
    "output_dir": "workdir", "out_dir": "workdir", "run_dir": "workdir", "grad_accum": "accumulation_steps",
    "mlp_hidden": "hidden", "intermediate_size": "hidden", "ffn_dim": "hidden", "mlp_activation": "activation", "mlp_kind": "pattern",
}  # fmt: skip

LONGEST = 100  # characters that are looked at: difflib's time grows as the square of them
MOST_BESIDE = 1000  # names of a folder that are looked at


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of ``known`` that ``name`` probably means, or None. Both may be dotted: the last part counts most."""
    name, known = name[:LONGEST], list(known)
    last = name.rpartition(".")[2]
    by_last = {}
    for each in known:
        by_last.setdefault(each.rpartition(".")[2], each)
    if last in ALIASES and ALIASES[last] in by_last:
        return by_last[ALIASES[last]]
    found = difflib.get_close_matches(name, known, n=1)
    if not found and (parts := difflib.get_close_matches(last, by_last, n=1)):
        found = [by_last[parts[0]]]
    return found[0] if found else None


def hint(name: str, known: Iterable[str]) -> str:
    """``"did you mean 'x'? "``, or nothing: to go before a list of what there is."""
    near = nearest(name, known)
    return f"did you mean {near!r}? " if near else ""


def path_hint(path: str | os.PathLike[str], accepts: Callable[[Path], bool] = Path.exists) -> str:
    """`hint` for a path where nothing is: the nearest name in the folder in which its first missing part should be.

    Args:
        accepts: whether a path may be offered.
    """
    path = Path(path)
    try:
        while not path.parent.exists():
            path = path.parent
        beside = {each.name: each for each in itertools.islice(path.parent.iterdir(), MOST_BESIDE)}
        is_hidden = path.name.startswith(".")  # hidden files are not offered for one that is not
        near = nearest(path.name, (name for name, each in beside.items() if name.startswith(".") == is_hidden and accepts(each)))
    except OSError:  # it cannot be looked at
        return ""
    return f"did you mean '{beside[near]}'? " if near else ""


def no_such(what: str, path: str | os.PathLike[str]) -> str:
    """That there is no ``what`` at a path, and what is there of nearly this name: a message."""
    return f"there is no {what} {path}; {path_hint(path)}".rstrip("; ")


def no_folder(path: Path) -> str:
    """Why a path is no folder, to be read or searched: a message."""
    return f"{path} is a file, not a folder" if path.exists() else no_such("folder", path)
