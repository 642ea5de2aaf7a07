"""Annotations hold: jaxtyping with beartype checks them while every mixer and a model are traced; their letters are the legend's."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from seqmodels import mixers, shapes

ROOT = Path(__file__).resolve().parents[2]
PARTS_OF_MIXERS = 4  # programs that take eight CPU seconds each
PARTS = ("mixers", "channel_layers", "layers", "ops", "model.py")


def trace(*arguments):
    command = [sys.executable, "-m", "tests.contract.annotations", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.tools
@pytest.mark.parametrize("part", range(PARTS_OF_MIXERS))
def test_mixers_are_as_annotated(part):
    trace(*mixers.names()[part::PARTS_OF_MIXERS])


@pytest.mark.tools
def test_a_model_is_as_annotated():
    trace()


@pytest.mark.slow
@pytest.mark.parametrize("name", mixers.names())
def test_every_form_is_as_annotated(name):
    trace(name, "--all")


@pytest.mark.tools
def test_a_wrong_annotation_is_found():
    """A mixer whose call says that it halves the width."""
    program = (
        "from tests.contract import annotations as a\n"
        "import jax, jaxtyping, beartype\n"
        "from seqmodels.mixers import linear_attention as m\n"
        "F = jaxtyping.Float[jax.Array, 'B T D']\n"
        "def call(self, x: F, state=None, *, reset=None) -> jaxtyping.Float[jax.Array, 'B T D/2']: return x\n"
        "m.Mixer.__call__ = jaxtyping.jaxtyped(call, typechecker=beartype.beartype)\n"
        "found = a.disagreements(['linear_attention'], False)\n"
        "assert len(found) == 1 and 'linear_attention-default None float32' in found[0], found\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_letters_are_those_of_the_legend():
    legend = set(re.findall(r"^\| ([A-Z]) \|", shapes.__doc__, re.MULTILINE))
    assert len(legend) > 15
    for part in PARTS:
        path = ROOT / "seqmodels" / part
        for file in path.rglob("*.py") if path.is_dir() else [path]:
            for axes in re.findall(r"\b(?:Float|Int|Int32|Bool|Complex)\[[\w.]+, \"([^\"]*)\"\]", file.read_text()):
                letters = {axis for axis in re.split(r"[\s*#]+", axes) if re.fullmatch(r"[A-Z]\w?", axis)}
                assert letters <= legend, f"{file.name}: {axes!r} has letters that seqmodels/shapes.py does not explain"
