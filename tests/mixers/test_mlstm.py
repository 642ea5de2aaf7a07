"""mLSTM: the layer of its authors' code (v1), transformers' checkpoint (v2), the initialisation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import model
from seqmodels.errors import UserError
from seqmodels.mixers import mlstm
from seqmodels.training.optimizer import decay_mask
from tests.goldens import Golden, load, read_safetensors
from tests.mixers.goldens import assert_close, assert_layer, assert_normal, assert_uniform, initial

IMPLEMENTATIONS = ("recurrent", "associative", "parallel", "chunked")
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def in_our_layout(golden: Golden) -> Golden:
    """Their weights so that a transpose makes ours of them: two projections in one, blocks [out, in], 1 + w in the norm."""
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
    module = mlstm.Mixer(mlstm.Config(num_heads=2, implementation=implementation), 12, rngs=nnx.Rngs(params=0))
    assert_layer(module, golden, names, 1e-5)
