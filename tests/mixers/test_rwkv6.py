"""RWKV-6's time mix: its authors' layer and initialisation, flash-linear-attention's checkpoint, decays of zero."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import model
from seqmodels.errors import UserError
from seqmodels.mixers import rwkv6
from tests.configs import layer_configs
from tests.goldens import golden_forms, load
from tests.mixers.goldens import (
    assert_close,
    assert_layer,
    assert_logits,
    assert_normal,
    assert_uniform,
    checkpoint_model,
    initial,
    num_parameters,
)
from tests.programs import build

IMPLEMENTATIONS = golden_forms("recurrent", "associative", "parallel", "chunked")
GOLDEN_SIZES = rwkv6.Config(num_heads=2, key_expansion=1.0, mix_rank=32, decay_rank=64)
BLENDS = ("w", "k", "v", "r", "g")
KERNELS = ("receptance", "key", "value", "gate", "output")


def ours(arrays, prefix):
    """The authors' tensors whose names begin with ``prefix``, by our names and in our layout; only those there are."""
    theirs = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    simple = {
        "shift_mix": ("time_maa_x", (16,)),
        "mix_in": ("time_maa_w1", (16, 160)),
        "mix_out": ("time_maa_w2", (5, 32, 16)),
        "decay_bias": ("time_decay", (16,)),
        "decay_in_kernel": ("time_decay_w1", (16, 64)),
        "decay_out_kernel": ("time_decay_w2", (64, 16)),
        "bonus": ("time_faaaa", (2, 8)),
        "head_scale": ("ln_x.weight", (2, 8)),
        "head_bias": ("ln_x.bias", (2, 8)),
    }
    found = {"mix": np.stack([theirs.pop(f"time_maa_{blend}").reshape(16) for blend in BLENDS])}
    for name, (torch_name, shape) in simple.items():
        if torch_name in theirs:
            found[name] = theirs.pop(torch_name).reshape(shape)
    for kernel in KERNELS:
        if f"{kernel}.weight" in theirs:
            found[f"{kernel}_kernel"] = theirs.pop(f"{kernel}.weight").T
    assert not theirs, "weights without a place"
    return found


def relaid():
    """The golden of the time mix in our names and layout (kernels transposed once more, because the helper transposes them)."""
    golden = load("layer_rwkv6_tmix")
    arrays = {name: golden.arrays[name] for name in ("x", "o", "cot_o", "grad_x")}
    for prefix in ("w.", "gw."):
        for name, array in ours(golden.arrays, prefix).items():
            arrays[prefix + name] = array.T if name.endswith("kernel") else array
    return dataclasses.replace(golden, arrays=arrays)


