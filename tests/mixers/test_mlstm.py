"""mLSTM: the layer of its authors' code (v1), transformers' checkpoint (v2), the initialisation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import ops
from seqmodels.config import MeshConfig
from seqmodels.errors import UserError
from seqmodels.mixers import mlstm
from seqmodels.training import sharding
from tests.goldens import Golden, golden_forms, load
from tests.mixers.goldens import (
    assert_layer,
    assert_logits,
    assert_normal,
    assert_uniform,
    checkpoint_model,
    initial,
    num_parameters,
    weight_decay,
)
from tests.programs import build

IMPLEMENTATIONS = golden_forms("recurrent", "associative", "parallel", "chunked")
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def in_our_layout(golden: Golden) -> Golden:
    """Their weights so that a transpose makes ours of them; they have two projections in one, and 1 + w in the norm."""
    arrays = dict(golden.arrays)
    for prefix in ("w.", "gw."):
        arrays[prefix + "up"], arrays[prefix + "z"] = np.split(arrays.pop(prefix + "proj_up.weight"), 2)
        arrays[prefix + "conv1d.conv.weight"] = arrays[prefix + "conv1d.conv.weight"][:, 0]
        for name in "qkv":
            blocks = arrays[f"{prefix}{name}_proj.weight"]
            arrays[f"{prefix}{name}_proj.weight"] = blocks.transpose(0, 2, 1).T
    arrays["w.mlstm_cell.outnorm.weight"] = 1 + arrays["w.mlstm_cell.outnorm.weight"]
    return dataclasses.replace(golden, arrays=arrays)


@every_implementation
def test_layer_of_the_authors(implementation):
    golden = in_our_layout(load("layer_mlstm"))
    names = {
        "up_kernel": "up",
        "gate_kernel": "z",
        "conv_kernel": "conv1d.conv.weight",
        "conv_bias": "conv1d.conv.bias",
        "query_kernel": "q_proj.weight",
        "key_kernel": "k_proj.weight",
        "value_kernel": "v_proj.weight",
        "input_gate_logit_kernel": "mlstm_cell.igate.weight",
        "input_gate_logit_bias": "mlstm_cell.igate.bias",
        "forget_gate_logit_kernel": "mlstm_cell.fgate.weight",
        "forget_gate_logit_bias": "mlstm_cell.fgate.bias",
        "head_norm_scale": "mlstm_cell.outnorm.weight",
        "skip_scale": "learnable_skip",
        "output_kernel": "proj_down.weight",
    }
    module = nnx.eval_shape(
        lambda: mlstm.Mixer(mlstm.Config(num_heads=2, implementation=implementation), 12, rngs=nnx.Rngs(params=0))
    )
    assert_layer(module, golden, names, 1e-5)


@every_implementation
def test_logits_of_a_checkpoint(implementation):
    network, arrays = checkpoint_model("hf/xlstm", implementation=implementation, chunk_size=16)
    assert_logits(network, arrays, 5e-5)


@pytest.mark.parametrize(
    ("blocks", "on_a_device"),
    [
        ((16, 4, 4), [(8, 4, 4), (2, 3, 8, 4)]),
        ((1, 64, 64), [(1, 64, 64), (1, 3, 1, 64)]),
    ],  # one block: rows lie on ``tensor``, too
)
def test_a_device_multiplies_by_its_own_blocks(blocks, on_a_device):
    """XLA gets no product to partition: it summed other blocks' gradients where the blocks lie on ``tensor`` and ``fsdp``."""
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 3, 64), blocks))
    with ops.on_mesh(sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), 8)):
        traced = jax.make_jaxpr(mlstm.block_diagonal)(x, kernel)
    (placed,) = [each for each in traced.eqns if each.primitive.name == "shard_map"]
    assert [each.aval.shape for each in placed.params["jaxpr"].invars] == on_a_device


