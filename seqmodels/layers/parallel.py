"""Mixers side by side on one input."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from seqmodels.layers.norm import RMSNorm


def call_mixer(name: str, mixer: nnx.Module, x, state, shared: dict[str, Any], *, reset):
    """(y, state, shared) of a mixer; ``shared`` is what layers of one kind pass on to the next, by the kind's name."""
    if name not in shared:
        return *mixer(x, state, reset=reset), shared
    y, state, new_shared = mixer(x, state, reset=reset, shared=shared[name])
    return y, state, shared | {name: new_shared}


class ParallelMixers(nnx.Module):
    """y = 1/n sum_i RMSNorm_i(mixer_i(x)), each norm with a scale of its own: after Hymba's fusion of heads (arXiv 2411.13676).

    Hymba adds the scaled norms of what its heads read and projects the sum; here each mixer projects first, by its own kernel.

    The norms bring what the mixers write to one magnitude, so that none is drowned. The state is a tuple, one entry a mixer.

    Args:
      parts: name and module of each mixer; a name may come twice.
    """

    def __init__(self, parts: list[tuple[str, nnx.Module]], d_model: int, *, eps: float, rngs: nnx.Rngs):
        self.names = tuple(name for name, _ in parts)
        self.mixers, self.norms = nnx.Dict(), nnx.Dict()
        for index, (name, mixer) in enumerate(parts):
            self.mixers[f"{index}_{name}"] = mixer
            self.norms[f"{index}_{name}"] = RMSNorm(d_model, eps=eps, rngs=rngs)

    def parts(self) -> list[tuple[str, nnx.Module]]:
        """Name and module of each mixer, in order."""
        return [(name, self.mixers[f"{index}_{name}"]) for index, name in enumerate(self.names)]

    def init_state(self, batch_size: int, max_len: int) -> tuple:
        return tuple(mixer.init_state(batch_size, max_len) for _, mixer in self.parts())

    def __call__(self, x: Float[Array, "B T D"], state, shared: dict[str, Any], *, reset=None):
        total, states = 0.0, []
        for index, (name, mixer) in enumerate(self.parts()):
            y, new_state, shared = call_mixer(name, mixer, x, None if state is None else state[index], shared, reset=reset)
            total = total + self.norms[f"{index}_{name}"](y) / len(self.names)
            states.append(new_state)
        return total, tuple(states), shared


def output_parameters(layer: nnx.Module) -> list[nnx.Param]:
    """The parameters that a layer's output is linear in, all together: its output kernel, or the norms of mixers side by side."""
    if isinstance(layer, ParallelMixers):
        return [norm.scale for norm in layer.norms.values()]
    return [layer.output_kernel]


def scale_output(layer: nnx.Module, factor: float | Float[Array, "*stack"]) -> None:
    """Multiply what a layer puts out; of stacked layers [R, ...] by a factor each, [R]."""
    for parameter in output_parameters(layer):
        value = parameter[...]
        factors = factor if isinstance(factor, float) else factor.reshape(*factor.shape, *[1] * (value.ndim - factor.ndim))
        parameter[...] = value * jax.numpy.asarray(factors, value.dtype)
