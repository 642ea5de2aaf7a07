"""Pure functions on arrays: one per recurrence, in all its forms. Layout [batch, time, heads, feature] throughout."""

from seqmodels.ops.causal_conv import causal_conv
from seqmodels.ops.complex_decay import complex_gated_linear_attention
from seqmodels.ops.delta_rule import delta_rule
from seqmodels.ops.diagonal_ssm import diagonal_ssm
from seqmodels.ops.dispatch import IMPLEMENTATIONS, record_choices
from seqmodels.ops.dplr_ssm import dplr_ssm
from seqmodels.ops.embedding import embedding
from seqmodels.ops.gated_linear_attention import gated_linear_attention
from seqmodels.ops.linear_recurrence import linear_recurrence
from seqmodels.ops.long_conv import long_conv
from seqmodels.ops.lstm import lstm
from seqmodels.ops.mlstm_cell import mlstm_cell
from seqmodels.ops.placement import on_mesh
from seqmodels.ops.rotary import rotary
from seqmodels.ops.selective_scan import selective_scan
from seqmodels.ops.softmax_attention import softmax_attention
from seqmodels.ops.target import compile_for, interpret
from seqmodels.ops.token_shift import token_shift

__all__ = [
    "IMPLEMENTATIONS",
    "causal_conv",
    "compile_for",
    "complex_gated_linear_attention",
    "delta_rule",
    "diagonal_ssm",
    "dplr_ssm",
    "embedding",
    "gated_linear_attention",
    "interpret",
    "linear_recurrence",
    "long_conv",
    "lstm",
    "mlstm_cell",
    "on_mesh",
    "record_choices",
    "rotary",
    "selective_scan",
    "softmax_attention",
    "token_shift",
]
