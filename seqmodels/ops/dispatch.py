"""Which form an op takes and how long its chunks are: decided here for every op, in one way, and recorded.

    with ops.record_choices() as choices:
        train_step(state, batch)          # the call that traces it
    choices                               # {"gated_linear_attention: pallas tpu/gated_linear_attention (chunk 128)": None}

An op names its forms and its kernels; ``dispatch`` gives it the one to call. One step at a time is ``recurrent``. Otherwise, where
the caller does not say, the first kernel that takes the call, else the op's default. A kernel that the device has and the call
leaves is recorded with the reason. Forms are chosen while a function is traced: a call of a function that is compiled already
traces nothing, and so records nothing.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Final

from seqmodels import xla_cpu
from seqmodels.ops import kernels, target
from seqmodels.ranges import OneOf

IMPLEMENTATIONS: Final = ("recurrent", "associative", "parallel", "chunked", "pallas")
Implementation = Annotated[str, OneOf(IMPLEMENTATIONS)]
"""The type of a config's field that names one."""

# Steps of a chunk where the caller does not say: by op and device, and by kernel where that wants another length; None: the
# kernel has no chunks to choose. Figures for a CPU were measured on two cores of an AMD EPYC, forward and backward. Those for a
# TPU and a GPU are what the arithmetic of matrix units and of on-chip memory favours: no others have been tried on a device.
CHUNK_SIZES: Final[dict[str, dict[str, int | None]]] = {
    # CPU: 32 steps take 1.0 to 1.2 times as long, 128 1.1 to 1.4 times (B 1 to 16, T 256 to 4096).
    "gated_linear_attention": {
        "cpu": 64, "tpu": 64, "gpu": 64, "tpu/gated_linear_attention": 128, "gpu/gated_linear_attention": 64,
    },
    # CPU: 16 and 64 take 1.3 to 1.8 times as long as 32 (B 4, T 1024, H 4, K = V = 64).
    "delta_rule": {"cpu": 32, "tpu": 64, "gpu": 64, "tpu/delta_rule": 128, "gpu/delta_rule": 64},
    # CPU: 8 to 64 take the same time; larger ones save fewer states, smaller ones recompute in less memory.
    "selective_scan": {"cpu": 32, "tpu": 64, "gpu": 64, "tpu/selective_scan": None, "gpu/selective_scan": None},
    # CPU: the fastest at B 16, T 256, D 128, N 64.
    "diagonal_ssm": {"cpu": 64, "tpu": 64, "gpu": 64},
    # CPU: 32 as fast as 64, with fewer steps to make its tables.
    "dplr_ssm": {"cpu": 32, "tpu": 32, "gpu": 32},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class KernelForm:
    """A form that runs in a kernel.

    Attributes:
      run: called with the op's arguments, ``kernel`` and, where there are chunks, ``chunk_size``.
      call: what the kernel's ``unsupported_reason`` wants to know, but for the chunk size.
    """

    run: Callable
    call: Mapping[str, Any]


def dispatch(
    op: str,
    forms: Mapping[str, Callable | str],
    implementation: str | None,
    *,
    steps: int,
    one_step: bool | None = None,
    chunk_size: int | None = None,
    default: str = "chunked",
    kernel_forms: Mapping[str, KernelForm] | None = None,
) -> Callable:
    """The form that a call of an op takes.

    Args:
      op: its name, in ``CHUNK_SIZES`` if it has chunks.
      forms: by the names of IMPLEMENTATIONS, functions of the op's arguments (of ``chunked`` also ``chunk_size=``), or why
        there is none.
      implementation: as asked for.
      steps: T.
      one_step: whether ``None`` means recurrent; None: where T is 1.
      chunk_size: as asked for.
      default: the form that ``None`` means without a kernel.
      kernel_forms: by the names of kernels, the best first; ``"pallas"`` means the first that takes the call.

    Returns:
      A function of the op's arguments.

    Raises:
      ValueError: an unknown implementation, or a chunk size below 1.
      NotImplementedError: the op has no such form, or no kernel takes the call (one that would ignore ``chunk_size`` does not).
    """
    implementation = requested(implementation, steps == 1 if one_step is None else one_step, chunk_size)
    left = []
    if implementation in ("pallas", None) and kernel_forms:
        for name, form in kernel_forms.items():
            size = _chunk_steps(op, steps, chunk_size, f"{target.device()}/{name}")
            chunks = {"chunk_size": size} if op in CHUNK_SIZES else {}
            kernel = kernels.find(name, **form.call, **chunks)
            if isinstance(kernel, kernels.Kernel):
                record(op, f"pallas {kernel.name}", size, left)
                return functools.partial(form.run, kernel=kernel, **({} if size is None else chunks))
            left.append(kernel)
        if implementation == "pallas":
            raise NotImplementedError(f"{op} has no Pallas kernel for {left[-1].message}")
    chosen = default if implementation is None else implementation
    form = forms[chosen]
    if isinstance(form, str):
        raise NotImplementedError(form)
    size = _chunk_steps(op, steps, chunk_size, target.device()) if chosen == "chunked" else None
    record(op, chosen, size, left)
    return form if size is None else functools.partial(form, chunk_size=size)


def requested(implementation: str | None, one_step: bool, chunk_size: int | None = None) -> str | None:
    """What was asked for; None is still the op's own choice, and of one step recurrent.

    Raises:
      ValueError: an unknown implementation, or a chunk size below 1.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    return "recurrent" if implementation is None and one_step else implementation


def _chunk_steps(op: str, steps: int, asked: int | None, place: str) -> int | None:
    """Steps of a chunk, no more than the sequence has: as asked for, else of the table; None where nothing has chunks."""
    if op not in CHUNK_SIZES:
        return None
    table = CHUNK_SIZES[op]
    size = asked or table[place if place in table else target.device()]
    return None if size is None else min(steps, size)


# ---- the record

_recorded = contextvars.ContextVar("seqmodels_ops_choices", default=())


@contextlib.contextmanager
def record_choices() -> Iterator[dict[str, None]]:
    """The choices made inside, as lines for a person, each once, in the order in which they were made."""
    choices = {}
    token = _recorded.set((*_recorded.get(), choices))
    try:
        yield choices
    finally:
        _recorded.reset(token)


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Inside this context choices are made and not noted: a model's start is measured on a few tokens before it is trained."""
    token = _recorded.set(())
    try:
        yield
    finally:
        _recorded.reset(token)


def record(op: str, form: str, chunk_size: int | None = None, left: list[kernels.Unsupported] | tuple = ()) -> None:
    """Notes what an op has resolved to, and which kernels of this device it left, and why."""
    if target.device() == "cpu":
        xla_cpu.warn_of_wrong_fusions()
    chunk = "" if chunk_size is None else f" (chunk {chunk_size})"
    reasons = "".join(f", not {kernel.name}: {kernel.reason}" for kernel in left if kernel.reason is not None)
    for choices in _recorded.get():
        choices[f"{op}: {form}{chunk}{reasons}"] = None
