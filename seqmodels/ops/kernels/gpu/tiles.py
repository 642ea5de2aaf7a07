"""What the kernels of matrix states share: chunks of 64 steps as tiles, where they lie in memory, masks of them, products.

A tile is 64 x 64 numbers in shared memory, or in registers as ``wgmma`` lays out its results. Products take two 16-bit tiles and add
in float32. The left operand may come from registers.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int32

STEPS = 64  # of a chunk: the least that wgmma multiplies
LEVELS = 6  # of blocks of 1, 2, 4, ... 32 steps
COLUMNS = 64  # of the state in a block of the grid: 128 x 64 float32 are 64 registers a thread
BLOCK = 64  # key channels that are worked on at once
CHANNELS = (64, 128, 192, 256)  # key channels of a head, padded
NARROW = 128  # the most of which a state and two chunks have room
STAGES = 2  # chunks in shared memory: the one in work and the next
BLOCKS = 264  # of a grid at least, if there are as many chunks: two for each multiprocessor

CLOSED = -1e4
"""What minus infinity is taken for: 0 times it is 0, and its exponential is 0."""

OPERAND = jnp.bfloat16
"""float16 inputs are rounded to it as well: a state may leave float16's range."""

PRECISE = jnp.float16
"""Of what is made inside and whose range is known: it has three bits more."""


