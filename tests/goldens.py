"""Goldens: numbers computed with other people's reference code, and what each of them means.

`tests/goldens/MANIFEST.json` states for every golden the operation, its formula, scale, layout and the
reference implementation with its version. Inputs are stored in float32 and were used as float64 by the
reference; outputs (`<name>`; `<name>_zero` from a zero initial state) and gradients (`grad_<input>`, for the
cotangents `cot_<output>`) are float64 unless the entry says otherwise. Log decays are natural logarithms <= 0.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import numpy as np
import pytest

DIRECTORY = pathlib.Path(__file__).parent / "goldens"


@dataclasses.dataclass(frozen=True)
class Golden:
    """One golden: `arrays` as stored, `entry` as in the manifest, `directory` with the checkpoint for a `hf/` one."""

    arrays: dict[str, np.ndarray]
    entry: dict[str, Any]
    directory: pathlib.Path


@functools.cache
def manifest() -> dict[str, dict[str, Any]]:
    """Manifest entries by the name `load` takes."""
    listing = json.loads((DIRECTORY / "MANIFEST.json").read_text())
    entries = {pathlib.Path(entry["file"]).stem: entry for entry in listing["npz"]}
    return entries | {entry["dir"]: entry for entry in listing["hf"]}


def load(name: str) -> Golden:
    """Loads `"gla"` (npz/gla.npz) or `"hf/llama"` (hf/llama/golden.npz beside its checkpoint).

    Raises:
        KeyError: no golden has this name.
    """
    entry = manifest()[name]
    path = DIRECTORY / entry["file"] if "file" in entry else DIRECTORY / entry["dir"] / "golden.npz"
    with np.load(path, allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in stored.files}
    return Golden(arrays=arrays, entry=entry, directory=path.parent)


def golden_forms(*forms: str) -> list:
    """Parameters for a test of a golden: the recurrent form, and for `make test-all` the others.

    That a form is equal to the recurrent one is a law of the contract, and an op's own test.
    """
    return [form if form == "recurrent" else pytest.param(form, marks=pytest.mark.slow) for form in forms]
