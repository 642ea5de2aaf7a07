"""Mamba-2: its authors' layer, transformers' scan and checkpoint, the authors' initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels.errors import UserError
from seqmodels.mixers import mamba2
from tests.goldens import golden_forms, load
from tests.mixers.goldens import (
    assert_close,
    assert_layer,
    assert_logits,
    assert_uniform,
    checkpoint_model,
    initial,
    num_parameters,
    places,
    shapes,
    weight_decay,
)
from tests.programs import build

IMPLEMENTATIONS = golden_forms("recurrent", "associative", "parallel", "chunked")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_layer_of_the_authors(implementation):
    golden = load("layer_mamba2")
    config = mamba2.Config(head_dim=8, d_state=8, num_groups=2, implementation=implementation)
    module = nnx.eval_shape(lambda: mamba2.Mixer(config, 16, rngs=nnx.Rngs(params=0)))
    assert_layer(module, golden, places("mamba2", shapes(module)), 5e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_of_a_checkpoint(implementation):
    network, arrays = checkpoint_model("hf/mamba2", implementation=implementation)
    assert_logits(network, arrays, 5e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["mamba2", "mamba2_dtlimit", "mamba2_strong"])
def test_scan_of_transformers(name, implementation):
    """The parameterisation and the recurrence: outputs, states, gradients, from zero and from a state."""
    golden = load(name).arrays
    (_, _, heads, width), (groups, states) = golden["x"].shape, golden["Bm"].shape[2:]
    limits = {"dt_smallest": 0.1, "dt_largest": 0.9} if name == "mamba2_dtlimit" else {}
    config = mamba2.Config(expand=1, head_dim=width, d_state=states, num_groups=groups, implementation=implementation, **limits)
    module = build(lambda rngs: mamba2.Mixer(config, heads * width, rngs=rngs))
    definition, params = nnx.graphdef(module), nnx.to_pure_dict(nnx.state(module, nnx.Param))
    names = ("x", "dt", "Bm", "C", "h0", "A_log", "D", "dt_bias")

    def scan(x, dt, Bm, C, h0, *of_heads):
        mixer = nnx.merge(definition, params | dict(zip(names[5:], of_heads)))
        o, memory = mixer.state_space(x, dt, Bm, C, None if h0 is None else jnp.swapaxes(h0, 2, 3), None)
        return o, jnp.swapaxes(memory, 2, 3)

    @jax.jit
    def run(inputs, cotangents):
        outputs, pull = jax.vjp(scan, *inputs)
        return scan(*inputs[:4], None, *inputs[5:]), outputs, pull(cotangents)

    from_zero, outputs, gradients = run([golden[key] for key in names], (golden["cot_o"], golden["cot_ht"]))
    for found, expected in zip((*from_zero, *outputs), ("o_zero", "ht_zero", "o", "ht")):
        assert_close(found, golden[expected], 5e-6, expected)
    for found, key in zip(gradients, names):
        assert_close(found, golden[f"grad_{key}"], 5e-6, f"gradient of {key}")


@pytest.mark.tools
def test_a_limit_holds_in_every_step():
    """One step at a time is one call, limits and all (transformers' single step forgets them)."""
    config = mamba2.Config(dt_smallest=0.5, dt_largest=0.6)
    module = build(lambda rngs: mamba2.Mixer(config, 32, rngs=rngs))
    x = jax.random.normal(jax.random.key(1), (2, 4, 32))
    whole, _ = module(x)
    state, steps = module.init_state(2, 4), []
    for t in range(4):
        y, state = module(x[:, t : t + 1], state)
        steps.append(y)
    assert_close(jnp.concatenate(steps, axis=1), whole, 1e-5)
    unlimited = build(lambda rngs: mamba2.Mixer(mamba2.Config(), 32, rngs=rngs))
    assert not np.allclose(unlimited(x)[0], whole, atol=1e-3)


def test_initialisation():
    """-A uniform in [1, 16], D = 1, dt log-uniform in [1e-3, 1e-1]; torch's defaults for the rest."""
    params = initial("mamba2", mamba2.Config(head_dim=1), 256)
    assert_uniform(np.exp(params["A_log"].astype(np.float64)) - 8.5, 7.5 * (1 + 1e-6))
    assert np.array_equal(params["D"], np.ones(512))
    assert np.array_equal(params["norm_scale"], np.ones(512))
    dt = np.logaddexp(params["dt_bias"].astype(np.float64), 0.0)
    assert_uniform(np.log(dt / 1e-2), np.log(10) * (1 + 1e-4))
    for name, fan_in, fan_out in [
        ("input", 256, 512 + 2 * 64),
        ("gate", 256, 512),
        ("dt", 256, 512),
        ("conv", 4, 512 + 2 * 64),
        ("output", 512, 256),
    ]:
        kernel = params[f"{name}_kernel"]
        assert kernel.shape == (fan_in, fan_out)
        assert_uniform(kernel, fan_in**-0.5)
    assert_uniform(params["conv_bias"], 0.5)


def test_what_weight_decay_leaves_alone():
    mask = weight_decay("mamba2", mamba2.Config(), 32)
    assert {name for name, decays in mask.items() if decays} == {
        "input_kernel",
        "gate_kernel",
        "conv_kernel",
        "output_kernel",
    }


@pytest.mark.parametrize(("config", "sizes"), [(mamba2.Config(), (32, 64, 1)), (mamba2.Config.paper(), (64, 128, 1))])
def test_sizes(config, sizes):
    assert (config.head_dim, config.d_state, config.num_groups) == sizes
    P, N, G = sizes
    D, E, W = 96, 192, 4
    expected = E * (3 * D + W + 2) + 2 * G * N * (D + W + 1) + E // P * (D + 3)
    assert num_parameters("mamba2", config, D) == expected
    module = nnx.eval_shape(lambda: mamba2.Mixer(config, D, rngs=nnx.Rngs(params=0)))
    state = jax.eval_shape(lambda: module.init_state(1, 100))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in state) == 4 * (E * N + (W - 1) * (E + 2 * G * N))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"expand": 0}, "mamba2.expand=0"),
        ({"head_dim": 0}, "mamba2.head_dim=0"),
        ({"head_dim": 48}, "mamba2.head_dim=48 must divide the inner width 64"),
        ({"d_state": 0}, "mamba2.d_state=0"),
        ({"num_groups": 3}, "mamba2.num_groups=3 must divide the 2 heads"),
        ({"conv_width": 0}, "mamba2.conv_width=0"),
        ({"dt_smallest": -1.0}, "mamba2.dt_smallest=-1.0"),
        ({"dt_smallest": 0.1, "dt_largest": 0.1}, "mamba2.dt_largest=0.1 must be above dt_smallest=0.1"),
        ({"chunk_size": 0}, "mamba2.chunk_size=0"),
    ],
)
def test_mistakes(options, complaint):
    with pytest.raises(UserError, match=complaint):
        mamba2.Mixer(mamba2.Config(**options), 32, rngs=nnx.Rngs(params=0))
