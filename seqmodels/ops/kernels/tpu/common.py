"""What kernels share that walk, on a TPU, over the chunks of a few heads at a time as they lie in [B, T, H, X]."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

VMEM_LIMIT_BYTES = 16 * 2**20
"""What a kernel asks for, whatever the compiler's flags give by default."""
VMEM_BYTES = 12 * 2**20
"""Of these, for the arrays of a step of the grid; the rest is for values between operations."""

WANTED = 4  # heads of one step of the grid, about: their chains of products do not wait for each other
_MOST = 16


def operand_dtype(precision: lax.Precision) -> DTypeLike:
    """What products read: bfloat16 where the inputs were narrow, else float32, in six passes."""
    return jnp.bfloat16 if precision == lax.Precision.DEFAULT else jnp.float32


def product(a: Float[Array, "..."], b: Float[Array, "..."], a_axis: int, b_axis: int, precision: lax.Precision):
    """A matrix product contracted along the named axes, summed in float32."""
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def split(x: Float[Array, "C X"], block: int) -> tuple[Float[Array, "n m X"], Float[Array, "n m X"]]:
    """The lower and the upper ones of neighbouring blocks of rows, which are whole registers."""
    blocks = x.reshape(-1, 2, block, x.shape[-1])
    return blocks[:, 0], blocks[:, 1]


def joined(lower: Float[Array, "n m X"], upper: Float[Array, "n m X"]) -> Float[Array, "C X"]:
    """What ``split`` took apart."""
    return jnp.stack([lower, upper], axis=1).reshape(-1, lower.shape[-1])


def parts(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Two bfloat16 numbers whose sum has 16 bits of a float32 number."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def tile_bytes(rows: int, columns: int, size: int) -> int:
    """VMEM of an array of numbers of ``size`` bytes, in whole registers."""
    return -(-rows // 16) * 16 * -(-columns // 128) * 128 * size


def unsupported_dtype(**arrays: Array) -> str | None:
    """Which of them a kernel does not read."""
    for name, x in arrays.items():
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} is {x.dtype}, neither bfloat16 nor float32"
    return None


def steps_in_order(axes: int) -> pltpu.CompilerParams:
    """Of a kernel whose grid has so many axes, the last of them time."""
    semantics = ("parallel",) * (axes - 1) + ("arbitrary",)
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT_BYTES)


class Heads(NamedTuple):
    """The heads of one step of the grid: ``groups`` of q and k, each with ``repeats`` heads of v.

    They lie side by side along the lanes of blocks [C, groups K] and [C, groups repeats V].
    """

    groups: int
    repeats: int
    channels: int
    width: int

    @property
    def abreast(self) -> int:
        """How many of them make a register's 128 lanes of key channels; 1 where none do, or more than four."""
        count = 128 // self.channels
        whole = (
            32 <= self.channels and 128 % self.channels == 0 and (self.repeats if self.repeats > 1 else self.groups) % count == 0
        )
        return count if whole and count > 1 else 1

    def of(self, group: int) -> range:
        """The heads of a group."""
        return range(group * self.repeats, (group + 1) * self.repeats)

    def keys(self, group: int) -> slice:
        """Its lanes in q and k."""
        return slice(group * self.channels, (group + 1) * self.channels)

    def values(self, head: int) -> slice:
        """A head's lanes in v."""
        return slice(head * self.width, (head + 1) * self.width)

    def decays(self, head: int) -> slice:
        """A head's lanes in decays of its key channels."""
        return slice(head * self.channels, (head + 1) * self.channels)


def heads_at_once(groups: int, repeats: int, channels: int, width: int, wanted: int = WANTED) -> Heads | None:
    """About ``wanted`` heads whose q, k and v fill whole registers of 128 lanes, or all heads; None: no 16 heads do."""
    fitting = [
        Heads(g, r, channels, width)
        for g in range(1, min(groups, _MOST) + 1)
        for r in range(1, min(repeats, _MOST) + 1)
        if groups % g == 0
        and repeats % r == 0
        and (g == 1 or r == repeats)
        and g * r <= _MOST
        and (g * channels % 128 == 0 or g == groups)
        and (g * r * channels % 128 == 0 or g * r == groups * repeats)
        and (g * r * width % 128 == 0 or g * r == groups * repeats)
    ]
    return min(fitting, key=lambda h: max(h.groups * h.repeats / wanted, wanted / (h.groups * h.repeats)), default=None)


