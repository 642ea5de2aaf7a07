"""Which token comes next: the options that a person sets, and the choice from logits."""

import dataclasses
import functools
from typing import Annotated, Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from seqmodels.ranges import Above, AtMost, Checked, Count, NonNegative

_SMALLEST: Final = float(np.finfo(np.float32).tiny)  # a device may take a smaller float for 0
_LARGEST: Final = float(np.finfo(np.float32).max)
# Below it, and where the quotient would overflow float32, logits are divided after the largest is subtracted.
_SMALL_TEMPERATURE: Final = 1e-6


Probability = Annotated[float, Above(0), AtMost(1)]


@dataclasses.dataclass(frozen=True)
class Sampling(Checked):
    """How a token is drawn: temperature first, then top-k, top-p and min-p, each of what the others left.

    As an argument of a compiled function only `greedy` and `top_k` are compiled in; the other values are traced.

    Raises:
        UserError: a value is out of its range.
    """

    temperature: NonNegative = 0.8  # divides the logits; 0 takes the likeliest token
    top_k: Count | None = None  # among the k likeliest tokens only
    # among the fewest likeliest tokens whose probability reaches p (Holtzman et al. 2020, section 3.1)
    top_p: Probability | None = None
    # among tokens at least p times as probable as the likeliest (Nguyen et al. 2024, arXiv 2407.01082, section 3)
    min_p: Probability | None = None
    greedy: bool = dataclasses.field(init=False, repr=False)  # the likeliest token, whatever the other options

    def __post_init__(self):
        object.__setattr__(self, "greedy", False)
        super().__post_init__()
        object.__setattr__(self, "greedy", self.temperature < _SMALLEST)


def _flatten(sampling: Sampling):
    if sampling.greedy:
        return (None, None, None), (True, None)
    return (sampling.temperature, sampling.top_p, sampling.min_p), (False, sampling.top_k)


def _unflatten(static, traced) -> Sampling:
    """Without the checks: the values are tracers."""
    sampling = object.__new__(Sampling)
    values = zip(("temperature", "top_p", "min_p", "greedy", "top_k"), (*traced, *static), strict=True)
    for name, value in values:
        object.__setattr__(sampling, name, value)
    return sampling


jax.tree_util.register_pytree_node(Sampling, _flatten, _unflatten)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws the tokens of a batch: the options, the key, and what the ids are.

    A row's token depends on the key, its place in the key's sequence, its place in the batch, and nothing of the other rows.
    """

    sampling: Sampling
    key: Key[Array, ""]
    ends: tuple[int, ...] = ()  # tokens that end a text
    # ids that are tokens; None: all are. A model may have more rows than its tokenizer has tokens.
    is_token: Bool[Array, " L"] | None = None
    first_row: Int[Array, ""] | int = 0  # place of the first row, where the batch is a part of a longer list

    def __call__(self, logits: Float[Array, "B L"], index: Int[Array, ""]) -> Int[Array, " B"]:
        """The token of each row at a place of the key's sequence."""
        key = jax.random.fold_in(self.key, index)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, self.first_row + jnp.arange(logits.shape[0]))
        return sample(logits, keys, self.sampling, self.is_token)

    def is_end(self, token: Int[Array, " B"]) -> Bool[Array, " B"]:
        """Which tokens end their texts."""
        return functools.reduce(jnp.logical_or, (token == end for end in self.ends), jnp.zeros(token.shape, bool))


def sample(
    logits: Float[Array, "B L"],
    keys: Key[Array, " B"],
    sampling: Sampling,
    is_token: Bool[Array, " L"] | None = None,
) -> Int[Array, " B"]:
    """One token per row, with a key per row.

    Args:
        is_token: only these ids are drawn; None: all.
    """
    logits = _of_tokens(logits.astype(jnp.float32), is_token)
    if sampling.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = _divided(logits, sampling.temperature)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        # By their places, not by the k-th value: of tokens with equal logits only so many stay.
        likeliest = jax.lax.top_k(logits, sampling.top_k)[1]
        logits = _only(logits, likeliest, True)
    if sampling.top_p is not None:
        descending = jnp.argsort(-logits, axis=-1, stable=True)
        probability = jax.nn.softmax(jnp.take_along_axis(logits, descending, axis=-1), axis=-1)
        likelier = jnp.cumsum(probability, axis=-1) - probability
        # The likeliest token always stays: nothing is likelier than it.
        logits = _only(logits, descending, likelier < sampling.top_p)
    if sampling.min_p is not None:
        # A ratio of probabilities is a difference of logits: what the others left out does not matter.
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _of_tokens(logits: Float[Array, "B L"], is_token: Bool[Array, " L"] | None) -> Float[Array, "B L"]:
    """The logits, -inf of what is no token, of which one at least is finite: where none was, as of a model that has diverged,
    all tokens are alike."""
    tokens = jnp.zeros(logits.shape[-1]) if is_token is None else jnp.where(is_token, 0.0, -jnp.inf)
    logits = jnp.where(jnp.isnan(logits), -jnp.inf, jnp.minimum(logits, _LARGEST)) + tokens
    return jnp.where(jnp.max(logits, axis=-1, keepdims=True) > -jnp.inf, logits, tokens)


def _divided(logits: Float[Array, "B L"], temperature: Any) -> Float[Array, "B L"]:
    largest = jnp.max(logits, axis=-1, keepdims=True)
    is_shifted = (temperature < _SMALL_TEMPERATURE) | ~jnp.isfinite(largest / temperature)
    return (logits - jnp.where(is_shifted, largest, 0.0)) / temperature


def _only(logits: Float[Array, "B L"], places: Int[Array, "B K"], stay: Any) -> Float[Array, "B L"]:
    """The logits at those places of each row that stay, all others -inf."""
    kept = jnp.zeros(logits.shape, bool)
    kept = jnp.put_along_axis(kept, places, stay, axis=-1, inplace=False)
    return jnp.where(kept, logits, -jnp.inf)
