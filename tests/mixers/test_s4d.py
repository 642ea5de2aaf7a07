"""S4D and S4: the authors' layer, the initialisations, sizes, the two views."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels.errors import UserError
from seqmodels.mixers import s4d
from tests.goldens import Golden, golden_forms, load
from tests.mixers.goldens import assert_close, assert_layer, assert_normal, initial, num_parameters
from tests.programs import build


def in_our_names(golden: Golden) -> Golden:
    """The layer golden with complex numbers as two arrays and the GLU as two matrices."""
    arrays = {key: value for key, value in golden.arrays.items() if not key.startswith(("w.", "gw."))}
    for prefix in ("w.", "gw."):
        theirs = {key.removeprefix(prefix): x for key, x in golden.arrays.items() if key.startswith(prefix)}
        value, gate = np.split(theirs.pop("output_linear.0.weight")[..., 0], 2)
        value_bias, gate_bias = np.split(theirs.pop("output_linear.0.bias"), 2)
        C = theirs.pop("kernel.C")
        ours = {
            "log_dt": theirs.pop("kernel.log_dt"),
            "A_log": theirs.pop("kernel.log_A_real"),
            "A_imag": theirs.pop("kernel.A_imag"),
            "C_real": C[..., 0],
            "C_imag": C[..., 1],
            "D": theirs.pop("D"),
            "output_kernel": value,
            "output_bias": value_bias,
            "gate_kernel": gate,
            "gate_bias": gate_bias,
        }
        assert not theirs
        arrays |= {prefix + name: x for name, x in ours.items()}
    return dataclasses.replace(golden, arrays=arrays)


@pytest.mark.parametrize("implementation", golden_forms("recurrent", "associative", "parallel", "chunked"))
def test_layer(implementation):
    golden = in_our_names(load("layer_s4d"))
    config = s4d.Config(state_size=8, implementation=implementation, chunk_size=8)
    module = nnx.eval_shape(lambda: s4d.Mixer(config, 10, rngs=nnx.Rngs(params=0)))
    names = {key.removeprefix("w."): key.removeprefix("w.") for key in golden.arrays if key.startswith("w.")}
    assert_layer(module, golden, names, 1e-5)


@pytest.mark.parametrize("implementation", golden_forms("recurrent", "parallel", "chunked"))
def test_s4_is_the_dense_reference(implementation):
    golden = load("s4_dplr").arrays
    config = dataclasses.replace(s4d.Config.s4(), state_size=16, implementation=implementation, chunk_size=16)
    module = build(lambda rngs: s4d.Mixer(config, 3, rngs=rngs))
    module.log_dt[...] = jnp.asarray(golden["log_dt"], jnp.float32)
    module.A_log[...] = jnp.log(-jnp.asarray(golden["A_re"], jnp.float32))
    module.A_imag[...] = jnp.asarray(golden["A_im"], jnp.float32)
    for name in "PBC":
        for part in ("real", "imag"):
            getattr(module, f"{name}_{part}")[...] = jnp.asarray(getattr(golden[name][0], part), jnp.float32)
    y, _ = jax.jit(lambda u: module.ssm(u, None, None))(np.swapaxes(golden["u"], 1, 2))
    assert_close(jnp.swapaxes(y, 1, 2), golden["o"], 1e-5)


@pytest.mark.parametrize("init", ["lin", "inv", "real", "legs"])
def test_modes_at_initialisation(init):
    A = load("inits").arrays[f"s4d_{init}_A"]
    params = initial("s4d", s4d.Config(init=init), 32)
    assert params["A_log"].shape == (32, 32)
    found = -np.exp(params["A_log"].astype(np.float64)) + 1j * params["A_imag"]
    assert_close(found.real, np.tile(A.real, (32, 1)), 1e-6)
    # the reference's float32 cancels in "inv"
    np.testing.assert_allclose(found.imag, np.tile(A.imag, (32, 1)), rtol=5e-6, atol=0)


def test_the_rest_of_the_initialisation():
    params = initial("s4d", s4d.Config(), 512)
    log_dt = params["log_dt"]
    low, high = np.log(1e-3), np.log(1e-1)
    assert low <= log_dt.min() and log_dt.max() <= high
    assert abs(log_dt.mean() - (low + high) / 2) < 0.1 * (high - low)
    assert abs(log_dt.std() / ((high - low) / 12**0.5) - 1) < 0.1
    for part in ("real", "imag"):  # of a complex normal number of variance 1
        assert_normal(params[f"C_{part}"], 0.5**0.5)
    assert abs(params["D"].std() - 1) < 0.1 and abs(params["D"].mean()) < 0.15
    for name in ("output", "gate"):
        assert_normal(params[f"{name}_kernel"], 512**-0.5)
        assert not params[f"{name}_bias"].any()


def test_s4_at_initialisation():
    """Eigenvectors have arbitrary phases, so P and B do, together; the golden's B is clipped, sqrt(2) P is not."""
    arrays = load("inits").arrays
    params = initial("s4d", s4d.Config.s4(), 32)
    P, B = (params[f"{name}_real"][0] + 1j * params[f"{name}_imag"][0] for name in "PB")
    np.testing.assert_allclose(np.abs(P), np.abs(arrays["nplr_P"][0]), rtol=1e-6)
    np.testing.assert_allclose(B, 2**0.5 * P, rtol=1e-5)
    np.testing.assert_allclose(params["A_imag"][0], arrays["nplr_w"].imag, rtol=1e-6)


@pytest.mark.parametrize("d_model", [32, 96])
def test_sizes(d_model):
    def parameters(config):
        return num_parameters("s4d", config, d_model)

    assert parameters(s4d.Config.paper()) == 2 * d_model**2 + 2 * 64 * d_model + 4 * d_model
    assert parameters(s4d.Config.s4()) == 2 * d_model**2 + 4 * 64 * d_model + 4 * d_model


def test_state_is_real_parts_then_imaginary_parts():
    """After one step from nothing the state is dB x."""
    config = s4d.Config(state_size=4, init="lin", dt_min=0.05, dt_max=0.05)
    module = build(lambda rngs: s4d.Mixer(config, 32, rngs=rngs))
    x = np.ones((1, 1, 32), np.float32)
    _, state = module(x, module.init_state(1, 1))
    A = -0.5 - 1j * np.pi * np.arange(2)
    dB = np.expm1(0.05 * A) / A
    assert_close(state[0, 7], np.concatenate([dB.real, dB.imag]), 1e-6)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"state_size": 5}, "state_size=5 must be even"),
        ({"state_size": 0}, "state_size=0"),
        ({"init": "fout"}, "init='fout' is not one of lin, inv, real, legs"),
        ({"discretisation": "euler"}, "discretisation='euler'"),
        ({"structure": "dense"}, "structure='dense'"),
        ({"structure": "dplr"}, "discretisation='zoh' does not go with structure=dplr: set discretisation=bilinear"),
        ({"structure": "dplr", "init": "lin", "discretisation": "bilinear"}, "init='lin' does not go with"),
        ({"dt_min": 0.0}, "dt_min=0.0 must be positive"),
        ({"dt_min": 0.2}, "dt_max=0.1 must be at least dt_min=0.2"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_mistakes(options, complaint):
    with pytest.raises(UserError, match=complaint):
        s4d.Config(**options)
