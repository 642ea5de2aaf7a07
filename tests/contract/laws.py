"""The contract of a sequence mixer, as measurements.

Every law takes a `Case` (a mixer, an implementation, options) and returns its worst relative error over all that
the law compares; `Law.bound` is what a correct mixer stays under. What can only be right or wrong (a dtype, a
tree structure, a silent non-finite value) counts as an infinite error or raises `ContractBroken`. The tests
assert the bounds; a script can print the figures.

Laws are frugal with compilation, which is nearly all they cost: every forward law runs the same compiled calls, one for
each of `LENGTHS`, because the partitions below use those lengths and no others.
"""

import contextlib
import dataclasses
import functools
import math
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.programs import fast_jit

BATCH = 3
CHUNK = 16  # given to every Config with a `chunk_size`, so that short sequences cross chunk boundaries
LONGEST = 3 * CHUNK + 1  # three whole chunks and the least that can be left over
LENGTHS = (1, 7, CHUNK, LONGEST)
GRADIENT_LENGTHS = (1, CHUNK, LONGEST)
CONTINUATION = 7  # tokens that compare two states by what they make of the same future
PREFIX = 7  # tokens that make an initial state worth carrying
CAPACITY = PREFIX + LONGEST + CONTINUATION
# 49 tokens cut at chunk boundaries, at 1, at odd places, and into single tokens between longer pieces
PARTITIONS = ((16, 16, 16, 1), (1, 16, 7, 16, 7, 1, 1), (7, 16, 16, 7, 1, 1, 1), (16, 1, 7, 7, 1, 16, 1))
RESET_MARKS = ((), (5, 16, 40), (0, 17, 48))  # per row of the batch
Pytree = Any


class ContractBroken(AssertionError):
    """A mixer does what no mixer may, whatever the numbers."""


def demand(condition: bool, message: str) -> None:
    if not condition:
        raise ContractBroken(message)


# -- errors -----------------------------------------------------------------------------------------------------


def is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def magnitude(leaves: list[np.ndarray]) -> float:
    """Largest absolute finite value among the leaves."""
    return max((float(np.abs(leaf[np.isfinite(leaf)]).max(initial=0.0)) for leaf in leaves), default=0.0)


def error(actual: Pytree, expected: Pytree) -> float:
    """Largest difference, relative to the largest expected value of the same leaf.

    A leaf that is small beside the others (a gradient that should vanish) is measured against 1% of the largest
    leaf, because the rounding it carries comes from the larger ones. Integers and marks are equal or infinitely
    wrong; so is every place where only one side is finite.
    """
    (got, structure), (want, expected_structure) = jax.tree.flatten(actual), jax.tree.flatten(expected)
    demand(structure == expected_structure, "the trees compared differ in structure")
    pairs = [(np.asarray(one), np.asarray(other)) for one, other in zip(got, want)]
    demand(all(got.shape == want.shape for got, want in pairs), "the arrays compared differ in shape")
    floats = [(got.astype(np.float64), want.astype(np.float64)) for got, want in pairs if is_float(want)]
    if any(not np.array_equal(got, want) for got, want in pairs if not is_float(want)):
        return math.inf
    floor = 0.01 * magnitude([want for _, want in floats])
    worst = 0.0
    for got, want in floats:
        finite = np.isfinite(want)
        if not np.array_equal(np.isfinite(got), finite):
            return math.inf
        difference = float(np.abs(got[finite] - want[finite]).max(initial=0.0))
        if difference > 0.0:
            worst = max(worst, difference / max(magnitude([want]), floor, np.finfo(np.float64).tiny))
    return worst


def finite(tree: Pytree) -> bool:
    floats = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree) if is_float(leaf)]
    return all(np.isfinite(leaf).all() for leaf in floats)


# -- what the laws are applied to -------------------------------------------------------------------------------


