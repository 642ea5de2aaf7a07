"""The depths that RWKV's initialisation counts with."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int


class RWKVDepth(NamedTuple):
    """How deep a layer lies, in the two numbers RWKV's initialisation counts with."""

    reached: float | Float[Array, ""]  # l / (L - 1): 0 in the first block, 1 in the last; 0 where there is one block
    remaining: float | Float[Array, ""]  # 1 - l / L: 1 in the first block, 1/L in the last


def rwkv_depth(layer_index: int | Int[Array, ""], num_layers: int) -> RWKVDepth:
    """Published for blocks of a mixer and a channel layer, so two residual layers are a block here.

    In the pattern "rwkv6 mlp" layers 2 l and 2 l + 1 are block l of L, as published; in any other pattern depth
    grows at the same rate.

    Args:
      layer_index: of the residual layer, from 0; may be traced.
      num_layers: residual layers in the model.
    """
    block, blocks = layer_index // 2, -(-num_layers // 2)
    return RWKVDepth(block / max(blocks - 1, 1), 1.0 - block / blocks)
