"""What --suite=ops of benchmark.py measures: every op with its inputs, the sizes, the stated goals."""

import dataclasses
from collections.abc import Callable

import numpy as np

from seqmodels import ops

CHUNKED = "chunked"
PASSES = ("forward", "gradient")
# What the goals are stated for; other sizes are measured, but not judged.
STATED_SIZES = {"batch_size": 4, "heads": 4, "key_dim": 64, "value_dim": 64, "channels": 512, "states": 16}
STATED_LENGTH = 1024
STATED_GROWTH = (1024, 32_768)
LARGEST_EXPONENT = 1.05
GROWTH_BATCH_SIZE = 1
LETTERS = {
    "batch_size": "B", "heads": "H", "key_dim": "K", "value_dim": "V", "channels": "E", "states": "N",
}  # fmt: skip


def describe(sizes: dict[str, int]) -> str:
    return ", ".join(f"{LETTERS[name]} {sizes[name]}" for name in LETTERS if name in sizes)


@dataclasses.dataclass(frozen=True)
class Op:
    """A recurrence as the suite knows it."""

    title: str
    run: Callable  # (*inputs, implementation=...) -> (outputs, final state)
    inputs: Callable  # (random: numpy generator, sizes, batch size, length) -> float arrays
    sizes: tuple[str, ...]  # which of the sizes it depends on
    linear: bool = True  # whether its time should grow as the length


def _queries_keys_values(random, sizes, batch, steps):
    q, k = (random.normal(size=(batch, steps, sizes["heads"], sizes["key_dim"])) * sizes["key_dim"] ** -0.5 for _ in range(2))
    return q, k, random.normal(size=(batch, steps, sizes["heads"], sizes["value_dim"]))


def _with_decay(random, sizes, batch, steps, width):
    # Decays as trained models have them: a memory of some tens of steps.
    logits = random.normal(size=(batch, steps, sizes["heads"], width)) + 3.0
    return *_queries_keys_values(random, sizes, batch, steps), -np.logaddexp(0.0, -logits)


def _delta_rule_inputs(random, sizes, batch, steps, width):
    q, k, v, log_decay = _with_decay(random, sizes, batch, steps, width)
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    beta = 1.0 / (1.0 + np.exp(-random.normal(size=(batch, steps, sizes["heads"]))))
    return q, k, v, beta, log_decay


def _selective_scan_inputs(random, sizes, batch, steps):
    E, N = sizes["channels"], sizes["states"]
    x, dt = (random.normal(size=(batch, steps, E)) for _ in range(2))
    A = -np.broadcast_to(np.arange(1.0, N + 1.0), (E, N))
    B, C = (random.normal(size=(batch, steps, N)) for _ in range(2))
    return x, np.logaddexp(0.0, dt - 4.0), A, B, C


def _linear_recurrence_inputs(random, sizes, batch, steps):
    logits, b = (random.normal(size=(batch, steps, sizes["channels"])) for _ in range(2))
    return 1.0 / (1.0 + np.exp(-logits - 3.0)), b


_HEADS = ("heads", "key_dim", "value_dim")
OPS = {
    "no_decay": Op("gated_linear_attention without decay", ops.gated_linear_attention, _queries_keys_values, _HEADS),
    "scalar_decay": Op(
        "gated_linear_attention, one decay per head",
        ops.gated_linear_attention,
        lambda *arguments: _with_decay(*arguments, width=1),
        _HEADS,
    ),
    "channel_decay": Op(
        "gated_linear_attention, a decay per key channel",
        ops.gated_linear_attention,
        lambda random, sizes, *rest: _with_decay(random, sizes, *rest, width=sizes["key_dim"]),
        _HEADS,
    ),
    "delta_rule": Op(
        "delta_rule, one decay per head",
        ops.delta_rule,
        lambda *arguments: _delta_rule_inputs(*arguments, width=1),
        _HEADS,
    ),
    "channel_delta_rule": Op(
        "delta_rule, a decay per key channel",
        ops.delta_rule,
        lambda random, sizes, *rest: _delta_rule_inputs(random, sizes, *rest, width=sizes["key_dim"]),
        _HEADS,
    ),
    "selective_scan": Op("selective_scan", ops.selective_scan, _selective_scan_inputs, ("channels", "states")),
    "linear_recurrence": Op("linear_recurrence", ops.linear_recurrence, _linear_recurrence_inputs, ("channels",)),
    "softmax_attention": Op("softmax_attention", ops.softmax_attention, _queries_keys_values, _HEADS, linear=False),
}


@dataclasses.dataclass(frozen=True)
class Goal:
    """How many times less than another form the chunked form's gradient shall take, at the stated sizes."""

    op: str
    against: str
    factor: float
    measure: str = "wall_ms"  # or temp_bytes


GOALS = (
    *(Goal(op, "associative", 5.0) for op in ("scalar_decay", "channel_decay")),
    *(Goal(op, "recurrent", 3.0) for op in ("scalar_decay", "channel_decay")),
    Goal("selective_scan", "associative", 3.0),
    Goal("selective_scan", "associative", 4.0, "temp_bytes"),
)
