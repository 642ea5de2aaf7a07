"""Causal convolution with a kernel as long as the sequence: the convolution view of S4, S4D, H3 and Hyena.

    y_t = sum over l <= min(t, W - 1) of kernel[l] x_{t - l}          (arXiv 2111.00396, eq. 5)

by FFT, O(T log T), where the sum itself is O(T W).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from seqmodels.ops.placement import per_shard


@per_shard({"x": "b _ h", "kernel": "h"}, results="b _ h")
def long_conv(x: Float[Array, "B T D"], kernel: Float[Array, "D W"]) -> Float[Array, "B T D"]:
    """Convolves every channel with its own kernel, causally, in float32.

    The price of an FFT: errors are about 1e-7 of a channel's largest output, not of each output (gradients to later
    inputs are that small instead of zero), and a NaN or an infinity spoils its row and channel at all steps, earlier
    ones too. There is no state and no ``reset``: convolve documents separately, or run the recurrent view.

    Args:
      x: inputs.
      kernel: response to an impulse after 0, 1, ... steps. It may be shorter than the sequence (zero from there on) or
        longer (what lies beyond T steps is not used).

    Returns:
      y, in the dtype of ``x``.

    Raises:
      ValueError: shapes that do not fit.
    """
    if x.ndim != 3 or kernel.ndim != 2 or kernel.shape[0] != x.shape[2] or 0 in (x.shape[1], kernel.shape[1]):
        raise ValueError(
            f"x must be [B, T, D] and kernel [D, W] with T, W >= 1; got x {list(x.shape)}, kernel {list(kernel.shape)}"
        )
    steps = x.shape[1]
    taps = min(steps, kernel.shape[1])
    # The FFT convolves around a circle: it must be long enough that the end does not come round to the first steps.
    length = _fast_length(steps + taps - 1)
    x_spectrum = jnp.fft.rfft(jnp.swapaxes(x, 1, 2).astype(jnp.float32), n=length)
    kernel_spectrum = jnp.fft.rfft(kernel[:, :taps].astype(jnp.float32), n=length)
    y = jnp.fft.irfft(x_spectrum * kernel_spectrum, n=length)[..., :steps]
    return jnp.swapaxes(y, 1, 2).astype(x.dtype)


def _fast_length(least: int) -> int:
    """The shortest even length >= ``least`` of the form 2^i or 3 * 2^i, both of which every FFT library does fast."""
    power = 1 << (least - 1).bit_length()
    shorter = 3 * power // 4
    return shorter if shorter >= least and shorter % 2 == 0 else power
