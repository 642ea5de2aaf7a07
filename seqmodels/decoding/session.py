"""The state of a model after reading a text, as a value: to continue from (twice is a fork), save and load.

A recurrent state has one size, whatever was read. A cache of keys and values has room for a number of tokens; where more
are to come than it has room for, a larger one is made by reading all tokens again.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from seqmodels import model, suggest
from seqmodels.data import atomic
from seqmodels.decoding import generate
from seqmodels.decoding.sampling import Sampler
from seqmodels.errors import UserError
from seqmodels.escape import html_table
from seqmodels.formats import json_text, npz
from seqmodels.formats.limits import excerpt

Params = Any  # the pure dict of arrays that trainer.init() and a checkpoint hold

RECORD: Final = "record"
LOGITS: Final = "logits"
# Names in the file -> fields.
FIELDS: Final = {"tokens": "tokens", "sampled": "sampled", "capacity": "capacity", "made_by": "params_fingerprint"}


@dataclasses.dataclass(frozen=True, eq=False)
class DecodingState:
    """A model's state after reading a text. Nothing changes it: what goes on from it is another one.

    Two are equal where all their numbers are, whatever devices hold them.
    """

    tokens: tuple[int, ...]  # all that was read, what was sampled included
    sampled: int  # how many of them `continue_from` sampled: the next one's index in the sequence of a key
    logits: Float[Array, "1 L"]  # of the token that comes next
    state: model.UnstackedState  # of a batch of one
    capacity: int  # tokens that the state was made for; a state that does not grow with it holds any number
    params_fingerprint: str  # what names the parameters

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DecodingState):
            return NotImplemented
        if self._key() != other._key():
            return False
        (own, structure), (theirs, their_structure) = (jax.tree.flatten((of.logits, of.state)) for of in (self, other))
        return structure == their_structure and all(map(np.array_equal, own, theirs))

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        return tuple(getattr(self, field) for field in FIELDS.values())

    def __repr__(self) -> str:
        return f"DecodingState({', '.join(f'{name} {value}' for name, value in self._facts().items())})"

    def _repr_html_(self) -> str:
        return html_table("DecodingState", self._facts())

    def _facts(self) -> dict[str, object]:
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        return {
            "tokens": f"{len(self.tokens):,}",
            "sampled": f"{self.sampled:,}",
            "capacity": f"{self.capacity:,}",
            "bytes": f"{size:,}",
            "model": self.params_fingerprint[:8],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one .npz file, whole or not at all.

        Raises:
            UserError: the disk refuses.
        """
        record = json.dumps({name: getattr(self, field) for name, field in FIELDS.items()})
        leaves = {name: np.asarray(leaf) for name, leaf in _named(self.state).items()}
        with atomic.disk_errors_as_user_errors("file for the state", os.path.dirname(os.path.abspath(path))):
            atomic.write_whole(
                path,
                lambda file: np.savez(file, **{RECORD: np.asarray(record), LOGITS: np.asarray(self.logits)}, **leaves),
            )


def read(
    graphdef: nnx.GraphDef,
    params: Params,
    tokens: Sequence[int],
    *,
    params_fingerprint: str,
    after: DecodingState | None = None,
    extra_capacity: int = 0,
) -> DecodingState:
    """Read a text, or go on reading after what was read before.

    Compiles once for each power of two: a first text is padded to one, a later one is read in pieces of such lengths.

    Args:
        tokens: at least one, unless there is an `after`.
        params_fingerprint: names `params`, to tell states of other models by.
        after: what was read before; it stays as it is.
        extra_capacity: tokens that are to come later.

    Raises:
        UserError: there is nothing to read, or a state of that capacity is more than the device has.
    """
    tokens = tuple(map(int, tokens))
    after = None if after is None else _beside(params, after)
    if after is None or not _has_room(graphdef, params, after, len(tokens) + extra_capacity):
        everything, sampled = (tokens, 0) if after is None else (after.tokens + tokens, after.sampled)
        padded, reset = generate.pad_prompts([everything])
        capacity = padded.shape[1] + extra_capacity
        generate.check_capacity(graphdef, params, 1, capacity)
        logits, state = generate.prefill(graphdef, params, padded, reset, capacity=capacity)
        return DecodingState(everything, sampled, logits, state, capacity, params_fingerprint)
    logits, state, begin = after.logits, after.state, 0
    while begin < len(tokens):
        end = begin + (1 << (len(tokens) - begin).bit_length() - 1)
        logits, state = _read_on(graphdef, params, np.asarray([tokens[begin:end]], np.int32), state)
        begin = end
    return dataclasses.replace(after, tokens=after.tokens + tokens, logits=logits, state=state)


def continue_from(
    graphdef: nnx.GraphDef, params: Params, state: DecodingState, sampler: Sampler, *, max_tokens: int
) -> tuple[list[int], DecodingState]:
    """Up to `max_tokens` tokens that may follow, without the one that ends the text; and the state that has read them, too.

    Ten tokens and then ten more by the same key are the twenty of one call. Where the text ended, the state that is returned
    has read its end.

    Raises:
        UserError: a negative `max_tokens`, or one for which the device has no room.
    """
    generate.check_max_tokens(max_tokens)
    if max_tokens == 0:
        return [], state
    generate.check_capacity(graphdef, params, 1, len(state.tokens) + max_tokens)
    state = read(graphdef, params, (), params_fingerprint=state.params_fingerprint, after=state, extra_capacity=max_tokens)
    new_tokens, lengths, logits, after = generate.decode(
        graphdef, params, sampler, state.logits, state.state, max_tokens=max_tokens, first_index=state.sampled
    )
    length = int(lengths[0])
    was_read = np.asarray(new_tokens)[0, : length + 1].tolist()  # the end of text among them, if it came
    return was_read[:length], dataclasses.replace(
        state, tokens=(*state.tokens, *was_read), sampled=state.sampled + len(was_read), logits=logits, state=after
    )


