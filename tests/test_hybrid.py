"""The published Mamba-2 hybrid and its small version, and patterns that repeat nothing."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import hybrid
from seqmodels import model
from seqmodels.config import from_config_dict
from seqmodels.errors import UserError
from tests.programs import fast_jit

pytestmark = pytest.mark.tools


def counts(letters):
    return collections.Counter(hybrid.pattern(letters).split())


def test_published_layers():
    """Section 3.2 of arXiv 2406.07887: 56 layers, 24 Mamba-2, 4 attention, 28 MLP; 8.66 billion parameters."""
    assert counts(hybrid.PUBLISHED) == {"mamba2": 24, "attention": 4, "mlp": 28}
    config = from_config_dict(hybrid.get_config("published"))
    assert config.model.repeats == 1
    params = model.param_shapes(config.model, 256_000)
    billions = sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e9
    assert billions == pytest.approx(8.66, rel=0.01)


def test_the_small_version_has_the_published_proportions():
    config = hybrid.get_config("small")
    words = collections.Counter(config.model.pattern.split())
    assert {word: 4 * count for word, count in words.items()} == counts(hybrid.PUBLISHED)
    assert hybrid.PUBLISHED.startswith("M-M-M--M-M*-M-")


def test_an_unknown_size_is_one_line():
    with pytest.raises(UserError, match="there is no hybrid 'large'; known: small, published, swa, parallel"):
        hybrid.get_config("large")


def test_the_small_version_decodes_what_it_trains():
    config = hybrid.get_config("small")
    config.model.d_model = 32
    config.model.branch_rms = None  # half the time to compile
    network = from_config_dict(config).model
    params = fast_jit(lambda key: model.init_params(network, 50, key))(jax.random.key(0))
    merged = model.merge(model.graphdef(network, 50), params)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 7)), jnp.int32)
    logits, _ = fast_jit(lambda tokens: merged(tokens))(tokens)

    def step(state, token):
        logits, state = merged(token[:, None], state)
        return state, logits[:, 0]

    _, steps = fast_jit(lambda state: jax.lax.scan(step, state, tokens.T))(merged.init_state(2, 7))
    np.testing.assert_allclose(jnp.moveaxis(steps, 0, 1), logits, rtol=0, atol=1e-4)
