"""Programs on a CPU compute what they say: the fusions that do not are off in every process of ours."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from seqmodels import mixers, xla_cpu

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="of the CPU's compiler")


def layer(name, d_model, implementation):
    module = mixers.load(name)
    fields = {"implementation": implementation} if hasattr(module.Config(), "implementation") else {}
    return module.Mixer(module.Config(**fields), d_model, rngs=nnx.Rngs(0))


def jitted(mixer):
    return jax.jit(lambda x: mixer(x)[0])


def error_where_axes_are_alike(name, size):
    """Of a jitted layer on as many sequences as each has steps, against its recurrent form."""
    x = jax.random.normal(jax.random.key(1), (size, size, 64))
    found, expected = (np.asarray(jitted(layer(name, 64, form))(x)) for form in (None, "recurrent"))
    return np.abs(found - expected).max() / np.abs(expected).max()


def test_a_program_that_was_wrong():
    assert error_where_axes_are_alike("mamba2", 64) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 32, 64, 128])
@pytest.mark.parametrize("name", mixers.names())
def test_axes_of_one_length(name, size):
    assert error_where_axes_are_alike(name, size) < 1e-4


PROGRAM = """
import sys, warnings
import jax.numpy as jnp
from seqmodels import xla_cpu
if sys.argv[1] == "early":
    xla_cpu.ask_for_right_fusions()
jnp.zeros(1).block_until_ready()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    xla_cpu.avoid_wrong_fusions()
print(xla_cpu.fuses_reductions(), [str(each.message) for each in caught])
"""


@pytest.mark.parametrize(("when", "flags"), [("early", "--xla_force_host_platform_device_count=2"), ("late", "")])
def test_when_it_is_asked(when, flags):
    """In time it takes effect, beside flags that are there; too late it says so."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, when], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if when == "early":
        assert done.stdout == "False []\n"
    elif done.stdout.startswith("True"):
        assert f"start the process with XLA_FLAGS={xla_cpu.RIGHT}" in done.stdout
    else:
        pytest.skip("this jaxlib does not fuse reductions")


def test_here_it_is_off():
    assert not xla_cpu.fuses_reductions()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        xla_cpu.avoid_wrong_fusions()


def test_a_choice_that_is_there_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"{xla_cpu.FLAG}=dot")
    xla_cpu.ask_for_right_fusions()
    assert os.environ["XLA_FLAGS"] == f"{xla_cpu.FLAG}=dot"
    monkeypatch.setattr(xla_cpu.jaxlib.version, "__version_info__", (0, 12))
    monkeypatch.setenv("XLA_FLAGS", "")
    xla_cpu.ask_for_right_fusions()
    assert os.environ["XLA_FLAGS"] == ""
