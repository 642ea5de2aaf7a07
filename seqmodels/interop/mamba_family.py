"""What transformers' checkpoints of Mamba, FalconMamba and Mamba-2 have alike."""

from seqmodels.interop.table import Field, Fixed, Tensor


def dt_rank(ours):
    """Written out where it follows from the width."""
    rank = ours["mixer.dt_rank"]
    return -(-ours["d_model"] // 16) if rank is None else rank


FIELDS = (
    Field("vocab_size", "vocab_size"),
    Field("hidden_size", "d_model"),
    Field("num_hidden_layers", "repeats"),
    Field("state_size", "mixer.d_state"),
    Field("conv_kernel", "mixer.conv_width", default=4),
    Fixed("hidden_act", ("silu",)),
    Fixed("use_bias", (False,)),
    Fixed("use_conv_bias", (True,)),
)

# Initialisation, kernels, and what configs converted from the authors' own still have.
IGNORED = frozenset(
    "rescale_prenorm_residual residual_in_fp32 time_step_floor time_step_init_scheme time_step_max time_step_min "
    "time_step_scale use_associative_scan use_mambapy rms_norm d_inner d_model n_layer fused_add_norm "
    "pad_vocab_size_multiple ssm_cfg".split()
)

OUTER = (
    Tensor("backbone.embeddings.weight", "embedding"),
    Tensor("backbone.norm_f.weight", "final_norm/scale"),
    Tensor("lm_head.weight", "output_kernel"),
)

# Of the first two, whose state space is Mamba's.
SELECTIVE_FIELDS = (
    Field("layer_norm_epsilon", "norm_eps", default=1e-5),
    Field(
        "time_step_rank",
        "mixer.dt_rank",
        default="auto",
        read=lambda rank, theirs: -(-theirs["hidden_size"] // 16) if rank == "auto" else rank,
        write=dt_rank,
    ),
)
SELECTIVE_INNER = (
    Tensor("norm.weight", "mixer_norm/scale"),
    Tensor("mixer.in_proj.weight", "mixer/input_kernel mixer/gate_kernel"),
    Tensor("mixer.conv1d.weight", "mixer/conv_kernel"),
    Tensor("mixer.conv1d.bias", "mixer/conv_bias"),
    Tensor("mixer.x_proj.weight", "mixer/selection_kernel"),
    Tensor("mixer.dt_proj.weight", "mixer/dt_kernel"),
    Tensor("mixer.dt_proj.bias", "mixer/dt_bias"),
    Tensor("mixer.A_log", "mixer/A_log"),
    Tensor("mixer.D", "mixer/D"),
    Tensor("mixer.out_proj.weight", "mixer/output_kernel"),
)
