"""Which operation of a traced function is the first to give a number that is not finite, or an absurd one.

The function's jaxpr is evaluated equation by equation. Loops and calls run whole as long as what they give is sound; the one
that gives something else is entered, at the iteration where it begins, until a single operation is left.

Some operations give infinities on purpose (masks). So the same function is evaluated with other, healthy arguments as well:
what an operation gives there is no finding here.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

ABSURD = 1e10  # no number of a sound training step in this project's models is larger
LOOP = "loop"  # in a scope
ABSURD_RATIO = 1e6  # to the largest of the same operation with healthy arguments

_CALLS = ("pjit", "jit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call",
          "custom_vjp_call_jaxpr", "custom_lin")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Finding:
    """The operation, and where it stands."""

    kind: str  # "nan", "inf" or "absurd"
    operation: str  # the primitive's name
    scope: str  # named scopes, outermost first, "jvp" and "transpose" among them, and `LOOP` for each loop
    loops: tuple[int, ...]  # the iteration of each loop around it, outermost first
    source: str  # file:line of this project's code, innermost first
    largest: float  # finite magnitude of what it gave
    inputs: tuple[str, ...]  # shape, dtype and finite range of what it read
    always: bool = False  # it is NaN with the healthy arguments, too

    @property
    def backward(self) -> bool:
        """Whether it belongs to the backward pass."""
        return "transpose(" in self.scope


def first_finding(function: Callable, arguments: Sequence[Any], healthy: Sequence[Any]) -> Finding | None:
    """The first operation of ``function(*arguments)``, in program order, whose result is wrong; None: all are sound.

    Where all are as sound as in health, and the function gives NaN all the same, it is the first that gives NaN.

    Args:
      function: a traceable function of pytrees of arrays.
      healthy: arguments of the same shapes, on which it is sound.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    flat, sound = jax.tree.leaves(tuple(arguments)), jax.tree.leaves(tuple(healthy))
    found = _search(closed.jaxpr, closed.consts, flat, sound, _Place())
    if found is None and _summary(jax.jit(core.jaxpr_as_fun(closed))(*flat)).nan:
        found = _search(closed.jaxpr, closed.consts, flat, sound, _Place(always=True))
    return found


@dataclasses.dataclass(frozen=True)
class _Summary:
    nan: bool
    inf: bool
    largest: float

    def wrong(self, healthy: "_Summary", always: bool) -> str | None:
        if self.nan and (always or not healthy.nan):
            return "nan"
        if self.inf and not healthy.inf:
            return "inf"
        return "absurd" if self.largest > max(ABSURD, ABSURD_RATIO * healthy.largest) else None


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where one looks: the iterations of the loops around it, its scope; and whether a NaN counts that is there in health, too."""

    loops: tuple[int, ...] = ()
    scope: str = ""
    always: bool = False

    def at(self, equation) -> "_Place":
        own = str(equation.source_info.name_stack)
        return dataclasses.replace(self, scope=f"{self.scope}/{own}" if self.scope and own else self.scope or own)

    def iteration(self, number: int) -> "_Place":
        return dataclasses.replace(self, loops=(*self.loops, number), scope=f"{self.scope}/{LOOP}".lstrip("/"))


def _summary(values: Sequence[Any]) -> _Summary:
    floats = [value for value in values if jnp.issubdtype(jnp.result_type(value), jnp.inexact)]
    nan = inf = False
    largest = 0.0
    for value in floats:
        has_nan, has_inf, finite = jax.device_get(_statistics(value))
        nan, inf, largest = nan or bool(has_nan), inf or bool(has_inf), max(largest, float(finite))
    return _Summary(nan, inf, largest)


@jax.jit
def _statistics(value):
    magnitude = jnp.abs(value).astype(jnp.float32)
    finite = jnp.where(jnp.isfinite(magnitude), magnitude, 0.0)
    return jnp.isnan(value).any(), jnp.isinf(value).any(), jnp.max(finite, initial=0.0)


def _search(jaxpr, consts, flat, sound, place) -> Finding | None:
    """`first_finding` of a jaxpr with the values of its inputs, here and in health."""
    here, there = dict(zip(jaxpr.constvars, consts)), dict(zip(jaxpr.constvars, consts))
    here |= dict(zip(jaxpr.invars, flat, strict=True))
    there |= dict(zip(jaxpr.invars, sound, strict=True))
    last_use = {}
    for number, equation in enumerate(jaxpr.eqns):
        last_use |= {var: number for var in equation.invars if not isinstance(var, core.Literal)}
    results = {var for var in jaxpr.outvars if not isinstance(var, core.Literal)}

    def read(values, var):
        return var.val if isinstance(var, core.Literal) else values[var]

    for number, equation in enumerate(jaxpr.eqns):
        inputs = [read(here, var) for var in equation.invars]
        healthy_inputs = [read(there, var) for var in equation.invars]
        evaluate = _evaluate(jaxpr, equation)
        outputs, healthy_outputs = evaluate(inputs), evaluate(healthy_inputs)
        kind = _summary(outputs).wrong(_summary(healthy_outputs), place.always)
        if kind is not None:
            inner = _enter(equation, inputs, healthy_inputs, place.at(equation))
            return inner or _finding(kind, equation, inputs, outputs, place.at(equation))
        for var, value, healthy in zip(equation.outvars, outputs, healthy_outputs, strict=True):
            here[var], there[var] = value, healthy
        for var in {var for var in equation.invars if not isinstance(var, core.Literal)}:
            if last_use[var] == number and var not in results:
                del here[var], there[var]
    return None


def _evaluate(jaxpr, equation) -> Callable:
    """One equation as a function of its inputs (literals among them) to a list of its results."""
    variables = list(dict.fromkeys(var for var in equation.invars if not isinstance(var, core.Literal)))
    indices = [equation.invars.index(var) for var in variables]
    single = jaxpr.replace(constvars=[], invars=variables, outvars=list(equation.outvars), eqns=[equation])
    run = core.jaxpr_as_fun(core.ClosedJaxpr(single, []))
    return lambda inputs: list(run(*(inputs[index] for index in indices)))


def _enter(equation, inputs, healthy, place) -> Finding | None:
    """The finding inside a loop, a call or a branch; None where it has none, or is a single operation."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return _enter_scan(equation, inputs, healthy, place)
    if name == "while":
        return _enter_while(params, inputs, healthy, place)
    if name == "cond":
        body = params["branches"][int(inputs[0])]
        return _search(body.jaxpr, body.consts, inputs[1:], healthy[1:], place)
    if name in _CALLS:
        body = next(params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params)
        body, consts = (body.jaxpr, body.consts) if isinstance(body, core.ClosedJaxpr) else (body, ())
        return _search(body, consts, inputs, healthy, place)
    return None


