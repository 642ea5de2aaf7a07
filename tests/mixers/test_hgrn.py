"""HGRN and HGRN2: flash-linear-attention's checkpoints, the gate of the paper, and the bounds that cross layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import mixers, model
from seqmodels.errors import UserError
from seqmodels.mixers import hgrn2
from seqmodels.ops.lower_bounds import LowerBounds, bounded_gate
from tests.configs import tiny
from tests.goldens import golden_forms, load
from tests.mixers.goldens import assert_close, assert_logits, assert_normal, checkpoint_model, initial
from tests.programs import fast_jit

KERNELS = {
    "hgrn": ("input", "gate_logit", "gate", "output"),
    "hgrn2": ("query", "gate_logit", "value", "output"),
}


@pytest.mark.parametrize("implementation", golden_forms("recurrent", "associative", "chunked"))
@pytest.mark.parametrize("mixer", KERNELS)
def test_logits_of_a_checkpoint(mixer, implementation):
    network, arrays = checkpoint_model(f"hf/fla_{mixer}", implementation=implementation)
    assert_logits(network, arrays, 5e-5)


def test_gate_of_table_1():
    arrays = load("table1_gates").arrays
    x, kernel, bound = (jnp.asarray(arrays[name], jnp.float32) for name in ("x", "W_k", "gamma"))
    log_alpha, complement = bounded_gate(x @ kernel, bound)
    assert_close(log_alpha, arrays["loga_hgrn2"], 1e-6)
    assert_close(complement, -np.expm1(arrays["loga_hgrn2"]), 1e-6)


@pytest.mark.parametrize("bound", [0.0, 1e-6, 0.3, 1.0 - 1e-6])
def test_gate_against_float64(bound):
    """Values to float32's last digits, also where alpha rounds to 0 or 1; gradients finite and right."""
    logits = np.array([-300.0, -100.0, -20.0, -1.0, 0.0, 1.0, 20.0, 100.0, 300.0], np.float32)
    gamma = np.float64(np.float32(bound))
    sigmoid, complement = (np.exp(-np.logaddexp(0.0, sign * logits.astype(np.float64))) for sign in (-1, 1))
    with np.errstate(divide="ignore"):
        log_alpha = np.where(gamma > 0, np.log(gamma + (1 - gamma) * sigmoid), -np.logaddexp(0.0, -np.float64(logits)))
    ours, rest = bounded_gate(jnp.asarray(logits), jnp.float32(bound))
    np.testing.assert_allclose(ours, log_alpha, rtol=2e-6, atol=1e-7)  # logaddexp rounds relative to its larger term
    np.testing.assert_allclose(rest, (1 - gamma) * complement, rtol=2e-6, atol=1e-37)
    slopes = jax.vmap(jax.grad(lambda z: bounded_gate(z, jnp.float32(bound))[0]))(jnp.asarray(logits))
    # d log(gamma + (1 - gamma) s) / dz = (1 - gamma) s (1 - s) / alpha
    np.testing.assert_allclose(slopes, (1 - gamma) * sigmoid * complement / np.exp(log_alpha), rtol=1e-5, atol=1e-7)
    to_bound = jax.grad(lambda gamma: bounded_gate(jnp.asarray(logits), gamma)[0].sum())(jnp.float32(bound))
    assert np.isfinite(to_bound)


def test_bounds_grow_with_depth_from_zero():
    rows = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    shares = np.exp(rows.astype(np.float64))
    shares /= shares.sum(axis=0)
    told = LowerBounds.of_layers(jnp.asarray(rows))
    for depth in range(5):
        np.testing.assert_allclose(told.current(), shares[1 : depth + 1].sum(axis=0), rtol=1e-5, atol=0)
        told = told.next_layer()


@pytest.mark.tools
@pytest.mark.parametrize("mixer", ["hgrn", "hgrn2"])
def test_every_layer_among_others_has_its_own_bound(mixer):
    """Depth counts layers of the kind over positions and repeats, in training and in one-token steps."""
    config = tiny(**{"model.pattern": f"{mixer} mlp {mixer}", "model.repeats": 2}).model
    params = fast_jit(functools.partial(model.init_params, config, 50))(jax.random.key(0))
    random = np.random.default_rng(1)
    rows = random.standard_normal((4, 32)).astype(np.float32)
    for position in (0, 2):
        params["layers"][f"{position}_{mixer}"]["layer"]["lower_bound_logit"] = jnp.asarray(rows[position // 2 :: 2])
    network = model.merge(model.graphdef(config, 50), params)
    expected = LowerBounds.of_layers(jnp.asarray(rows))

    tokens = jnp.asarray(random.integers(0, 50, (2, 6)), jnp.int32)
    x = network.embed(tokens)
    apply = fast_jit(lambda layer, x, shared: layer(x, None, shared, reset=None, dropout_key=None))
    for repeat in range(2):
        for layer in network._layers():
            layer = jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], layer)
            shared = {mixer: expected} if layer.name == mixer else {}
            x, _, after = apply(layer, x, shared)
            expected = after[mixer] if shared else expected
    assert int(expected.layer) == 4
    written_out = network.logits(network.final_norm(x))
    call = fast_jit(network)
    logits, _ = call(tokens)
    np.testing.assert_allclose(logits, written_out, rtol=0, atol=1e-5)

    state = network.unstack_state(network.init_state(2, 6))
    for t in range(6):
        step, state = call(tokens[:, t : t + 1], state)
        np.testing.assert_allclose(step[:, 0], written_out[:, t], rtol=0, atol=2e-5)

    definition = model.graphdef(config, 50)
    gradients = fast_jit(jax.grad(lambda params: model.merge(definition, params)(tokens)[0].var()))(params)
    for position in (0, 2):
        assert np.abs(gradients["layers"][f"{position}_{mixer}"]["layer"]["lower_bound_logit"]).max() > 0.0


@pytest.mark.parametrize("mixer", ["hgrn", "hgrn2"])
def test_initialisation_and_sizes(mixer):
    params = initial(mixer, mixers.load(mixer).Config(), 128)
    for name in KERNELS[mixer]:
        assert params[f"{name}_kernel"].shape == (128, 128)
        assert_normal(params[f"{name}_kernel"], 128**-0.5)
    assert np.array_equal(params["norm"]["scale"], np.ones(128))
    assert np.array_equal(params["lower_bound_logit"], np.zeros(128))  # equal shares: bounds rise evenly with depth
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 4 * 128**2 + 2 * 128


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"num_heads": 3}, "num_heads=3 must divide"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_mistakes(options, complaint):
    with pytest.raises(UserError, match=complaint):
        hgrn2.Mixer(hgrn2.Config(**options), 32, rngs=nnx.Rngs(params=0))