def numpy_time_mix(w, x):
    """The equations at the top of rwkv6.py, in float64, one step after another."""
    w = {name: np.asarray(array, np.float64) for name, array in w.items()}
    (B, T, D), (H, K) = x.shape, w["bonus"].shape
    S, last, outputs = np.zeros((B, H, K, K)), np.zeros((B, D)), []
    for t in range(T):
        xx, now = last - x[:, t], np.float64(x[:, t])
        low = np.tanh((now + xx * w["shift_mix"]) @ w["mix_in"]).reshape(B, 5, -1)
        x_w, x_k, x_v, x_r, x_g = (now + xx * (w["mix"][i] + low[:, i] @ w["mix_out"][i]) for i in range(5))
        decay = np.exp(-np.exp(w["decay_bias"] + np.tanh(x_w @ w["decay_in_kernel"]) @ w["decay_out_kernel"]))
        r, k, v = (
            (each @ w[f"{name}_kernel"]).reshape(B, H, K) for each, name in ((x_r, "receptance"), (x_k, "key"), (x_v, "value"))
        )
        kv = k[..., :, None] * v[..., None, :]
        o = np.einsum("bhk,bhkv->bhv", r, S + w["bonus"][:, :, None] * kv)
        S = decay.reshape(B, H, K, 1) * S + kv
        o = (o - o.mean(-1, keepdims=True)) / np.sqrt(o.var(-1, keepdims=True) + 64e-5)
        o = (o * w["head_scale"] + w["head_bias"]).reshape(B, D)
        g = x_g @ w["gate_kernel"]
        outputs.append((g / (1 + np.exp(-g)) * o) @ w["output_kernel"])
        last = now
    return np.stack(outputs, axis=1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_layer_of_the_authors(implementation):
    golden = relaid()
    module = nnx.eval_shape(
        lambda: rwkv6.Mixer(dataclasses.replace(GOLDEN_SIZES, implementation=implementation), 16, rngs=nnx.Rngs(params=0))
    )
    names = {name.removeprefix("w."): name.removeprefix("w.") for name in golden.arrays if name.startswith("w.")}
    assert_layer(module, golden, names, 1e-5, ungraded=("mix_in", "mix_out"))


def test_gradients_of_the_low_rank_blends():
    """The golden lacks these two: derivatives along random directions, against differences of the equations."""
    golden = load("layer_rwkv6_tmix").arrays
    weights, x, cotangent = ours(golden, "w."), golden["x"], golden["cot_o"]
    assert_close(numpy_time_mix(weights, x), golden["o"], 1e-9)
    module = nnx.eval_shape(lambda: rwkv6.Mixer(GOLDEN_SIZES, 16, rngs=nnx.Rngs(params=0)))
    graphdef = nnx.graphdef(module)

    @jax.jit
    def gradients(params):
        return jax.grad(lambda params: jnp.vdot(nnx.merge(graphdef, params)(x)[0], cotangent))(params)

    found = gradients(jax.tree.map(jnp.asarray, weights))
    rng = np.random.default_rng(0)
    for name in ("mix_in", "mix_out"):
        size = np.linalg.norm(found[name])
        for _ in range(4):
            direction = rng.standard_normal(weights[name].shape)
            step = 1e-5 * direction
            up, down = (
                np.vdot(numpy_time_mix(weights | {name: np.float64(weights[name]) + sign * step}, x), cotangent)
                for sign in (1, -1)
            )
            assert abs((up - down) / 2e-5 - np.vdot(np.float64(found[name]), direction)) < 1e-5 * size


def test_published_initialisation():
    """Block 1 of 3, exactly; the two random tensors within their bound."""
    published = ours(load("layer_rwkv6_tmix").arrays, "init.")
    params = initial("rwkv6", GOLDEN_SIZES, 16, layer_index=2, num_layers=6)
    for name, expected in published.items():
        if name in ("mix_out", "decay_out_kernel"):
            assert np.abs(params[name]).max() <= 0.01 and params[name].shape == expected.shape
        else:
            np.testing.assert_allclose(params[name], expected, rtol=0, atol=2e-6, err_msg=name)


def test_initialisation():
    params = initial("rwkv6", rwkv6.Config(mix_rank=32, decay_rank=64), 256)
    for name in ("mix_out", "decay_out_kernel"):
        assert_uniform(params[name], 0.01)
    for kernel in KERNELS:
        assert_normal(params[f"{kernel}_kernel"], 1 / 16)
    assert not params["mix_in"].any() and not params["decay_in_kernel"].any() and not params["head_bias"].any()
    assert np.array_equal(params["head_scale"], np.ones((4, 64)))


@pytest.mark.tools
@pytest.mark.parametrize("repeats", [1, 3])
def test_initialisation_in_a_model_goes_by_depth(repeats):
    """A model of L blocks has the published values of blocks 0 .. L - 1; one block is the first, not 0/0."""
    network = network_config(repeats=repeats, d_model=16, mixer=GOLDEN_SIZES)
    params = jax.jit(model.init_params, static_argnums=(0, 1))(network, 50, jax.random.key(0))
    found = params["layers"]["0_rwkv6"]["layer"]
    c, n = np.arange(16) / 16, np.arange(16) / 15
    for block in range(repeats):
        r0, r1 = (block / (repeats - 1) if block else 0.0), 1 - block / repeats
        np.testing.assert_allclose(found["mix"][block][2], 1 - c**r1 - 0.3 * r0, atol=2e-6)
        np.testing.assert_allclose(found["mix"][block][4], 1 - c ** (r1 / 2), atol=2e-6)
        np.testing.assert_allclose(found["decay_bias"][block], -6 + 5 * n ** (0.7 + 1.3 * r0), atol=2e-6)
        bonus = r0 * (1 - n) + 0.1 * ((np.arange(16) + 1) % 3 - 1)
        np.testing.assert_allclose(found["bonus"][block].reshape(16), bonus, atol=2e-6)


def network_config(*, repeats, d_model, mixer):
    pattern = "rwkv6 rwkv_channel_mix"
    return model.ModelConfig(
        d_model=d_model, pattern=pattern, repeats=repeats, tie_embeddings=False, embedding_norm=False, branch_rms=None,
        **layer_configs(pattern) | {"mixers": (("rwkv6", mixer),)},
    )  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_of_a_checkpoint(implementation):
    network, arrays = checkpoint_model("hf/fla_rwkv6", implementation=implementation)
    assert_logits(network, arrays, 5e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_decay_of_zero_stays_finite(implementation):
    """exp(w) overflows at w = 89; exp(-exp(w)) has been zero since w = 5, and so have its gradients."""
    x = np.random.default_rng(0).standard_normal((2, 20, 32)).astype(np.float32)
    module = build(lambda rngs: rwkv6.Mixer(rwkv6.Config(implementation=implementation), 32, rngs=rngs))
    graphdef, params = nnx.split(module)

    @jax.jit
    def value_and_gradients(params):
        def total(params):
            y, state = nnx.merge(graphdef, params)(x)
            return jnp.sum(y**2) + jnp.sum(state.memory**2), y

        return jax.value_and_grad(total, has_aux=True)(params)

    def at(w):
        return nnx.to_pure_dict(params) | {"decay_bias": jnp.full_like(module.decay_bias[...], w)}

    (_, expected), expected_gradients = value_and_gradients(at(8.0))
    (_, found), gradients = value_and_gradients(at(1000.0))
    np.testing.assert_array_equal(found, expected)
    jax.tree.map(np.testing.assert_array_equal, gradients, expected_gradients)
    assert not np.asarray(gradients["decay_bias"]).any() and np.isfinite(found).all()


def test_the_logarithm_of_the_decay_is_exact():
    module = build(lambda rngs: rwkv6.Mixer(rwkv6.Config(), 32, rngs=rngs))
    w = np.linspace(-8.0, 20.0, 16, dtype=np.float32)
    module.decay_bias[...] = jnp.asarray(w)
    log_decay = module.log_decay(jnp.zeros((1, 1, 32), jnp.bfloat16))
    assert log_decay.dtype == jnp.float32
    np.testing.assert_allclose(log_decay.reshape(-1), -np.exp(np.float64(w)), rtol=1e-6)


def test_sizes():
    D = 128
    for config, expected in [
        (rwkv6.Config(), 4 * D**2 + (10 * 8 + 1.5 * 16 + 9) * D),
        (rwkv6.Config.paper(D), 5 * D**2 + (10 * 32 + 2 * 64 + 10) * D),
    ]:
        assert num_parameters("rwkv6", config, D) == expected
    paper = nnx.eval_shape(lambda: rwkv6.Mixer(rwkv6.Config.paper(256), 256, rngs=nnx.Rngs(params=0)))
    assert (paper.config.num_heads, paper.key_head_dim, paper.value_head_dim) == (4, 64, 64)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_heads": 0}, "num_heads=0"),
        ({"mix_rank": 0}, "mix_rank=0"),
        ({"decay_rank": 0}, "decay_rank=0"),
        ({"num_heads": 3}, "num_heads=3 must divide"),
        ({"key_expansion": 0.0}, "key_expansion=0.0 must be positive"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_mistakes(options, complaint):
    with pytest.raises(UserError, match=complaint):
        rwkv6.Mixer(rwkv6.Config(**options), 32, rngs=nnx.Rngs(params=0))