class SharedJit:
    """`fast_jit` that compiles a program once, whichever subject has it: the default form is one of the named ones.

    Programs are the same if their texts are, which hold all constants, and their arguments and results. One lives as long as a
    subject that has called it.
    """

    compiled: weakref.WeakValueDictionary = weakref.WeakValueDictionary()

    def __init__(self, function: Callable):
        self._jit = fast_jit(function, keep_unused=True)  # a text without an argument does not say which one is left out
        self._programs = {}

    def trace(self, *arguments):
        return self._jit.trace(*arguments)

    def __call__(self, *arguments):
        leaves, treedef = jax.tree.flatten(arguments)
        signature = treedef, *map(jax.typeof, leaves)
        if signature not in self._programs:
            self._programs[signature] = self._find(*arguments)
        return self._programs[signature](*arguments)

    def _find(self, *arguments):
        traced = self.trace(*arguments)
        lowered = traced.lower()
        key = lowered.as_text(), lowered.in_tree, lowered.out_tree, *traced.jaxpr.in_avals, *traced.jaxpr.out_avals
        program = self.compiled.get(key)
        if program is None:
            program = self.compiled[key] = lowered.compile()
        return program


class Subject:
    """A built mixer (or language model) with its parameters, and its compiled calls.

    Args:
        module: the mixer. Its parameters are moved off their initial values, where gates may be closed.
        sample: (generator, length) -> inputs [BATCH, length, ...].
        batch_axis: of the state's leaves; 0 for a mixer, 1 under a model's stacked repeats.
        context: entered around every call, e.g. `seqmodels.ops.interpret`.
    """

    def __init__(
        self,
        module: nnx.Module,
        sample: Callable[[np.random.Generator, int], np.ndarray],
        *,
        batch_axis: int = 0,
        context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        self.graphdef, params, rest = nnx.split(module, nnx.Param, ...)
        demand(not jax.tree.leaves(rest), "a module holds arrays that are not nnx.Param")
        generator = np.random.default_rng(1)

        def moved(leaf):
            demand(leaf.dtype == jnp.float32, f"a parameter is {leaf.dtype}, not float32")
            return jnp.asarray(np.asarray(leaf) + 0.05 * generator.standard_normal(leaf.shape), leaf.dtype)

        self.params = jax.tree.map(moved, nnx.to_pure_dict(params))
        self.module = module
        self.sample = sample
        self.batch_axis = batch_axis
        self.context = context
        self._call = SharedJit(self._apply)
        self._steps = SharedJit(self._scan_steps)
        self._pullback = SharedJit(self._differentiate)

    def _apply(self, params, inputs, state, reset):
        return nnx.merge(self.graphdef, params)(inputs, state, reset=reset)

    def _scan_steps(self, params, inputs, state, reset):
        def step(state, token):
            output, state = self._apply(params, token[0][:, None], state, token[1][:, None])
            return state, (output[:, 0], self.fixed(state))

        time_first = (jnp.moveaxis(inputs, 1, 0), jnp.moveaxis(reset, 1, 0))
        state, (outputs, states) = jax.lax.scan(step, state, time_first)
        return jnp.moveaxis(outputs, 0, 1), states, state

    def _differentiate(self, params, inputs, state, reset, output_cotangent, state_cotangent):
        leaves, treedef = jax.tree.flatten(state)
        moving = {"params": params, "state": [leaf for leaf in leaves if is_float(leaf)]}
        if is_float(inputs):
            moving["inputs"] = inputs

        def forward(moving):
            floats = iter(moving["state"])
            carried = [next(floats) if is_float(leaf) else leaf for leaf in leaves]
            read = moving["inputs"] if "inputs" in moving else inputs
            output, after = self._apply(moving["params"], read, jax.tree.unflatten(treedef, carried), reset)
            return output, ([] if state is None else self.fixed(after))

        _, pullback = jax.vjp(forward, moving)
        (gradients,) = pullback((output_cotangent, state_cotangent))
        return gradients

    def __call__(self, inputs, state, reset):
        """One call: `(outputs, state)`; checks that the state returned can be a scan carry."""
        with self.context():
            output, after = self._call(self.params, inputs, state, reset)
        demand(output.shape[:2] == inputs.shape[:2], f"outputs {output.shape} for inputs {inputs.shape}")
        if state is not None:
            before, returned = specification(state), specification(after)
            demand(returned == before, f"the state returned is {returned}, the one passed in was {before}")
        return np.asarray(output), after

    def trace(self, length: int) -> None:
        """A call with neither state nor marks, without compiling it."""
        with self.context():
            self._call.trace(self.params, self.inputs(length), None, None)

    def steps(self, inputs, state, reset):
        """One token at a time: `(outputs, fixed-size state leaves after every step, final state)`."""
        with self.context():
            outputs, states, state = self._steps(self.params, inputs, state, reset)
        return np.asarray(outputs), [np.asarray(leaf) for leaf in states], state

    def gradients(self, inputs, state, reset, output_cotangent, state_cotangent):
        """Gradients of <outputs, cotangent> + <final state, cotangent>: params, inputs, float leaves of `state`."""
        with self.context():
            return self._pullback(self.params, inputs, state, reset, output_cotangent, state_cotangent)

    def empty(self, capacity: int = CAPACITY) -> Pytree:
        return self.module.init_state(BATCH, capacity)

    def inputs(self, length: int, seed: int = 0) -> np.ndarray:
        return self.sample(np.random.default_rng(seed), length)

    @functools.cached_property
    def _fixed(self) -> list[bool]:
        shortest, longest = (
            jax.tree.leaves(jax.eval_shape(functools.partial(self.module.init_state, BATCH, max_len)))
            for max_len in (1, CAPACITY)
        )
        return [is_float(short) and short.shape == long.shape for short, long in zip(shortest, longest)]

    def fixed(self, state: Pytree) -> list[jax.Array]:
        """The float leaves whose size does not depend on `max_len`: recurrent states and tails.

        How a cache is laid out (its ring, where it stands) is the mixer's own business: caches, positions and marks
        are compared by their `continuation`.
        """
        return [leaf for leaf, is_fixed in zip(jax.tree.leaves(state), self._fixed) if is_fixed]

    def continuation(self, state: Pytree) -> jax.Array:
        """Outputs of a fixed future from `state`."""
        return self(self.inputs(CONTINUATION, seed=99), state, no_marks(CONTINUATION))[0]

    def row(self, state: Pytree, row: int) -> list[jax.Array]:
        """One row of the fixed-size leaves."""
        return [np.take(np.asarray(leaf), row, axis=self.batch_axis) for leaf in self.fixed(state)]

    def poison(self, state: Pytree, rows: Any = slice(None)) -> Pytree:
        """The state with every float NaN in the given rows of the batch."""
        index = (slice(None),) * self.batch_axis + (rows,)

        def poisoned(leaf):
            values = np.array(leaf)
            if is_float(leaf):
                values[index] = np.nan
            return jnp.asarray(values)

        return jax.tree.map(poisoned, state)


@dataclasses.dataclass(frozen=True)
class Case:
    """A way to build one implementation of one mixer, and the same mixer as its definition.

    Attributes:
        name: of the mixer and its variant; cases of one name share their reference.
        build: (implementation, compute dtype) -> Subject. Raises NotImplementedError, or its calls do, if the
            mixer has no such implementation.
        implementation: the one under test; None is the mixer's own choice.
        lengths, gradient_lengths: at which `implementations` and `gradients` compare it with "recurrent".
    """

    name: str
    build: Callable[[str | None, Any], Subject]
    implementation: str | None
    lengths: tuple[int, ...] = LENGTHS
    gradient_lengths: tuple[int, ...] = GRADIENT_LENGTHS

    @property
    def subject(self) -> Subject:
        return built(self.build, self.implementation, "float32")

    @property
    def reference(self) -> Subject:
        return built(self.build, "recurrent", "float32")

    @property
    def narrow(self) -> Subject:
        return built(self.build, self.implementation, "bfloat16")


@functools.lru_cache(maxsize=8)
def built(build: Callable, implementation: str | None, dtype: str) -> Subject:
    """Subjects in use; bounded, so that compiled programs of finished cases are freed."""
    return build(implementation, jnp.dtype(dtype))


def refusal(case: Case) -> str | None:
    """What the mixer says when it has no such implementation; None if it has one (a plain call is traced)."""
    try:
        case.subject.trace(PREFIX)
    except NotImplementedError as refused:
        demand(bool(str(refused).strip()), "NotImplementedError does not say what is missing")
        return str(refused)
    return None


def specification(state: Pytree) -> Pytree:
    """Structure, shapes, dtypes and weak types: what a scan carry must keep."""
    leaves, treedef = jax.tree.flatten(state)
    return treedef, tuple((leaf.shape, str(leaf.dtype), leaf.weak_type) for leaf in leaves)


def normal_inputs(d_model: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Samples float32 inputs [BATCH, length, d_model] for a mixer."""
    return lambda generator, length: generator.standard_normal((BATCH, length, d_model)).astype(np.float32)


def no_marks(length: int) -> np.ndarray:
    return np.zeros((BATCH, length), bool)


def marks(length: int) -> np.ndarray:
    """Resets at RESET_MARKS: none in row 0, different ones in the other rows."""
    starts = no_marks(length)
    for row, positions in enumerate(RESET_MARKS):
        starts[row, [position for position in positions if position < length]] = True
    return starts


def cotangents(seed: int, tree: Pytree) -> Pytree:
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: generator.standard_normal(leaf.shape).astype(leaf.dtype), tree)


def cut(lengths: tuple[int, ...]) -> list[slice]:
    ends = np.cumsum(lengths)
    return [slice(int(end - length), int(end)) for end, length in zip(ends, lengths)]


def concatenate(pieces: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(pieces, axis=1)


def state_error(subject: Subject, actual: Pytree, expected: Pytree) -> float:
    """Fixed-size leaves compared one by one, the whole by its continuation."""
    return max(
        error(subject.fixed(actual), subject.fixed(expected)),
        error(subject.continuation(actual), subject.continuation(expected)),
    )


def prefixed(subject: Subject) -> Pytree:
    """A state that has read something."""
    return subject(subject.inputs(PREFIX, seed=7), subject.empty(), no_marks(PREFIX))[1]


def row_state_error(subject: Subject, actual: Pytree, expected: Pytree, row: int) -> float:
    """`state_error` of one row of the batch."""
    return max(
        error(subject.row(actual, row), subject.row(expected, row)),
        error(subject.continuation(actual)[row], subject.continuation(expected)[row]),
    )


# -- the laws ---------------------------------------------------------------------------------------------------


def split(case: Case) -> float:
    """Calls with a carried state = one call; no state = the empty state; no `reset` = no marks."""
    subject = case.subject
    inputs, reset = subject.inputs(LONGEST), marks(LONGEST)
    whole, end = subject(inputs, subject.empty(), reset)
    worst = 0.0
    for partition in PARTITIONS:
        state, pieces = subject.empty(), []
        for piece in cut(partition):
            output, state = subject(inputs[:, piece], state, reset[:, piece])
            pieces.append(output)
        worst = max(worst, error(concatenate(pieces), whole), state_error(subject, state, end))
    stateless, after = subject(inputs, None, reset)
    worst = max(worst, error(stateless, whole), error(subject.fixed(after), subject.fixed(end)))
    unmarked, _ = subject(inputs, subject.empty(), no_marks(LONGEST))
    prefilled, _ = subject(inputs, subject.empty(), None)
    plain, _ = subject(inputs[:, :PREFIX], None, None)
    return max(worst, error(prefilled, unmarked), error(plain, unmarked[:, :PREFIX]))


def stepwise(case: Case) -> float:
    """Token by token, the state as a scan's carry = one call, at every length."""
    subject = case.subject
    inputs, reset = subject.inputs(LONGEST), marks(LONGEST)
    steps, states, end = subject.steps(inputs, subject.empty(), reset)
    worst = 0.0
    for length in LENGTHS:
        output, state = subject(inputs[:, :length], subject.empty(), reset[:, :length])
        after = [leaf[length - 1] for leaf in states]
        worst = max(worst, error(steps[:, :length], output), error(after, subject.fixed(state)))
    return max(worst, state_error(subject, end, state))  # LENGTHS ends with the longest


def implementations(case: Case) -> float:
    """Every implementation = "recurrent": outputs and final states, from a state that has read something."""
    subject, reference = case.subject, case.reference
    start, worst = prefixed(reference), 0.0
    for length in case.lengths:
        call = (reference.inputs(length), start, marks(length))
        output, state = subject(*call)
        expected_output, expected_state = reference(*call)
        worst = max(worst, error(output, expected_output), state_error(reference, state, expected_state))
    return worst


def gradients(case: Case) -> float:
    """Every implementation = "recurrent": gradients for inputs, parameters and the initial state."""
    subject, reference = case.subject, case.reference
    start, worst = prefixed(reference), 0.0
    calls = [(reference.inputs(length), start, marks(length)) for length in case.gradient_lengths]
    if case.lengths == LENGTHS:
        calls.append((reference.inputs(LONGEST), None, marks(LONGEST)))  # training: nothing carried in or out
    for inputs, state, reset in calls:
        output, after = reference(inputs, state, reset)
        leaves = [] if state is None else reference.fixed(after)
        call = (inputs, state, reset, *cotangents(3, (output, leaves)))
        expected = reference.gradients(*call)
        alive = magnitude([np.asarray(leaf) for leaf in jax.tree.leaves(expected)]) > 0.0
        demand(alive, "all gradients are zero")
        worst = max(worst, error(subject.gradients(*call), expected))
    return worst


def causality(case: Case) -> float:
    """No gradient from an output to a later input, or to an input of another document.

    Token ids have no gradient: there, later tokens are changed and earlier outputs must not be.
    """
    subject = case.subject
    inputs, reset = subject.inputs(LONGEST), marks(LONGEST)
    start = prefixed(subject)
    output, after = subject(inputs, start, reset)
    if not is_float(inputs):
        changed = concatenate([inputs[:, :40], subject.inputs(LONGEST, seed=1)[:, 40:]])
        demand(not np.array_equal(changed, inputs), "the changed tokens are the same tokens")
        return error(subject(changed, start, reset)[0][:, :40], output[:, :40])
    silent = [np.zeros_like(leaf) for leaf in subject.fixed(after)]
    documents = np.cumsum(reset, axis=1)
    heard, leaked = np.zeros((BATCH, LONGEST)), 0.0
    for position in range(LONGEST):
        cotangent = np.zeros_like(output)
        cotangent[:, position] = cotangents(position, output)[:, position]
        pulled = subject.gradients(inputs, start, reset, cotangent, silent)["inputs"]
        demand(finite(pulled), "a gradient is not finite")
        gradient = np.abs(np.asarray(pulled)).max(axis=-1)
        forbidden = documents != documents[:, position : position + 1]
        forbidden[:, position + 1 :] = True
        leaked = max(leaked, float(gradient[forbidden].max(initial=0.0)))
        heard = np.maximum(heard, np.where(forbidden, 0.0, gradient))
    demand(bool((heard > 0.0).all()), "an input changes no output at all")
    return leaked / heard.max()


def reset(case: Case) -> float:
    """A marked token starts afresh: packed documents = separate documents; a NaN stays in its document."""
    subject = case.subject
    inputs = subject.inputs(LONGEST)
    packings = ((16, 1, 7, 1, 16, 1, 7), (7, 16, 1, 7, 1, 1, 16), (1, 16, 16, 7, 7, 1, 1))  # one per row
    starts = no_marks(LONGEST)
    for row, packing in enumerate(packings):
        starts[row, [piece.start for piece in cut(packing)]] = True
    packed, end = subject(inputs, subject.empty(), starts)
    worst = 0.0
    for row, packing in enumerate(packings):
        for piece in cut(packing):
            length = piece.stop - piece.start
            alone, state = subject(inputs[:, piece], subject.empty(), no_marks(length))
            worst = max(worst, error(packed[row, piece], alone[row]))
        worst = max(worst, row_state_error(subject, end, state, row))
    # What was there before a document, in the state or in the row, cannot touch it, not even as NaN.
    poisoned, after = subject(inputs, subject.poison(prefixed(subject)), starts)
    worst = max(worst, error(poisoned, packed), state_error(subject, after, end))
    if is_float(inputs):
        middle = cut(packings[0])[2]
        sick = inputs.copy()
        sick[0, middle.start + 2] = np.nan
        output, after = subject(sick, subject.empty(), starts)
        demand(not np.isfinite(output[0, middle.start + 2]).all(), "a NaN was made to look like a number")
        healthy = np.ones((BATCH, LONGEST), bool)
        healthy[0, middle] = False
        worst = max(worst, error(output[healthy], packed[healthy]), state_error(subject, after, end))
    return worst


def rows(case: Case) -> float:
    """A row's outputs, final state and gradients depend on that row alone; NaN in another row does not touch it."""
    subject = case.subject
    inputs, reset_marks = subject.inputs(LONGEST), marks(LONGEST)
    start = prefixed(subject)
    output, end = subject(inputs, start, reset_marks)
    worst = 0.0
    for row in range(BATCH):
        others = np.arange(BATCH) != row
        changed = subject.inputs(LONGEST, seed=1)
        changed = np.full_like(changed, np.nan) if is_float(changed) else changed
        changed[row] = inputs[row]
        other_marks = np.where(others[:, None], ~reset_marks, reset_marks)
        alone, after = subject(changed, subject.poison(start, others), other_marks)
        worst = max(worst, error(alone[row], output[row]), row_state_error(subject, after, end, row))
    if is_float(inputs):
        cotangent = np.zeros_like(output)
        cotangent[1] = cotangents(0, output)[1]
        silent = [np.zeros_like(leaf) for leaf in subject.fixed(end)]
        touched = subject.gradients(inputs, start, reset_marks, cotangent, silent)
        others = [np.take(leaf, [0, 2], axis=subject.batch_axis) for leaf in touched["state"]]
        worst = max(worst, magnitude([np.asarray(touched["inputs"])[[0, 2]], *others]))
    return worst


def left_padding(case: Case) -> float:
    """Padding before a reset = no padding, whatever is in it."""
    subject = case.subject
    real = (CHUNK, 7, 1)  # tokens of each row; the rest is padding
    inputs = subject.inputs(LONGEST)
    padded, starts = inputs.copy(), no_marks(LONGEST)
    for row, length in enumerate(real):
        starts[row, LONGEST - length] = True
        if is_float(inputs):
            padded[row, : LONGEST - length] = np.nan
    output, end = subject(padded, subject.empty(), starts)
    worst = 0.0
    for row, length in enumerate(real):
        kept = slice(LONGEST - length, LONGEST)
        alone, state = subject(inputs[:, kept], subject.empty(), no_marks(length))
        worst = max(worst, error(output[row, kept], alone[row]), row_state_error(subject, end, state, row))
    return worst


def bfloat16(case: Case) -> float:
    """bfloat16 inputs: bfloat16 outputs, float32 recurrent state that really accumulates in float32.

    A cache may have the compute dtype. The error is that of outputs and states against float32, in the Euclidean norm
    because single bfloat16 roundings are large; after 10 * 49 equal tokens, a sum kept in bfloat16 has stopped growing.
    """
    narrow, wide = case.narrow, case.subject
    inputs = narrow.inputs(LONGEST)
    rounded = inputs.astype(jnp.bfloat16) if is_float(inputs) else inputs  # numpy, by way of ml_dtypes
    output, _ = narrow(rounded, narrow.empty(), marks(LONGEST))
    if is_float(inputs):
        demand(output.dtype == jnp.bfloat16, f"bfloat16 inputs gave {output.dtype} outputs")
    for leaf in narrow.fixed(narrow.empty()):
        demand(leaf.dtype == jnp.float32, f"a recurrent state is {leaf.dtype}, not float32")
    expected, _ = wide(rounded.astype(inputs.dtype), wide.empty(), marks(LONGEST))
    worst = euclidean_error(output, expected)

    if not narrow.fixed(narrow.empty()):
        return worst
    repeats = 10
    constant = np.broadcast_to(rounded[:, :1], rounded.shape)
    states = narrow.empty(repeats * LONGEST), wide.empty(repeats * LONGEST)
    for _ in range(repeats):
        narrow_output, narrow_state = narrow(constant, states[0], no_marks(LONGEST))
        wide_output, wide_state = wide(constant.astype(inputs.dtype), states[1], no_marks(LONGEST))
        states = narrow_state, wide_state
    worst = max(worst, euclidean_error(narrow_output, wide_output))
    for got, want in zip(narrow.fixed(narrow_state), wide.fixed(wide_state)):
        worst = max(worst, euclidean_error(got, want))
    return worst


def euclidean_error(actual: jax.Array, expected: jax.Array) -> float:
    got, want = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if not (np.isfinite(got).all() and np.isfinite(want).all()):
        return math.inf
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), np.finfo(np.float64).tiny))


