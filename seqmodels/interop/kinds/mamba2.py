"""Mamba-2, as transformers saves it. Their in_proj holds z, then x, B and C, then dt.

A time_step_limit holds in every form here; transformers' own step by step form forgets it.
"""

import math

from seqmodels.interop import mamba_family
from seqmodels.interop.table import OMIT, Derived, Field, Kind, Tensor


def limits(smallest, largest):
    return float(smallest), None if math.isinf(largest) else float(largest)


def written_limits(ours):
    smallest, largest = ours["mixer.dt_smallest"], ours["mixer.dt_largest"]
    if smallest == 0.0 and largest is None:
        return OMIT  # the default, whose infinity JSON cannot say
    return [smallest, math.inf if largest is None else largest]


KIND = Kind(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    library="transformers",
    pattern="mamba2",
    fields=(
        *mamba_family.FIELDS,
        Field("tie_word_embeddings", "tie_embeddings", default=False),
        Field("expand", "mixer.expand", default=2),
        Field("head_dim", "mixer.head_dim", default=64),
        Derived("num_heads", lambda ours: ours["mixer.expand"] * ours["d_model"] // ours["mixer.head_dim"]),
        Field("n_groups", "mixer.num_groups", default=8),
        Field("layer_norm_epsilon", "norm_eps mixer.norm_eps", default=1e-5),
        Field(
            "time_step_limit",
            "mixer.dt_smallest mixer.dt_largest",
            default=(0.0, math.inf),
            read=lambda both, theirs: limits(*both),
            write=written_limits,
        ),
    ),
    outer=mamba_family.OUTER,
    layers="backbone.layers.{}.",
    inner=(
        Tensor("norm.weight", "mixer_norm/scale"),
        Tensor("mixer.in_proj.weight", "mixer/gate_kernel mixer/input_kernel mixer/dt_kernel"),
        Tensor("mixer.conv1d.weight", "mixer/conv_kernel"),
        Tensor("mixer.conv1d.bias", "mixer/conv_bias"),
        Tensor("mixer.dt_bias", "mixer/dt_bias"),
        Tensor("mixer.A_log", "mixer/A_log"),
        Tensor("mixer.D", "mixer/D"),
        Tensor("mixer.norm.weight", "mixer/norm_scale"),
        Tensor("mixer.out_proj.weight", "mixer/output_kernel"),
    ),
    ignored=mamba_family.IGNORED | {"chunk_size", "time_step_rank"},
)
