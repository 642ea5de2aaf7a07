"""What attention looks at: the weights times the values are the layer, and the picture is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import model
from seqmodels.errors import UserError
from seqmodels.evaluation import plots
from seqmodels.mixers import attention
from tests.configs import tiny
from tests.programs import fast_jit

pytestmark = pytest.mark.tools


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "window": 3, "qk_norm": True}], ids=str)
def test_weights_times_values_are_the_layer(options):
    mixer = attention.Mixer(attention.Config(**options), 32, rngs=nnx.Rngs(params=0))
    x = jax.random.normal(jax.random.key(1), (2, 9, 32))
    weights = mixer.weights(x)
    v = jnp.repeat((x @ mixer.value_kernel[...]).reshape(2, 9, -1, 8), 4 // mixer.num_kv_heads, axis=2)
    o = jnp.einsum("bhts,bshk->bthk", weights, v).reshape(2, 9, 32)
    np.testing.assert_allclose(o @ mixer.output_kernel[...], mixer(x)[0], atol=1e-5)
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)


def test_a_model_gives_every_attention_layer_in_order(tmp_path):
    """Of a hybrid, from the embedding on: the last layer's are those of its own input."""
    config = tiny(**{"model.pattern": "attention mlp linear_attention attention", "model.repeats": 2}).model
    params = fast_jit(model.init_params, static_argnums=(0, 1))(config, 20, jax.random.key(0))
    network = model.merge(model.graphdef(config, 20), params)
    tokens = np.arange(12).reshape(2, 6)
    weights = np.asarray(fast_jit(lambda network: network.attention_weights(tokens))(network))
    assert weights.shape == (4, 2, 4, 6, 6) and weights.dtype == np.float32
    x = network.embed(tokens)
    first = jax.tree.map(lambda leaf: leaf[0], network.layers["0_attention"])
    np.testing.assert_allclose(weights[0], first.layer.weights(first.norm(x)), atol=1e-6)
    assert not np.allclose(weights[0], weights[1], atol=1e-3)
    plots.attention_weights(weights[:, 0], tmp_path / "weights.png", list("abcdef"))
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")


def test_no_attention_no_weights():
    config = tiny(**{"model.pattern": "hgrn mlp"}).model
    params = model.param_shapes(config, 20)
    with pytest.raises(UserError, match="no attention"):
        model.merge(model.graphdef(config, 20), params).attention_weights(np.zeros((1, 3), np.int32))