def _enter_scan(equation, inputs, healthy, place) -> Finding | None:
    body, length, reverse = (equation.params[name] for name in ("jaxpr", "length", "reverse"))
    # Read off the axes, as versions of JAX name the numbers in other ways: what is stacked has one more than in the body.
    num_carry = sum(var.aval.ndim == inner.aval.ndim for var, inner in zip(equation.outvars, body.jaxpr.outvars, strict=True))
    num_stacked = sum(var.aval.ndim > inner.aval.ndim for var, inner in zip(equation.invars, body.jaxpr.invars, strict=True))
    num_consts = len(inputs) - num_carry - num_stacked
    run = jax.jit(core.jaxpr_as_fun(body))
    consts, carry, stacked = _split(inputs, num_consts, num_carry)
    healthy_consts, healthy_carry, healthy_stacked = _split(healthy, num_consts, num_carry)
    for number in range(length):
        at = length - 1 - number if reverse else number
        here = [*consts, *carry, *(each[at] for each in stacked)]
        there = [*healthy_consts, *healthy_carry, *(each[at] for each in healthy_stacked)]
        outputs, healthy_outputs = run(*here), run(*there)
        if _summary(outputs).wrong(_summary(healthy_outputs), place.always):
            return _search(body.jaxpr, body.consts, here, there, place.iteration(at))
        carry, healthy_carry = outputs[:num_carry], healthy_outputs[:num_carry]
    return None


def _enter_while(params, inputs, healthy, place) -> Finding | None:
    condition, body = params["cond_jaxpr"], params["body_jaxpr"]
    num_condition, num_body = params["cond_nconsts"], params["body_nconsts"]
    goes_on, run = jax.jit(core.jaxpr_as_fun(condition)), jax.jit(core.jaxpr_as_fun(body))
    condition_consts, consts, carry = _split(inputs, num_condition, num_body)
    _, healthy_consts, healthy_carry = _split(healthy, num_condition, num_body)
    number = 0
    while goes_on(*condition_consts, *carry)[0]:
        here, there = [*consts, *carry], [*healthy_consts, *healthy_carry]
        outputs, healthy_outputs = run(*here), run(*there)
        if _summary(outputs).wrong(_summary(healthy_outputs), place.always):
            return _search(body.jaxpr, body.consts, here, there, place.iteration(number))
        carry, healthy_carry, number = outputs, healthy_outputs, number + 1
    return None


def _split(values, first, second):
    return values[:first], values[first : first + second], values[first + second :]


def _finding(kind, equation, inputs, outputs, place) -> Finding:
    return Finding(
        kind, equation.primitive.name, place.scope, place.loops, _source(equation), _summary(outputs).largest,
        tuple(_described(value) for value in inputs), place.always,
    )  # fmt: skip


def _described(value) -> str:
    array = np.asarray(jax.device_get(value))
    text = f"{array.dtype.name}{list(array.shape)}"
    if array.size and jnp.issubdtype(array.dtype, jnp.inexact):
        magnitude = np.abs(array.astype(np.complex64 if np.iscomplexobj(array) else np.float32))
        finite = magnitude[np.isfinite(magnitude)]
        text += f" up to {finite.max(initial=0.0):.3g}"
        if finite.size < array.size:
            text += f", {array.size - finite.size} not finite"
        if finite.size and finite.min() == 0.0:
            text += ", with zeros"
    return text


def _source(equation) -> str:
    """The innermost lines of this project that the operation comes from."""
    traceback = equation.source_info.traceback
    if traceback is None:
        return ""
    ours = []
    for frame in traceback.frames:
        found = re.search(r"seqmodels/(.*\.py)$", frame.file_name.replace("\\", "/"))
        if found and not found[1].endswith("first_nonfinite.py"):
            ours.append(f"{found[1]}:{frame.line_num}")
    return ", ".join(ours[:2])
