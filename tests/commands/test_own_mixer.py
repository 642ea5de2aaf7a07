"""The walk of README's "Add a mixer": its class, in a file of its own, is found, trained, decoded and cited like the others."""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import seqmodels
from seqmodels import mixers, references
from seqmodels.training import loop
from tests.configs import tiny

pytestmark = pytest.mark.tools

ROOT = Path(__file__).parents[2]
HEAD = '''"""Leaky average: each channel of the state fades at a rate read from the token.

    h_t = a_t h_{t-1} + (1 - a_t) v_t

"Were RNNs all we needed?", arXiv 2410.01201.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from seqmodels.layers import Weight, dense, normal_init
from seqmodels.ops import linear_recurrence

'''


@pytest.fixture()
def leaky(tmp_path):
    """README's mixer in a folder that the registry reads too."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"## Add a mixer\n.*?```python\n(.*?)```", readme, flags=re.DOTALL)[1]
    folder = tmp_path / "mixers"
    folder.mkdir()
    (folder / "leaky.py").write_text(HEAD + code)
    mixers.__path__.append(str(folder))
    references.of_mixer.cache_clear()
    yield "leaky"
    mixers.__path__.remove(str(folder))
    references.of_mixer.cache_clear()
    sys.modules.pop("seqmodels.mixers.leaky", None)
    vars(mixers).pop("leaky", None)


def test_the_walk(leaky, tmp_path):
    assert leaky in mixers.names() and mixers.pattern(leaky) == "leaky mlp"
    module = mixers.load(leaky)
    layer = module.Mixer(module.Config(), 32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 9, 32))
    whole, _ = layer(x)
    state, parts = layer.init_state(2, 9), []
    for piece in (x[:, :4], x[:, 4:5], x[:, 5:]):
        y, state = layer(piece, state)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=0, atol=1e-6)
    config = tiny(**{
        "model.pattern": "leaky mlp", "model.repeats": 1, "data.cache_dir": str(tmp_path / "cache"), "train.steps": 8,
        "train.eval_tokens": 512, "train.sample_every_steps": 0, "train.compilation_cache_dir": "",
    })  # fmt: skip
    summary = loop.train(config, tmp_path / "run")
    run = seqmodels.load_run(tmp_path / "run")
    assert summary["step"] == 8 and summary["state_bytes"] == run.state_bytes(32) == 4 * 32
    assert len(run.generate("Once", max_tokens=5, temperature=0).encode()) >= 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["pattern"] == "leaky mlp"
    assert references.of_mixer(leaky).bibtex.startswith("@misc{leaky_2410.01201,\n  title = {Were RNNs all we needed?}")
