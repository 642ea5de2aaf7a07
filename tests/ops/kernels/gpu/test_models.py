"""Which models get the kernels for a GPU: every mixer at the widths of models with its default heads, or in words why not."""

import jax
import jax.numpy as jnp
import pytest

from configs import tinystories
from seqmodels import mixers, model, ops
from seqmodels.config import from_config_dict

pytestmark = pytest.mark.gpu_kernels

WIDTHS = (288, 768, 1024, 2048)
WITH_KERNELS = ("gated_linear_attention", "delta_rule", "selective_scan", "linear_recurrence")
# By mixer: at which widths it takes another form, and why.
LEFT = {
    "deltanet": ({2048}, "K = 512 key channels are more than 256"),
    "kda": ({2048}, "K = 512 key channels are more than 256"),
    "dfw": ({2048}, "K = 256 key channels are more than 128"),  # decays on both sides
    "gateloop": ({*WIDTHS}, "float32 q and k ask for float32 products"),  # complex decays turn q and k
}


def choices_of(name: str, width: int) -> list[str]:
    config = tinystories.get_config(name)
    config.model.d_model, config.model.repeats, config.model.compute_dtype = width, 1, "bfloat16"
    config = from_config_dict(config).model
    definition, shapes = model.graphdef(config, 64), model.param_shapes(config, 64)
    with ops.compile_for("gpu"), ops.record_choices() as choices:
        jax.eval_shape(lambda params: model.merge(definition, params)(jnp.zeros((1, 128), jnp.int32)), shapes)
    return [line for line in choices if line.split(":")[0] in WITH_KERNELS]


@pytest.mark.parametrize("name", mixers.names())
def test_a_kernel_or_why_not(name):
    widths, reason = LEFT.get(name, ((), ""))
    for width in WIDTHS:
        for line in choices_of(name, width):
            if width in widths:
                assert f"not gpu/{line.split(':')[0]}: " in line or "not gpu/chunk_scan: " in line
                assert reason in line
            else:
                assert ": pallas gpu/" in line, (width, line)
