"""Programs on a CPU compute what they say: the fusions that do not are off in every process of ours."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jaxlib
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


NOTEBOOK = """
import sys, warnings
import jax, jax.numpy as jnp
if sys.argv[1] == "used before":
    jnp.zeros(1).block_until_ready()
import numpy as np
import seqmodels
from seqmodels import ops, xla_cpu

numbers = np.random.default_rng(0)
q, k, v = (numbers.standard_normal((4, 16, 1, width), np.float32) for width in (8, 8, 128))

def energies(q, k, v):
    return jnp.sum(ops.gated_linear_attention(q, k, v)[0] ** 2, axis=(2, 3))

S = np.cumsum(k[..., :, None] * v[..., None, :], axis=1)
expected = np.sum(np.einsum("bthk,bthkv->bthv", q, S) ** 2, axis=(2, 3))

def error(**options):
    return abs(jax.jit(energies, **options)(q, k, v) / expected - 1).max()

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = [xla_cpu.fuses_reductions(), error(), error(compiler_options=xla_cpu.compiler_options())]
print(*found, *(each.message for each in caught))
"""


AS_SHIPPED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "false"}  # the compiler that people have; tests/conftest.py chooses another


@pytest.mark.tools
@pytest.mark.parametrize("when", ["imported first", "used before"])
def test_as_a_notebook_does_it(when):
    """A jit of one's own is right where seqmodels is imported before JAX is used; later there is one warning, whose cure cures."""
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK, when], cwd=ROOT, capture_output=True, text=True, timeout=600,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"} | AS_SHIPPED,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    fuses, wrong, cured, *said = done.stdout.split(maxsplit=3)
    assert float(cured) < 1e-4
    if when == "used before" and fuses == "True":
        assert not float(wrong) < 0.1, "this jaxlib computes it right: xla_cpu.AFFECTED can end before it"
        assert said[0].count("restart the process") == 1 and xla_cpu.RIGHT in said[0]
    else:
        assert fuses == "False" and float(wrong) < 1e-4 and not said


def test_here_it_is_off():
    assert not xla_cpu.fuses_reductions()
    xla_cpu.warn_of_wrong_fusions.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        xla_cpu.warn_of_wrong_fusions()


def test_a_choice_that_is_there_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"{xla_cpu.FLAG}=dot")
    xla_cpu.ask_for_right_fusions()
    assert os.environ["XLA_FLAGS"] == f"{xla_cpu.FLAG}=dot"
    monkeypatch.setattr(jaxlib.version, "__version_info__", xla_cpu.AFFECTED[1])
    monkeypatch.setenv("XLA_FLAGS", "")
    xla_cpu.ask_for_right_fusions()
    assert os.environ["XLA_FLAGS"] == ""


def test_every_version_that_may_be_installed_is_covered():
    """The upper end of the requirement is that of the mend: a newer jaxlib is let in only with `test_a_program_that_was_wrong`."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    lowest, highest = next(line for line in lines if line.startswith("jax>=")).removeprefix("jax>=").split(",<")
    assert tuple(tuple(map(int, version.split("."))) for version in (lowest, highest)) == xla_cpu.AFFECTED
