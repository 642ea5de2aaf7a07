"""H3: the authors' layers at one channel and at four channels a head, the initialisation, the shift."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels.errors import UserError
from seqmodels.mixers import h3
from tests.goldens import Golden, golden_forms, load
from tests.mixers.goldens import assert_close, assert_layer, assert_normal, assert_uniform, initial, num_parameters
from tests.programs import build

IMPLEMENTATIONS = golden_forms("recurrent", "associative", "parallel", "chunked")


def in_our_names(golden: Golden, head_dim: int) -> Golden:
    """The layer golden with complex numbers as two arrays and W_o's rows in our order (heads first)."""
    arrays = {key: value for key, value in golden.arrays.items() if not key.startswith(("w.", "gw."))}
    for prefix in ("w.", "gw."):
        theirs = {key.removeprefix(prefix): x for key, x in golden.arrays.items() if key.startswith(prefix)}
        output = theirs.pop("output_linear.weight")
        # their input channel d2 H + h is our h P + d2
        output = output.reshape(len(output), head_dim, -1).swapaxes(1, 2).reshape(output.shape)
        B, C = theirs.pop("kernel.kernel.B"), theirs.pop("kernel.kernel.C")[0]
        ours = {
            "output_kernel": output,
            "output_bias": theirs.pop("output_linear.bias"),
            "shift_B": theirs.pop("ssm_k_kernel.kernel.B"),
            "shift_C": theirs.pop("ssm_k_kernel.kernel.C")[0],
            "shift_D": theirs.pop("ssm_k_D"),
            "log_dt": theirs.pop("kernel.kernel.log_dt"),
            "A_log": theirs.pop("kernel.kernel.inv_A_real"),
            "A_imag": theirs.pop("kernel.kernel.A_imag"),
            "B_real": B[..., 0],
            "B_imag": B[..., 1],
            "C_real": C[..., 0],
            "C_imag": C[..., 1],
            "D": theirs.pop("D"),
        }
        for name in ("query", "key", "value"):
            ours[f"{name}_kernel"] = theirs.pop(f"{name[0]}_proj.weight")
            ours[f"{name}_bias"] = theirs.pop(f"{name[0]}_proj.bias")
        assert not theirs
        arrays |= {prefix + name: x for name, x in ours.items()}
    return dataclasses.replace(golden, arrays=arrays)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("head_dim", [1, 4])
def test_layer(head_dim, implementation):
    """Measured: values 3e-7, gradients 2e-6 of the largest."""
    golden = in_our_names(load(f"layer_h3_hd{head_dim}"), head_dim)
    config = h3.Config(head_dim=head_dim, state_size=8, shift_size=8, implementation=implementation, chunk_size=8)
    module = nnx.eval_shape(lambda: h3.Mixer(config, 12, rngs=nnx.Rngs(params=0)))
    names = {key.removeprefix("w."): key.removeprefix("w.") for key in golden.arrays if key.startswith("w.")}
    assert_layer(module, golden, names, 1e-5)


def test_steps_of_the_authors():
    golden = in_our_names(load("layer_h3_hd1"), 1)
    module = build(lambda rngs: h3.Mixer(h3.Config(state_size=8, shift_size=8), 12, rngs=rngs))
    for key, value in golden.arrays.items():
        if key.startswith("w."):
            name = key.removeprefix("w.")
            getattr(module, name)[...] = jnp.asarray(value.T if name.endswith("kernel") else value)
    x = golden.arrays["x"]
    state, outputs = module.init_state(x.shape[0], x.shape[1]), []
    step = jax.jit(lambda x, state: module(x, state))
    for t in range(x.shape[1]):
        y, state = step(x[:, t : t + 1], state)
        outputs.append(y[:, 0])
    assert_close(np.stack(outputs, axis=1), golden.arrays["o_step"], 1e-5)


def test_the_shift_is_a_convolution_with_the_correlation_of_b_and_c():
    module = build(lambda rngs: h3.Mixer(h3.Config(shift_size=5), 32, rngs=rngs))
    random = np.random.default_rng(0)
    B, C, D = random.standard_normal((32, 5)), random.standard_normal((32, 5)), random.standard_normal(32)
    for name, value in (("B", B), ("C", C), ("D", D)):
        getattr(module, f"shift_{name}")[...] = jnp.asarray(value, jnp.float32)
    kernel = np.stack([(B[:, : 5 - age] * C[:, age:]).sum(axis=1) for age in range(5)])
    kernel[0] += D
    assert_close(module.shift_weight()[::-1], kernel, 1e-6)


def test_initialisation():
    """At the start the shift's kernel is C, Kaiming over all channels, plus the skip; one step size per head."""
    params = initial("h3", h3.Config(), 256)
    assert np.array_equal(params["shift_B"], np.tile(np.eye(64)[0], (256, 1)))
    assert_uniform(params["shift_C"], (256 * 64) ** -0.5)
    for name in ("query", "key", "value", "output"):
        assert_normal(params[f"{name}_kernel"], 1 / 16)
        assert not params[f"{name}_bias"].any()
    for part in ("real", "imag"):
        assert_normal(params[f"C_{part}"], 0.5**0.5)
    modes = np.tile(load("inits").arrays["s4d_lin_A"], (256, 1))
    assert_close(-np.exp(params["A_log"]), modes.real, 1e-6)
    assert_close(params["A_imag"], modes.imag, 1e-6)
    assert np.array_equal(params["B_real"] + 1j * params["B_imag"], np.ones((256, 32)))
    low, high = np.log(1e-3), np.log(1e-1)
    assert low <= params["log_dt"].min() and params["log_dt"].max() <= high
    assert abs(params["log_dt"].mean() - (low + high) / 2) < 0.1 * (high - low)


@pytest.mark.parametrize(("d_model", "head_dim"), [(32, 1), (96, 1), (96, 8)])
def test_sizes(d_model, head_dim):
    per_channel, per_head = 2 * 4 + 5, 3 * 16 + 2
    expected = 4 * d_model**2 + per_channel * d_model + per_head * d_model // head_dim
    assert num_parameters("h3", h3.Config(head_dim=head_dim, state_size=16, shift_size=4), d_model) == expected


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"head_dim": 0}, "head_dim=0 must be at least 1"),
        ({"head_dim": 5}, "head_dim=5 must divide"),
        ({"shift_size": 0}, "shift_size=0"),
        ({"state_size": 3}, "state_size=3 must be even"),
        ({"init": "hippo"}, "init='hippo' is not one of"),
        ({"discretisation": "euler"}, "discretisation='euler'"),
        ({"dt_min": 0.2}, "dt_max=0.1 must be at least dt_min=0.2"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_mistakes(options, complaint):
    with pytest.raises(UserError, match=complaint):
        h3.Mixer(h3.Config(**options), 32, rngs=nnx.Rngs(params=0))