def stream(graphdef: nnx.GraphDef, params: Params, state: DecodingState, sampler: Sampler, *, max_tokens: int) -> Iterator[int]:
    """The tokens that `continue_from` would return, each as soon as it is known, and then the one that ends the text."""
    generate.check_max_tokens(max_tokens)
    state = read(graphdef, params, (), params_fingerprint=state.params_fingerprint, after=state, extra_capacity=max_tokens)
    return generate.stream(
        graphdef, params, sampler, state.logits, jax.tree.map(jnp.copy, state.state), max_tokens=max_tokens,
        first_index=state.sampled,
    )  # fmt: skip


def load(path: str | os.PathLike[str], graphdef: nnx.GraphDef, params: Params, *, params_fingerprint: str) -> DecodingState:
    """What `DecodingState.save` wrote.

    Args:
        params_fingerprint: what `params` were named when the state was made, if it is theirs.

    Raises:
        UserError: there is no such file, it is damaged, or is of another model.
    """
    try:
        arrays = npz.read(path)
    except FileNotFoundError:
        raise UserError(suggest.no_such("file", path)) from None
    except npz.Malformed as error:
        raise UserError(f"{path} is no saved state, or is damaged ({error})") from None
    if not {RECORD, LOGITS} <= arrays.keys() or arrays[RECORD].dtype.kind != "U" or arrays[RECORD].ndim:
        raise UserError(f"{path} is no saved state: it has no record and logits")
    record = json_text.parse(str(arrays.pop(RECORD)), f"{path}: the record")
    if not _is_record(record):
        raise UserError(f"{path} is no saved state, or is damaged: its record is {excerpt(record)}")
    tokens, sampled, capacity, maker = (record[name] for name in FIELDS)
    logits = arrays.pop(LOGITS)
    if maker != params_fingerprint:
        raise UserError(f"{path} is the state of other parameters (of another run, or another step of this one)")
    shapes = _shapes(graphdef, params, capacity)
    if _sizes(shapes) != {name: leaf.shape for name, leaf in arrays.items()}:
        raise UserError(f"{path} is not a state as this model has it: its arrays have other names or shapes")
    vocab_size = params["embedding"].shape[0]
    if logits.dtype != np.float32 or logits.shape != (1, vocab_size) or max(tokens, default=0) >= vocab_size:
        raise UserError(f"{path} is not a state as this model has it: its logits or its tokens are of another vocabulary")
    if any(arrays[name].dtype.itemsize != leaf.dtype.itemsize for name, leaf in _named(shapes).items()):
        raise UserError(f"{path} is not a state as this model has it: its arrays have numbers of other sizes")
    # numpy writes the bits of a bfloat16 and forgets what they are
    leaves = [jnp.asarray(arrays[name].view(leaf.dtype)) for name, leaf in _named(shapes).items()]
    state = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    return DecodingState(tuple(tokens), sampled, jnp.asarray(logits), state, capacity, params_fingerprint)


def _is_record(record: Any) -> bool:
    """Whether the fields are all there, and of values that they can have."""
    if not isinstance(record, dict) or not FIELDS.keys() <= record.keys():
        return False
    tokens, sampled, capacity, maker = (record[name] for name in FIELDS)
    return (
        isinstance(tokens, list) and all(type(token) is int and token >= 0 for token in tokens)
        and type(sampled) is int and 0 <= sampled <= len(tokens)
        and type(capacity) is int and 1 <= capacity < 1 << 31 and isinstance(maker, str)
    )  # fmt: skip


def _beside(params: Params, state: DecodingState) -> DecodingState:
    """The state on the devices that hold the parameters, wherever it was made or put."""
    place = params["embedding"].sharding
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec())
    leaves = jax.tree.leaves((state.logits, state.state))
    if all(isinstance(leaf, jax.Array) and leaf.sharding.device_set == place.device_set for leaf in leaves):
        return state
    logits, moved = jax.device_put((state.logits, state.state), place)
    return dataclasses.replace(state, logits=logits, state=moved)


def _has_room(graphdef, params, state: DecodingState, more: int) -> bool:
    length = len(state.tokens) + more
    # A state of more capacity that looks the same is a recurrent one, or the cache of a sliding window.
    return length <= state.capacity or _sizes(_shapes(graphdef, params, length)) == _sizes(state.state)


def _shapes(graphdef, params, capacity: int):
    """Shapes and dtypes of a state of that capacity."""

    def empty(params):
        network = model.merge(graphdef, params)
        return network.unstack_state(network.init_state(1, capacity))

    return jax.eval_shape(empty, params)


def _named(tree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _sizes(tree) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in _named(tree).items()}


@functools.partial(jax.jit, static_argnums=0)
def _read_on(graphdef, params, tokens, state):
    network = model.merge(graphdef, params)
    hidden, state = network.features(tokens, state)
    return network.logits(hidden[:, -1]), state
