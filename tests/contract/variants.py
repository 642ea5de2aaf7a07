"""Options worth a contract of their own, beside each mixer's default Config: mixer -> variant -> changed fields.

A mixer that is missing here is tested with its defaults alone.
"""

VARIANTS: dict[str, dict[str, dict]] = {
    "attention": {
        "grouped_window_qknorm": {"num_kv_heads": 2, "window": 9, "qk_norm": True},
        "no_rope": {"rope": False},
    },
    "linear_attention": {
        "no_normaliser": {"normalize": False, "feature_map": "identity"},
    },
    "mamba2": {
        "groups_and_limits": {"head_dim": 16, "num_groups": 2, "dt_smallest": 0.01, "dt_largest": 0.5},
    },
}