def strong(case: Case) -> float:
    """Inputs 30 times as large, which close every gate: finite values and gradients, and still = "recurrent"."""
    subject, reference, narrow = case.subject, case.reference, case.narrow
    inputs = reference.inputs(LONGEST)
    large = 30 * inputs if is_float(inputs) else inputs
    call = (large, reference.empty(), marks(LONGEST))
    expected, after = reference(*call)
    output, state = subject(*call)
    demand(finite((expected, after)), "a value of the reference is not finite")
    worst = max(error(output, expected), error(subject.fixed(state), reference.fixed(after)))
    for one, values in ((subject, large), (narrow, large.astype(jnp.bfloat16) if is_float(large) else large)):
        output, state = one(values, one.empty(), marks(LONGEST))
        demand(finite((output, state)), "a value is not finite")
        call = (values, one.empty(), marks(LONGEST), *cotangents(3, (output, one.fixed(state))))
        pulled = one.gradients(*call)
        demand(finite(pulled), "a gradient is not finite")
    return worst


def state_size(case: Case) -> float:
    """The state's bytes, counted without allocating it, are its bytes; batch comes first in every leaf."""
    module = case.subject.module
    state = module.init_state(BATCH, CAPACITY)
    counted = jax.eval_shape(lambda: module.init_state(BATCH, CAPACITY))
    doubled = jax.eval_shape(lambda: module.init_state(2 * BATCH, CAPACITY))
    demand(jax.tree.structure(counted) == jax.tree.structure(state), "init_state differs under eval_shape")
    case.subject(case.subject.inputs(1), state, no_marks(1))
    allocated, promised, twice = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) for tree in (state, counted, doubled)
    )
    axis = case.subject.batch_axis
    batched = all(leaf.ndim > axis and leaf.shape[axis] == BATCH for leaf in jax.tree.leaves(state))
    demand(batched, "a leaf of the state lacks its batch axis")
    return float(abs(allocated - promised) + abs(twice - 2 * allocated))


@dataclasses.dataclass(frozen=True)
class Law:
    """A law and the worst relative error a correct mixer may show in it."""

    measure: Callable[[Case], float]
    bound: float

    @property
    def name(self) -> str:
        return self.measure.__name__

    @property
    def statement(self) -> str:
        return self.measure.__doc__.splitlines()[0]


LAWS = (
    Law(split, 5e-5),
    Law(stepwise, 5e-5),
    Law(implementations, 5e-5),
    Law(gradients, 2e-4),
    Law(causality, 0.0),
    Law(reset, 5e-5),
    Law(rows, 0.0),
    Law(left_padding, 5e-5),
    Law(bfloat16, 0.05),
    Law(strong, 1e-3),
    Law(state_size, 0.0),
)
