"""Kinds of parameters: weight decay applies to a ``Weight`` alone, and every matrix says what it is.

Weight decay (AdamW's, arXiv 1711.05101) pulls weights towards zero. It never touches norms, biases, the parameters of gates and
decays and those of SSMs (A, C, D, ...): for those zero is a choice of memory, not "small".
"""

import jax
from flax import nnx


class Weight(nnx.Param):
    """A matrix that weight decay applies to."""


class NoWeightDecay(nnx.Param):
    """A matrix that weight decay leaves alone. A vector is an ``nnx.Param``, and left alone as well."""


def weight_decay_of(module: nnx.Module, stacked: str | None = None) -> dict:
    """True where weight decay applies, a nested dict like the module's parameters.

    Args:
      module: its parameters may be shapes alone.
      stacked: name of the attribute whose parameters have an axis in front that stacks layers.

    Raises:
      ValueError: a matrix is neither a Weight nor a NoWeightDecay.
    """

    def applies(path, parameter):
        names = [str(getattr(part, "key", part)) for part in path]
        if type(parameter) is nnx.Param and parameter.get_value().ndim - (names[0] == stacked) > 1:
            raise ValueError(f"{'/'.join(names)} is a matrix: make it a Weight, or a NoWeightDecay where zero is not small")
        return isinstance(parameter, Weight)

    state = nnx.state(module, nnx.Param)
    return nnx.to_pure_dict(jax.tree_util.tree_map_with_path(applies, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))