class Sizes(NamedTuple):
    """B rows of N chunks; G groups, H heads; K and V channels a head, padded to what the kernels want; one decay per what, if any."""

    B: int
    N: int
    G: int
    H: int
    K: int
    V: int
    per: str | None
    """``"head"``, ``"channel"`` or None."""

    @classmethod
    def of(cls, q: Float[Array, "B T G K"], v: Float[Array, "B T H V"], log_decay: Float[Array, "B T H X"] | None) -> "Sizes":
        batch, steps, groups, channels = q.shape
        per = None if log_decay is None else "head" if log_decay.shape[3] == 1 else "channel"
        return cls(batch, -(-steps // STEPS), groups, v.shape[2], *padded(channels, v.shape[3]), per)

    @property
    def heads(self) -> int:
        """Counting the batch."""
        return self.B * self.H

    def of_chunk(self, n, head):
        """The number of chunk n of a head among all heads' chunks."""
        return n * self.heads + head

    def of_steps(self, n, head, heads=None):
        """(number of the tile of steps, number of the head in its row) of chunk n, where every row has ``heads``."""
        return lax.div(head, self.H) * self.N + n, lax.div(lax.rem(head, self.H), self.H // (heads or self.H))

    def flat(self, x: Float[Array, "B T heads X"], channels: int, dtype=OPERAND) -> Float[Array, "B*T heads*channels"]:
        """Rows of steps, with whole chunks and ``channels`` a head."""
        x = jnp.pad(x, ((0, 0), (0, self.N * STEPS - x.shape[1]), (0, 0), (0, channels - x.shape[3])))
        return x.astype(dtype).reshape(self.B * self.N * STEPS, -1)

    def flat_rows(self, x: Float[Array, "B T heads"]) -> Float[Array, "B*heads*N 64"]:
        """A row for each chunk."""
        x = jnp.pad(x, ((0, 0), (0, self.N * STEPS - x.shape[1]), (0, 0)))
        return jnp.moveaxis(x, 2, 1).reshape(-1, STEPS)

    def unflat(self, x: Array, shape: Sequence[int]) -> Float[Array, "B T heads X"]:
        """``flat`` undone, without what was padded."""
        return x.reshape(self.B, self.N * STEPS, shape[2], -1)[:, : shape[1], :, : shape[3]]

    def unflat_rows(self, x: Array, shape: Sequence[int]) -> Float[Array, "B T heads"]:
        """``flat_rows`` undone for all heads, parts added that several blocks of the grid have left."""
        x = jnp.sum(x.reshape(-1, self.B, self.H, self.N * STEPS), axis=0)
        return jnp.moveaxis(x, 1, 2)[:, : shape[1]]

    def unflat_decay(self, x: Array, shape: Sequence[int]) -> Float[Array, "B T heads X"]:
        return self.unflat(x, shape) if self.per == "channel" else self.unflat_rows(x, shape)[..., None]

    def of_groups(self, x: Array, shape: Sequence[int]) -> Float[Array, "B T G X"]:
        """``flat`` undone for a gradient of every head, added up over a group's heads."""
        x = self.unflat(x, (*shape[:2], self.H, shape[3]))
        return jnp.sum(x.reshape(*shape[:3], -1, shape[3]), axis=3)

    def flat_state(self, x: Float[Array, "B H K V"]) -> Float[Array, "B*H*K V"]:
        return pad(x, self.K, self.V).reshape(-1, self.V)

    def unflat_state(self, x: Array, shape: Sequence[int]) -> Float[Array, "B H K V"]:
        return x.reshape(self.B, self.H, self.K, self.V)[..., : shape[2], : shape[3]]


def padded(channels: int, width: int) -> tuple[int, int]:
    """K and V as the kernels want them; a zero channel or column stays zero."""
    return next(size for size in CHANNELS if channels <= size), -(-width // COLUMNS) * COLUMNS


def pad(x: Float[Array, "*b R C"], rows: int, columns: int) -> Float[Array, "*b rows columns"]:
    """Zeros after the last two axes."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, rows - x.shape[-2]), (0, columns - x.shape[-1])])


def parts_of(blocks: int, count: int) -> int:
    """Into how many parts, of equal length, blocks of a grid divide their chunks: enough to fill the device."""
    return next(parts for parts in range(1, count + 1) if count % parts == 0 and (blocks * parts >= BLOCKS or parts == count))


# ---- inside the kernels


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The loop over the chunks of a head, or over one of ``parts`` of them, and how a chunk's tiles lie in arrays."""

    sizes: Sizes
    head: Int32[Array, ""]
    part: int | Int32[Array, ""] = 0
    parts: int = 1
    reverse: bool = False

    @classmethod
    def of_part(cls, sizes: Sizes, parts: int) -> "Chunks":
        """Of the place in a grid with the axes ``head`` and ``part``."""
        return cls(sizes, lax.axis_index("head"), lax.axis_index("part"), parts)

    @property
    def count(self) -> int:
        return self.sizes.N // self.parts

    def number(self, i):
        """Of the chunk that is worked on at step i."""
        return self.part * self.count + (self.count - 1 - i if self.reverse else i)

    def keys(self, heads: int, block=None) -> plgpu.BlockSpec:
        """Steps x key channels of an array with so many heads: all channels, or ``block`` of 64; see ``turn``."""
        blocks, width = (1, self.sizes.K) if block is None else (self.sizes.K // BLOCK, BLOCK)

        def index(i, *turn):
            row, column = self.sizes.of_steps(self.number(i), self.head, heads)
            return row, column * blocks + (0 if block is None else block(*turn) if callable(block) else block)

        return plgpu.BlockSpec((STEPS, width), index)

    def values(self, block, blocks: int | None = None) -> plgpu.BlockSpec:
        """Steps x 64 value channels, of ``blocks`` times 64 that a head has in the array (V)."""
        blocks = blocks or self.sizes.V // COLUMNS

        def index(i, *turn):
            row, column = self.sizes.of_steps(self.number(i), self.head)
            return row, column * blocks + block

        return plgpu.BlockSpec((STEPS, COLUMNS), index)

    def matrix(self) -> plgpu.BlockSpec:
        """Steps x steps."""
        return plgpu.BlockSpec((STEPS, STEPS), lambda i, *turn: (self.sizes.of_chunk(self.number(i), self.head), 0))

    def prepared(self) -> plgpu.BlockSpec:
        """Steps x key channels, chunk by chunk as a kernel has left them."""
        return plgpu.BlockSpec((STEPS, self.sizes.K), lambda i, *turn: (self.sizes.of_chunk(self.number(i), self.head), 0))

    def channels(self) -> plgpu.BlockSpec:
        """A number for each key channel, chunk by chunk as a kernel has left them."""
        return plgpu.BlockSpec((None, self.sizes.K), lambda i, *turn: (self.sizes.of_chunk(self.number(i), self.head), 0))

    def state(self, block, key_block=None) -> plgpu.BlockSpec:
        """Key channels (all, or a block of 64) x 64 value channels."""
        blocks, height = (1, self.sizes.K) if key_block is None else (self.sizes.K // BLOCK, BLOCK)

        def index(i, *turn):
            return self.sizes.of_chunk(self.number(i), self.head) * blocks + (0 if key_block is None else key_block), block

        return plgpu.BlockSpec((height, COLUMNS), index)

    def row(self) -> plgpu.BlockSpec:
        """A number for each step, of ``Sizes.flat_rows``."""
        return plgpu.BlockSpec((None, STEPS), lambda i, *turn: (self.head * self.sizes.N + self.number(i), 0))

    def row_of_batch(self) -> plgpu.BlockSpec:
        """A number for each step, of all heads."""
        return plgpu.BlockSpec(
            (None, STEPS), lambda i, *turn: (lax.div(self.head, self.sizes.H) * self.sizes.N + self.number(i), 0)
        )

    def run(
        self,
        step: Callable,
        tiles: Mapping[Hashable, tuple[Any, plgpu.BlockSpec]],
        *,
        carry: Any = None,
        stages: int,
        turns: int | None = None,
    ) -> Any:
        """``step(number of the chunk, tiles in shared memory, carry) -> carry``, without a carry if there is none.

        Args:
          tiles: by any names, arrays in device memory and how a chunk lies in them.
          stages: chunks in shared memory at once.
          turns: a chunk is worked on in so many steps; ``step`` gets the turn's number after the chunk's, and so does ``block``
            of ``keys``.
        """

        def by_name(index, *refs):
            carried = () if carry is None else refs[-1:]
            return step(self.number(index[0]), *index[1:], dict(zip(tiles, refs)), *carried)

        arrays, specs = zip(*tiles.values())
        grid = (self.count,) if turns is None else (self.count, turns)
        return plgpu.emit_pipeline(by_name, grid=grid, in_specs=specs, max_concurrent_steps=stages, init_carry=carry)(*arrays)


def columns_of(sizes: Sizes, n, head, block, blocks: int) -> tuple[Any, Any]:
    """Rows and columns of a chunk's 64 channels ``block``, where each of H heads has so many ``blocks`` of them."""
    row, column = sizes.of_steps(n, head)
    return pl.ds(row * STEPS, STEPS), pl.ds((column * blocks + block) * BLOCK, BLOCK)


def send(tile, x: Array, place) -> None:
    """Writes to device memory through a tile in shared memory, once what was sent before has left its tiles."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    tile[...] = x.astype(tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, place)


class Tile(NamedTuple):
    """Where the numbers of a tile of 64 x 64 stand, and masks of it."""

    row: Int32[Array, "64 64"]
    column: Int32[Array, "64 64"]

    @classmethod
    def make(cls, now: int | Int32[Array, ""] = 0) -> "Tile":
        """``now``: a small number that says where the program is. As far as the compiler knows, masks depend on it; else it would make
        all of them before the first step and keep them, in more registers than there are.
        """
        zero = lax.shift_right_logical(now, 30)
        row, column = (plgpu.broadcasted_iota(jnp.int32, (STEPS, STEPS), i, layout=plgpu.Layout.WGMMA) for i in (0, 1))
        return cls(row + zero, column + zero)

    def transposed(self) -> "Tile":
        """Masks with rows and columns exchanged."""
        return Tile(self.column, self.row)

    def is_upper(self, level) -> Bool[Array, "64 64"]:
        """Rows of upper blocks of 2^level steps, which read."""
        return ((self.row >> level) & 1) == 1

    def is_visible(self, read_before: bool = False) -> Bool[Array, "64 64"]:
        """Of which a row reads the column."""
        return self.is_below() if read_before else self.row >= self.column

    def is_below(self) -> Bool[Array, "64 64"]:
        return self.row > self.column

    def is_pair(self, level) -> Bool[Array, "64 64"]:
        """Steps that lie in neighbouring blocks of 2^level steps, of one block of twice as many."""
        return ((self.row ^ self.column) >> level) == 1

    def is_pair_below(self, level) -> Bool[Array, "64 64"]:
        """Those of which the row reads the column."""
        return jnp.where(self.is_below(), (self.row ^ self.column) >> level, 0) == 1

    def is_summed(self, level, read_before: bool) -> Bool[Array, "64 64"]:
        """The steps (columns) whose log decays lie between a row of a block of 2^level steps and the end of its block towards its
        neighbour: from the start of an upper block, which reads (``read_before``: without the row's own), to that of a lower one.
        """
        below = self.row - self.column - 1
        reach = jnp.where(self.is_upper(level), below if read_before else below + 1, -2 - below)
        return jnp.where((self.row >> level) == (self.column >> level), reach, -1) >= 0

    def diagonal(self, x: Float[Array, " 64"]) -> Float[Array, "64 64"]:
        return jnp.where(self.row == self.column, lax.broadcast_in_dim(x, (STEPS, STEPS), (0,)), 0.0)


def zeros(interpret: bool) -> Float[Array, "64 64"]:
    """As ``wgmma`` lays out its results, to be a loop's carry; the interpreter has no layouts."""
    x = jnp.zeros((STEPS, STEPS), jnp.float32)
    return x if interpret else plgpu.layout_cast(x, plgpu.Layout.WGMMA)


def load(ref) -> Float[Array, "rows columns"]:
    """A tile as wgmma's accumulators lie in registers, float32."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False).astype(jnp.float32)


def of_steps(ref) -> Float[Array, "64 64"]:
    """A number for each step, over all channels."""
    x = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    return lax.broadcast_in_dim(x, (STEPS, BLOCK), (0,))


def matmul(interpret: bool, a, b, plus: Float[Array, "M N"] | None = None) -> Float[Array, "M N"]:
    """a b + plus on the tensor cores, float32; ``a`` a 16-bit tile in shared memory or in registers, ``b`` one in shared memory."""
    if interpret and isinstance(a, jax.Array):  # the interpreter knows no operand in registers
        product = jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        return product if plus is None else plus + product
    if plus is not None and not interpret:
        return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))(plgpu.ACC.init(plus))

    def multiply(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    product = pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))
    return product if plus is None else plus + product  # the interpreter knows no accumulator that starts at a value


def over_values(interpret: bool, a: Sequence[Any], b: Sequence[Any]) -> Float[Array, "M N"]:
    """a b^T, of tiles of 64 value channels each."""
    total = None
    for x, y in zip(a, b, strict=True):
        total = matmul(interpret, x, y.transpose((1, 0)), total)
    return total


def state_products(interpret: bool, at: Tile, S: Sequence[Any], d_S: Sequence[Any]) -> Float[Array, " 64"]:
    """sum(S * d_S) over value channels, for each of 64 key channels, by columns: the diagonal of S d_S^T."""
    return jnp.sum(jnp.where(at.row == at.column, over_values(interpret, S, d_S), 0.0), axis=0)


def in_columns(x: Float[Array, " 64"]) -> Float[Array, "64 64"]:
    """A number for each column, over all rows."""
    return lax.broadcast_in_dim(x, (STEPS, STEPS), (1,))


def by_column(x: Float[Array, " 64"], vector_s) -> Float[Array, "64 64"]:
    """A number for each row of a tile as a number for each column, over all rows; through a vector in shared memory."""
    vector_s[...] = x
    plgpu.commit_smem()
    return in_columns(plgpu.load(vector_s, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False))


class PairSums(NamedTuple):
    """Sums of one log decay per step, each rounded to float16: numbers of one sign, whose exponential is off by 2e-4 or less."""

    between: Float[Array, "64 64"]
    """Below the diagonal what lies between step j and what step i reads (anything elsewhere)."""
    prefix: Float[Array, " 64"]
    """From the chunk's start up to what step i reads; by rows."""
    suffix: Float[Array, " 64"]
    """After step j to the chunk's end; by columns."""

    @classmethod
    def of(cls, interpret: bool, at: Tile, g: Float[Array, "64 64"], sums_s, read_before: bool = False) -> "PairSums":
        """
        Args:
          g: the log decay of step i, over all columns.
          sums_s: a float16 tile in shared memory to work in.
          read_before: a step reads before its own decay.
        """
        is_last = at.column == STEPS - 1  # whose column holds no pair
        own = jnp.where(at.is_below() | is_last, g, 0.0)
        sums_s[...] = own.astype(PRECISE)
        plgpu.commit_smem()
        before = matmul(interpret, jnp.where(at.is_below(), 1.0, 0.0).astype(PRECISE), sums_s)
        after = before + own
        between = before if read_before else after
        return cls(
            between,
            jnp.sum(jnp.where(is_last, between, 0.0), axis=1),
            jnp.sum(jnp.where((at.row == STEPS - 1) & (at.column < STEPS - 1), after, 0.0), axis=0),
        )


def sums_by(interpret: bool, mask: Bool[Array, "64 64"], x: Float[Array, "64 64"], part_s, plus=None) -> Float[Array, "64 64"]:
    """``plus`` and mask x: sums of rows of x as two bfloat16 numbers, one after the other in a tile, which keep 16 bits of each."""
    ones, rounded = jnp.where(mask, 1.0, 0.0).astype(OPERAND), x.astype(OPERAND)
    for part in (rounded, (x - rounded.astype(jnp.float32)).astype(OPERAND)):
        part_s[...] = part
        plgpu.commit_smem()
        plus = matmul(interpret, ones, part_s, plus)
    return plus


def unit_lower_inverse(interpret: bool, now, L: Float[Array, "64 64"], L_s, T_s) -> Float[Array, "64 64"]:
    """(I + L)^-1 of a strictly lower triangular L, in registers; two float16 tiles in shared memory to work in.

    By blocks of 1, 2, 4, ... 32 steps (``chunk.unit_lower_inverse``): of blocks inverted in T, the next level is T - T L T, cut down
    to the pairs that join two blocks; T L T is made whole.
    """
    L_s[...] = L.astype(PRECISE)
    at = Tile.make(now)
    inverse = jnp.where(at.row == at.column, 1.0, 0.0) - jnp.where(at.is_pair_below(0), L, 0.0)

    def join(level, inverse):
        at = Tile.make(now + level)
        rounded = inverse.astype(PRECISE)
        T_s[...] = rounded
        plgpu.commit_smem()
        below = matmul(interpret, matmul(interpret, rounded, L_s).astype(PRECISE), T_s)
        return inverse - jnp.where(at.is_pair_below(level), below, 0.0)

    return lax.fori_loop(1, LEVELS, join, inverse)