def test_initialisation_of_v1():
    """Of the authors' code: normal, sqrt(2 / 5D), for projections; gates that read nothing yet, open to forget little."""
    params = initial("mlstm", mlstm.Config(), 256)
    for name in ("up_kernel", "gate_kernel"):
        assert params[name].shape == (256, 512)
        assert_normal(params[name], (2 / (5 * 256)) ** 0.5)
    for name in ("query_kernel", "key_kernel", "value_kernel"):
        assert params[name].shape == (128, 4, 4)
        assert_normal(params[name], (2 / (5 * 256)) ** 0.5)
    assert_uniform(params["conv_kernel"], 0.5)
    assert np.abs(params["conv_bias"]).max() <= 0.5
    assert_normal(params["output_kernel"], 512**-0.5)
    for name in ("input_gate_logit_kernel", "forget_gate_logit_kernel"):
        assert params[name].shape == (3 * 512, 4) and not params[name].any()
    assert np.allclose(params["forget_gate_logit_bias"], [3, 4, 5, 6])
    assert np.array_equal(params["head_norm_scale"], np.ones(512))
    assert np.array_equal(params["skip_scale"], np.ones(512))


def test_initialisation_of_v2():
    params = initial("mlstm", mlstm.Config(block="v2"), 256)
    for name, width in {"query": 128, "key": 128, "value": 256, "gate": 256}.items():
        assert params[f"{name}_kernel"].shape == (256, width)
        assert_normal(params[f"{name}_kernel"], (2 / (5 * 256)) ** 0.5)
    assert_normal(params["output_kernel"], 1 / 16)
    assert not params["input_gate_logit_kernel"].any() and not params["forget_gate_logit_kernel"].any()
    assert np.allclose(params["forget_gate_logit_bias"], [3, 4, 5, 6])


@pytest.mark.parametrize(("options", "mean"), [({}, 0.0), ({"block": "v2", "input_bias": -10.0}, -10.0)])
def test_initial_input_gates(options, mean):
    config = mlstm.Config(num_heads=32, **options)
    biases = [initial("mlstm", config, 64, seed)["input_gate_logit_bias"] for seed in range(60)]
    assert_normal(np.concatenate(biases) - np.float32(mean), 0.1)


def test_gates_are_not_decayed():
    decayed = {name for name, is_decayed in weight_decay("mlstm", mlstm.Config(), 32).items() if is_decayed}
    assert decayed == {f"{name}_kernel" for name in ("up", "gate", "conv", "query", "key", "value", "output")}


@pytest.mark.parametrize(
    ("block", "parameters", "state"),
    [
        ("v1", lambda D, H: 6 * D**2 + (38 + 12 * H) * D + 2 * H, lambda D, H: 4 * D**2 // H + 2 * D + H + 3 * 2 * D),
        ("v2", lambda D, H: 4 * D**2 + (2 * H + 1) * D + 2 * H, lambda D, H: D**2 // (2 * H) + D // 2 + H),
    ],
)
def test_sizes(block, parameters, state):
    config = mlstm.Config(block=block)
    assert num_parameters("mlstm", config, 128) == parameters(128, 4)
    module = nnx.eval_shape(lambda: mlstm.Mixer(config, 128, rngs=nnx.Rngs(params=0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(module.init_state(1, 1000))) == state(128, 4)


def test_presets():
    assert mlstm.Config.paper() == mlstm.Config()
    module = nnx.eval_shape(lambda: mlstm.Mixer(mlstm.Config.xlstm_7b(), 256, rngs=nnx.Rngs(params=0)))
    assert (module.key_head_dim, module.value_head_dim) == (16, 32)


def test_gates_of_v2_are_capped():
    """15 tanh(logit / 15), in float32 whatever the activations are."""
    config = mlstm.Config(block="v2")
    module = build(lambda rngs: mlstm.Mixer(config, 32, rngs=rngs))
    module.input_gate_logit_bias[...] = jnp.asarray([-1000.0, -15.0, 1.0, 1000.0])
    logits, _ = module._gate_logits(jnp.ones((1, 1, 32), jnp.bfloat16))
    assert logits.dtype == jnp.float32
    assert np.allclose(logits, 15 * np.tanh(np.asarray([-1000.0, -15.0, 1.0, 1000.0]) / 15))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"block": "v3"}, "block='v3' is not one of v1, v2"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_heads": 3}, "num_heads=3 must divide"),
        ({"block": "v2", "num_heads": 32}, "num_heads=32 must divide"),
        ({"projection_block": 3}, "projection_block=3 must divide the inner width 64"),
        ({"conv_width": 0}, "conv_width=0"),
        ({"expansion": 0.0}, "expansion=0.0 must be positive"),
        ({"gate_cap": -1.0}, "gate_cap=-1.0 must be positive"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_mistakes(options, complaint):
    with pytest.raises(UserError, match=complaint):
        mlstm.Mixer(mlstm.Config(**options), 32, rngs=nnx.Rngs(params=0))
