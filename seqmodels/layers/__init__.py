"""The parts that architectures share: projections, norms, initial values."""

from seqmodels.layers.delta import DeltaInputs, delta_beta, delta_inputs
from seqmodels.layers.dense import dense, matmul_precision
from seqmodels.layers.elementwise import dropout, soft_cap
from seqmodels.layers.heads import head_widths
from seqmodels.layers.init import fan_in_uniform_init, normal_init, step_size_bias_init, xavier_uniform_init
from seqmodels.layers.norm import NORMS, LayerNorm, RMSNorm, gated_rms_norm, l2_norm, rms_norm
from seqmodels.layers.parallel import ParallelMixers, call_mixer, scale_output
from seqmodels.layers.parameters import NoWeightDecay, Weight, weight_decay_of
from seqmodels.layers.positions import sinusoids
from seqmodels.layers.rwkv_depth import RWKVDepth, rwkv_depth
from seqmodels.layers.short_conv import SHORT_CONVS, ShortConv, has_short_conv, without_short_conv

__all__ = [
    "DeltaInputs",
    "LayerNorm",
    "NORMS",
    "NoWeightDecay",
    "ParallelMixers",
    "RMSNorm",
    "RWKVDepth",
    "SHORT_CONVS",
    "ShortConv",
    "Weight",
    "call_mixer",
    "delta_beta",
    "delta_inputs",
    "dense",
    "dropout",
    "fan_in_uniform_init",
    "gated_rms_norm",
    "has_short_conv",
    "head_widths",
    "l2_norm",
    "matmul_precision",
    "normal_init",
    "rms_norm",
    "rwkv_depth",
    "scale_output",
    "sinusoids",
    "soft_cap",
    "step_size_bias_init",
    "weight_decay_of",
    "without_short_conv",
    "xavier_uniform_init",
]
