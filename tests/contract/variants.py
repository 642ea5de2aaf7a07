"""Options worth a contract of their own, beside each mixer's default Config: mixer -> variant -> changed fields.

A mixer that is missing here is tested with its defaults alone.
"""

VARIANTS: dict[str, dict[str, dict]] = {
    "attention": {
        "grouped_window_qknorm": {"num_kv_heads": 2, "window": 9, "qk_norm": True},
        "no_rope": {"rope": False},
    },
    "gated_deltanet": {
        "grouped_negative": {"num_heads": 2, "num_value_heads": 4, "allow_neg_eigval": True},
    },
    "gateloop": {
        "max_heads_cartesian": {"num_heads": 32, "key_expansion": 1.0, "gate": "cartesian"},
    },
    "h3": {
        "heads": {"head_dim": 4, "state_size": 8, "shift_size": 5},
    },
    "linear_attention": {
        "no_normaliser": {"normalize": False, "feature_map": "identity"},
        "conv": {"conv_width": 4},
    },
    "mamba2": {
        "groups_and_limits": {"head_dim": 16, "num_groups": 2, "dt_smallest": 0.01, "dt_largest": 0.5},
    },
    "mlstm": {
        "v2": {"block": "v2"},
    },
    "s4d": {
        "s4": {"structure": "dplr", "discretisation": "bilinear"},
    },
}
