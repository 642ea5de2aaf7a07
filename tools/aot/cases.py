"""What ``make aot`` compiles: every op as its kernel, the whole training step of three models, and for which chips."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from configs import tinystories
from seqmodels import ops
from seqmodels.config import RunConfig, from_config_dict
from seqmodels.model import UNROLL_UP_TO


@dataclasses.dataclass(frozen=True)
class Chip:
    """Something to compile for, present or not."""

    title: str
    device: str  # of ops.compile_for
    platform: str  # what JAX calls it
    kind: str  # of training.topologies
    count: int
    memory_bytes: int  # of a kernel on chip: VMEM, or a block's shared memory
    options: dict | None = None  # of the compiler


CHIPS = {
    "v5e": Chip("TPU v5e", "tpu", "tpu", "v5e", 4, 128 * 2**20),
    "v6e": Chip("TPU v6e", "tpu", "tpu", "v6e", 4, 128 * 2**20),
    # XLA's own part of a gradient takes a minute of optimisation, and nothing here is read off it; Mosaic's kernels and ptxas
    # do not ask for this option.
    "sm_90a": Chip("NVIDIA H200 (sm_90a)", "gpu", "cuda", "h200", 1, 232_448, options={"xla_backend_optimization_level": 0}),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """An op at one shape. Its gradient is compiled, which holds its forward pass too."""

    run: Callable  # (**inputs) -> (output, state), as implementation="pallas"
    inputs: dict[str, jax.ShapeDtypeStruct]
    matrix_products: bool = True  # whether its kernels should keep the matrix unit busy
    devices: tuple[str, ...] = ("tpu", "gpu")  # which have a kernel; elsewhere it must say what it lacks
    spilled_bytes: int = 0  # of local memory that a thread of its GPU kernels may store and load


def _array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


_float32 = functools.partial(_array, dtype=jnp.float32)
_marks = functools.partial(_array, dtype=jnp.bool_)

B, T, H = 4, 2048, 32  # 8,192 tokens of width 4096 with heads of 128
N = 16


def _attention(width, *, groups=H, **others):
    q, k, v = _array(B, T, H, width), _array(B, T, groups, width), _array(B, T, groups, width)
    return {"q": q, "k": k, "v": v} | others


def _heads(width, decay=None, *, heads=H, groups=None, values=None, **others):
    """Queries and keys of ``groups`` heads, ``values`` wide values of all, a log decay ``decay`` wide."""
    q = _array(B, T, groups or heads, width)
    inputs = {"q": q, "k": q, "v": _array(B, T, heads, values or width)}
    if decay is not None:
        inputs["log_decay"] = _float32(B, T, heads, decay)
    return inputs | others


def _op(function, **options):
    return functools.partial(function, implementation="pallas", **options)


_linear, _delta, _attend = _op(ops.gated_linear_attention), _op(ops.delta_rule), _op(ops.softmax_attention)
_E = 4096


def _scan_of(batch, steps):
    return {
        "x": _array(batch, steps, _E),
        "dt": _float32(batch, steps, _E),
        "A": _float32(_E, N),
        "B": _array(batch, steps, N),
        "C": _array(batch, steps, N),
    }


_scan = _scan_of(B, T)
_recurrence = {"a": _float32(B, T, _E), "b": _float32(B, T, _E)}

# The kernels that make gradients keep more addresses of shared memory than fit into registers: what they may spill is little above
# what they do.
_linear_spilling = functools.partial(Case, _linear, spilled_bytes=2_048)
_delta_spilling = functools.partial(Case, _delta, spilled_bytes=4_096)

CASES = {
    "no decay": Case(_linear, _heads(128)),
    "one decay per head": _linear_spilling(_heads(128, 1)),
    "one decay per head (width 64)": _linear_spilling(_heads(64, 1)),
    "one decay per head (one group)": _linear_spilling(_heads(128, 1, groups=1)),
    "decay per channel": _linear_spilling(_heads(128, 128)),
    "decay per channel (width 64)": _linear_spilling(_heads(64, 64)),
    "decay on both sides": Case(_linear, _heads(128, 128, value_log_decay=_float32(B, T, H, 128))),
    "decay per channel (values of 256)": _linear_spilling(_heads(128, 128, heads=16, values=256)),
    "bonus": _linear_spilling(_heads(64, 64, bonus=_float32(H, 64))),
    "delta rule": _delta_spilling(_heads(128, beta=_array(B, T, H))),
    "delta rule with a decay per head": _delta_spilling(_heads(128, 1, beta=_array(B, T, H))),
    "delta rule with a decay per head (width 64)": _delta_spilling(_heads(64, 1, beta=_array(B, T, H))),
    "delta rule with a decay per channel": _delta_spilling(_heads(128, 128, beta=_array(B, T, H))),
    "delta rule (keys of 256)": _delta_spilling(_heads(256, heads=16, beta=_array(B, T, 16))),
    "delta rule with a decay per head (keys of 256)": Case(
        _delta, _heads(256, 1, heads=16, beta=_array(B, T, 16)), spilled_bytes=6_144
    ),
    "delta rule in float32 with a decay per channel": Case(
        _delta,
        {name: _float32(*x.shape) for name, x in _heads(128, 128, beta=_array(B, T, H)).items()},
        devices=("tpu",),
    ),
    "delta rule with a decay per channel (keys of 256)": _delta_spilling(_heads(256, 256, heads=16, beta=_array(B, T, 16))),
    "selective scan": Case(_op(ops.selective_scan), _scan, matrix_products=False),
    "selective scan (documents)": Case(
        _op(ops.selective_scan), _scan | {"reset": _marks(B, T)}, matrix_products=False
    ),
    "selective scan (batch of 8)": Case(_op(ops.selective_scan), _scan_of(8, 1024), matrix_products=False),
    "linear recurrence": Case(_op(ops.linear_recurrence), _recurrence, matrix_products=False),
    "linear recurrence (documents)": Case(
        _op(ops.linear_recurrence), _recurrence | {"reset": _marks(B, T)}, matrix_products=False
    ),
    "softmax attention": Case(_attend, _attention(128), devices=("tpu",)),
    "softmax attention (groups and a window)": Case(
        _op(ops.softmax_attention, window=256), _attention(128, groups=8), devices=("tpu",)
    ),
    "softmax attention (width 64 and documents)": Case(
        _attend, _attention(64, reset=_marks(B, T)), devices=("tpu",)
    ),
}  # fmt: skip

PIECES = 32_768
_STEPS = {
    "gla": {"num_heads": 4},  # K 128, V 256
    "mamba": {},  # E 2048, N 16
    "gated_deltanet": {"num_heads": 8},
}


def step_config(name: str) -> RunConfig:
    """A model of width 1024 with the mixer ``name``, sized so that its kernels apply, as ``train.py`` would train it."""
    config = tinystories.get_config(name)
    settings = {
        "model.d_model": 1024,
        "model.repeats": UNROLL_UP_TO + 1,  # a loop, whose body is compiled once
        "model.compute_dtype": "bfloat16",
        "data.seq_len": 2048,
        "data.batch_size": 2,
    } | {f"model.mixers.{name}.{field}": value for field, value in _STEPS[name].items()}
    config.update_from_flattened_dict(settings)
    return from_config_dict(config)


STEPS = tuple(_STEPS)

# On a TPU XLA's own part of these takes it minutes to optimise, of chunks that it prepares above all, and is left unoptimised. The
# other kernels are compiled as they run: JAX's O0 makes them longer (up to 38 % more bundles, 1.3 MiB more VMEM).
UNOPTIMISED_ON_TPU = {"decay on both sides", *STEPS}