class Walk:
    """A grid over rows of the batch and blocks of heads, and inside it over chunks in order, or from the last in reverse."""

    def __init__(
        self, q: Float[Array, "B T G K"], v: Float[Array, "B T H V"], steps: int, *, reverse: bool, wanted: int = WANTED
    ):
        self.batch, self.time, self.num_groups, channels = q.shape
        self.num_heads, width = v.shape[2:]
        self.steps, self.count, self.reverse = steps, -(-self.time // steps), reverse
        self.heads = heads_at_once(self.num_groups, self.num_heads // self.num_groups, channels, width, wanted)
        self.parts = self.num_heads // self.num_groups // self.heads.repeats  # blocks of a group's heads

    def padded(self, x: Float[Array, "B T *rest"]):
        """Zeros after the last step, to whole chunks."""
        missing = self.count * self.steps - self.time
        return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x

    def lanes(self, x: Float[Array, "B T H X"]):
        """Heads side by side: [B, chunks * C, H X]."""
        return self.padded(x.reshape(*x.shape[:2], -1))

    def of_lanes(self, x, shape):
        """The backward pass."""
        return x[:, : self.time].reshape(shape)

    def rows(self, x: Float[Array, "B T H 1"]):
        """One number a step, steps along lanes: [B, chunks, blocks of heads, heads of one, C]."""
        heads = self.heads.groups * self.heads.repeats
        x = self.padded(x[..., 0]).reshape(self.batch, self.count, self.steps, -1, heads)
        return jnp.moveaxis(x, 2, 4)

    def of_rows(self, x):
        """The backward pass."""
        return jnp.moveaxis(x, 4, 2).reshape(self.batch, -1, self.num_heads, 1)[:, : self.time]

    def decays(self, log_decay: Float[Array, "B T H X"]) -> tuple[str, Float[Array, "..."]]:
        """Log decays as an input: their kind, and float32, as rows of one a head or as lanes of one a key channel."""
        decays = log_decay.astype(jnp.float32)
        return ("rows", self.rows(decays)) if log_decay.shape[-1] == 1 else ("decays", self.lanes(decays))

    def of_decays(self, d: Float[Array, "..."], log_decay: Float[Array, "B T H X"]) -> Float[Array, "B T H X"]:
        """The backward pass."""
        d = self.of_rows(d) if log_decay.shape[-1] == 1 else self.of_lanes(d, log_decay.shape)
        return d.astype(log_decay.dtype)

    def d_keys(self, q: Float[Array, "B T G K"], k: Float[Array, "B T G K"]) -> dict[str, tuple[str, DTypeLike]]:
        """The outputs d_q and d_k of a backward pass: in float32 where each part of a group's heads has its own."""
        return {name: ("d_keys", jnp.float32 if self.parts > 1 else x.dtype) for name, x in (("d_q", q), ("d_k", k))}

    def of_d_keys(self, found: dict[str, Array], q: Float[Array, "B T G K"], k: Float[Array, "B T G K"]) -> tuple[Array, Array]:
        """d_q and d_k from these outputs, summed over the parts."""

        def whole(d, x):
            return self.of_lanes(jnp.sum(d, axis=0) if self.parts > 1 else d[0], x.shape).astype(x.dtype)

        return whole(found["d_q"], q), whole(found["d_k"], k)

    def call(
        self,
        kernel: Callable,
        inputs: dict[str, tuple[str, Array]],
        outputs: dict[str, tuple[str, DTypeLike]],
        state: Float[Array, "B b rows columns"],
        *,
        interpret,
    ) -> tuple[Float[Array, "B b rows columns"], dict[str, Array]]:
        """Runs ``kernel(states, **refs)`` over all chunks, with one ref for each input and output, by name.

        Args:
          inputs: name -> (kind, array), the kinds those of ``_kinds``.
          outputs: name -> (kind, dtype).
          state: what the states start from, of n heads together; a step of the grid sees those of its heads, [heads / n, rows,
            columns] float32.

        Returns:
          The states after the last step, and the outputs by name.
        """
        kinds = self._kinds(state)
        specs = {kind: pl.BlockSpec(block, place) for kind, (_, block, place) in kinds.items()}
        body = _with_states(kernel, list(inputs), list(outputs), self.count)
        final, *found = pl.pallas_call(
            body,
            grid=(self.batch, self.num_groups // self.heads.groups, self.parts, self.count),
            in_specs=[specs["state"]] + [specs[kind] for kind, _ in inputs.values()],
            out_specs=[specs["state"]] + [specs[kind] for kind, _ in outputs.values()],
            out_shape=[jax.ShapeDtypeStruct(state.shape, jnp.float32)]
            + [jax.ShapeDtypeStruct(kinds[kind].shape, dtype) for kind, dtype in outputs.values()],
            scratch_shapes=[pltpu.VMEM(kinds["state"].block[1:], jnp.float32)],
            compiler_params=steps_in_order(4),
            interpret=interpret,
        )(state, *(x for _, x in inputs.values()))
        return final, dict(zip(outputs, found))

    def _kinds(self, state: Float[Array, "B H rows columns"]) -> dict[str, "Kind"]:
        """How arrays lie: block g of groups, part r of a group's heads, step n of the grid."""
        batch, count, steps, parts = self.batch, self.count, self.steps, self.parts
        groups, heads = self.heads.groups, self.heads.groups * self.heads.repeats
        channels, width = self.heads.channels, self.heads.width
        time, all_heads, all_keys = count * steps, self.num_heads, self.num_groups * channels
        matrix = state.shape[2:]
        states = heads * state.shape[1] // all_heads  # of a step

        def at(n):
            return count - 1 - n if self.reverse else n

        def lanes(each):  # of every head of a block
            return Kind(
                (batch, time, all_heads * each), (None, steps, heads * each), lambda b, g, r, n: (b, at(n), g * parts + r)
            )

        return {
            "keys": Kind((batch, time, all_keys), (None, steps, groups * channels), lambda b, g, r, n: (b, at(n), g)),
            "d_keys": Kind(
                (parts, batch, time, all_keys), (None, None, steps, groups * channels), lambda b, g, r, n: (r, b, at(n), g)
            ),
            "values": lanes(width),
            "decays": lanes(channels),
            "rows": Kind(
                (batch, count, all_heads // heads, heads, steps),
                (None, None, None, heads, steps),
                lambda b, g, r, n: (b, at(n), g * parts + r, 0, 0),
            ),
            "row": Kind((batch, count, 1, steps), (None, None, 1, steps), lambda b, g, r, n: (b, at(n), 0, 0)),
            "starts": Kind(
                (count, *state.shape),
                (None, None, states, *matrix),
                lambda b, g, r, n: (at(n), b, g * parts + r, 0, 0),
            ),
            "state": Kind(state.shape, (None, states, *matrix), lambda b, g, r, n: (b, g * parts + r, 0, 0)),
        }


class Kind(NamedTuple):
    """How an array lies in the grid."""

    shape: tuple[int, ...]  # of the whole array
    block: tuple[int | None, ...]  # what a step of the grid sees; None: one, without the axis
    place: Callable[..., tuple]  # (b, g, r, n) -> which block


def _with_states(kernel: Callable, inputs: list[str], outputs: list[str], count: int) -> Callable:
    """A kernel's body over refs in their order: first states, inputs, final states, outputs, and the states in between."""

    def body(first, *refs):
        named = dict(zip(inputs, refs))
        final, *refs = refs[len(inputs) :]
        named |= dict(zip(outputs, refs))
        states = refs[-1]
        n = pl.program_id(3)

        @pl.when(n == 0)
        def _():
            states[...] = first[...]

        kernel(states, **named)

        @pl.when(n == count - 1)
        def _():
            final[...] = states[...]

    return body
