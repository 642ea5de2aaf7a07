"""Odd values for every field of every config: what a person may type by mistake, and what a program may pass on.

``cases()`` is the sweep; ``made_alone(case)`` takes a value through the field's own group, ``made(case)`` through the whole
config, ``two_steps(case)`` through the model and two optimizer steps besides.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from configs import base
from seqmodels import config as config_lib
from seqmodels import fields as fields_lib
from seqmodels import ranges
from seqmodels.config import RunConfig
from seqmodels.data import tasks
from seqmodels.errors import UserError
from seqmodels.training.state import Trainer
from tests.configs import tiny

NUMBERS = (
    0, 1, -1, 2, 3, 7, 255, 2**20, 2**20 + 1, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**30, 10**5000, -(2**31), -(2**63),
    0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 1e-3, 1.0 - 1e-12, 1.0 + 1e-12, 5e-324, 1e-60, 1e-38, 1e38, 1e39, 1e308, -1e308,
    math.nan, math.inf, -math.inf,
)  # fmt: skip
TEXTS = ("", " ", "None", "nan", "0", "\0", "a\nb", "\x1b[31m", "\ud800", "x" * 10**5, "../..", "é")
OTHERS = (None, True, False, (), [], {}, (0,), (-1,), (math.nan,), (10**30,), ("x",), ((1, 2, 3),), ((1, math.inf),), b"x")

OPTIONS = ("tasks", *config_lib.LAYER_KINDS)  # fields that hold the options of something, by its name


@dataclasses.dataclass(frozen=True)
class Case:
    """One field with a value."""

    field: str  # dotted, as in --config.<field>
    value: Any
    hint: Any  # the field's declared type

    def __str__(self) -> str:
        return f"{self.field}={ranges.short_repr(self.value)}"


def cases(only: str | None = None) -> Iterator[Case]:
    """Every field of a run's config, of every mixer and of every task (or one of them), with every odd value of its kind."""
    for field, hint in fields().items():
        if only not in (None, field):
            continue
        kind = ranges.unpack_type(hint)[0]
        for value in (*(NUMBERS if kind in (int, float, bool) else NUMBERS[:2]), *(TEXTS if kind is str else TEXTS[:4]), *OTHERS):
            yield Case(field, value, hint)


@functools.cache
def groups() -> dict[str, Any]:
    """A legal instance of every group of fields, by dotted name; of the groups of options, of all there are."""
    small = tiny()
    found = {field.name: getattr(small, field.name) for field in dataclasses.fields(small) if field.name != "seed"}
    for kind, registry in config_lib.LAYER_KINDS.items():
        found |= {f"model.{kind}.{name}": registry.load(name).Config() for name in registry.names()}
    return found | {f"data.tasks.{name}": task() for name, task in tasks.TASKS.items()}


@functools.cache
def fields() -> dict[str, Any]:
    """Declared types by dotted name."""
    found = {"seed": ranges.declared(RunConfig)["seed"]}
    for prefix, group in groups().items():
        declared = ranges.declared(type(group))
        found |= {f"{prefix}.{name}": hint for name, hint in declared.items() if name not in OPTIONS}
    return found


def values_of(case: Case) -> dict:
    """The nested dict of a small run's config with the case's value; its mixer or task is in use."""
    parts = case.field.split(".")
    changes: dict[str, Any] = {}
    if parts[:2] in (["model", "mixers"], ["model", "channel_layers"]):
        changes["model.pattern"] = f"{parts[2]} mlp" if parts[1] == "mixers" else parts[2]
    if parts[:2] == ["data", "tasks"]:
        changes |= {"data.task": parts[2], "train.sample_every_steps": 0, "data.seq_len": 64}
    values = copy.deepcopy(_small_values())
    for name, value in (changes | {case.field: case.value}).items():
        group = values
        *path, last = name.split(".")
        for part in path:
            group = group[part]
        group[last] = value
    if parts[:3] == ["data", "tasks", "compression"]:
        values["model"]["readout"] = "last"
    return values


@functools.cache
def _small_values() -> dict:
    """The nested dict of a small run's config, with the options of every mixer and task."""
    values = base.get_config().to_dict()
    small = config_lib.to_dict(tiny())
    for group in ("data", "model"):
        small[group] |= {name: values[group][name] for name in OPTIONS if name in values[group]}
    return small


def made_alone(case: Case) -> tuple | None:
    """The value as the field's own group holds it, in a tuple of one; None where it is refused, in one line."""
    prefix, _, name = case.field.rpartition(".")
    if not prefix:
        config = made(case)
        return None if config is None else (getattr(config, name),)
    group = groups()[prefix]
    values = {field.name: getattr(group, field.name) for field in dataclasses.fields(group)} | {name: case.value}
    try:
        return (getattr(fields_lib.build(type(group), values, f"config.{prefix}"), name),)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 500, f"{case}: {error}"
        return None


def made(case: Case) -> RunConfig | None:
    """The config with the case's value; None where it is refused with a UserError, of one line."""
    try:
        return config_lib.from_config_dict(values_of(case))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, f"{case}: {error}"
        return None


def two_steps(case: Case) -> str:
    """What becomes of the case: "refused", "diverged" or "trained". Any other error is a fault, and raised.

    The data are random tokens: fields of ``data`` beyond the config itself are not tried here.
    """
    config = made(case)
    if config is None:
        return "refused"
    try:
        setup = Trainer(config, 257)
        setup.check_memory()
    except UserError:
        return "refused"
    rng = np.random.default_rng(0)
    shape = config.data.batch_size, config.data.seq_len
    state = setup.init()
    for _ in range(2):
        tokens = rng.integers(0, 257, shape, dtype=np.int32)
        batch = {"inputs": tokens, "targets": tokens}
        if config.data.task != "text":
            batch["weights"] = np.ones(shape, np.float32)
        try:
            state, metrics = setup.train_step(state, setup.put(batch))
        except (UserError, NotImplementedError):
            return "refused"
    metrics = jax.device_get(metrics)
    return "trained" if math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"]) else "diverged"
