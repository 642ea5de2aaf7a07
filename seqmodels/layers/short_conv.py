"""A short convolution in front of a mixer, and which mixers have one of their own."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from seqmodels.layers.init import fan_in_uniform_init
from seqmodels.layers.parameters import Weight
from seqmodels.ops.causal_conv import causal_conv

SHORT_CONVS = ("own", "none", "all")
TAPS = 4  # steps the convolution sees, the current one among them


class ShortConv(nnx.Module):
    """x + conv(x): causal, depthwise, four taps, without an activation.

    A Canon layer at position A ("Physics of Language Models: Part 4.1", arXiv 2512.17351): after the norm, before the mixer.
    The state is the last three inputs.
    """

    def __init__(self, d_model: int, *, rngs: nnx.Rngs):
        self.conv_kernel = Weight(fan_in_uniform_init(rngs.params(), (TAPS, d_model)))

    def init_state(self, batch_size: int) -> Float[Array, "B tail D"]:
        """Zeros: nothing read yet."""
        return jnp.zeros((batch_size, TAPS - 1, self.conv_kernel.shape[-1]), jnp.float32)

    def __call__(
        self, x: Float[Array, "B T D"], tail: Float[Array, "B tail D"] | None = None, *, reset: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B tail D"]]:
        """T steps that follow those of ``tail``; ``reset`` marks the steps at which a new document starts."""
        y, tail = causal_conv(x, self.conv_kernel[...], state=tail, reset=reset)
        return x + y, tail


def has_short_conv(config: Any) -> bool:
    """Whether a mixer's own input passes a short convolution or a token shift.

    A mixer's Config says so by ``has_short_conv``; without it one with more than one tap in ``conv_width`` has.
    """
    if hasattr(config, "has_short_conv"):
        return config.has_short_conv
    return hasattr(config, "conv_width") and config.conv_width > 1


def without_short_conv(config: Any) -> Any:
    """A mixer's Config whose convolution sees the current step alone; one without ``conv_width`` is left as it is."""
    return dataclasses.replace(config, conv_width=1) if hasattr(config, "conv_width") and has_short_conv(config) else config
