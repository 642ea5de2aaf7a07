"""How widths are split over heads."""

from typing import Any

from seqmodels.errors import UserError


def head_widths(config: Any, d_model: int, *, keys: int, values: int) -> tuple[int, int]:
    """``(K, V)``, the widths of one head's keys and values.

    Args:
      config: a mixer's options, of which ``num_heads`` and ``where`` are read.
      keys: the width of the keys of all heads, which comes from d_model and the options.
      values: of the values.

    Raises:
      UserError: the heads do not divide them, or one is 0.
    """
    K, odd_keys = divmod(keys, config.num_heads)
    V, odd_values = divmod(values, config.num_heads)
    if odd_keys or odd_values or not keys or not values:
        raise UserError(
            f"{config.where}.num_heads={config.num_heads} must divide the widths of keys ({keys}) and values ({values}), "
            f"which come from model.d_model={d_model} and the expansions"
        )
    return K, V
