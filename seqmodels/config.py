"""From an ml_collections config to frozen dataclasses, once, at the boundary; and to JSON and back.

``configs/base.py`` is where defaults live. The dataclasses (beside the code that reads them) have none,
so a field that is missing, misspelt or of another type is an error here and never a silent default.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any

from ml_collections import ConfigDict

from seqmodels import mixers
from seqmodels.data import TEXT, DataConfig, atomic, tasks
from seqmodels.errors import UserError
from seqmodels.fields import build
from seqmodels.formats import json_text
from seqmodels.model import ModelConfig
from seqmodels.pattern import mixers_in_pattern
from seqmodels.ranges import (
    Above,
    AtLeast,
    AtMost,
    Below,
    Checked,
    Count,
    CountOrZero,
    Epsilon,
    Fraction,
    NonNegative,
    OneOf,
    Positive,
    Seed,
)

SCHEDULES = ("cosine", "linear", "constant")  # of the learning rate, after warm-up

MOST_CONFIG_BYTES = 4 << 20

# Fields younger than some run folders, with what their runs had.
LEGACY_MODEL_DEFAULTS = {
    "vocab_size": None, "embedding_norm": False, "branch_rms": None, "norm": "rms", "logit_cap": None, "readout": "each",
}  # fmt: skip
LEGACY_TRAIN_DEFAULTS = {"init_from": None, "skip_nonfinite": False}
LEGACY_OPTIM_DEFAULTS = {"rate_changes": ()}
LEGACY_MIXER_DEFAULTS = {"linear_attention": {"norm_eps": None, "conv_width": 0}}
LEGACY_DATA_DEFAULTS = {"task": "text", "tasks": {}, "validation_source": None}


@dataclasses.dataclass(frozen=True)
class OptimConfig(Checked, where="optim"):
    """How parameters move. Defaults live in configs/base.py."""

    learning_rate: Positive
    schedule: Annotated[str, OneOf(SCHEDULES)]
    warmup_steps: CountOrZero
    decay_steps: Count | None
    final_fraction: Fraction
    weight_decay: NonNegative
    beta1: Annotated[float, AtLeast(0), Below(1)]
    beta2: Annotated[float, AtLeast(0), Below(1)]
    eps: Epsilon
    clip_norm: Positive
    accumulation_steps: Count
    # (step, factor): from that step on the rate is the schedule's times it
    rate_changes: tuple[tuple[CountOrZero, Annotated[float, Above(0), AtMost(1)]], ...]


@dataclasses.dataclass(frozen=True)
class TrainConfig(Checked, where="train"):
    """How a run begins, how long it goes and what it reports. Defaults live in configs/base.py."""

    init_from: str | None
    steps: Count
    skip_nonfinite: bool
    log_every_steps: Count
    eval_every_steps: Count
    eval_tokens: Count
    checkpoint_every_steps: Count
    keep_checkpoints: Count
    sample_every_steps: CountOrZero
    sample_prompt: str
    compilation_cache_dir: str


@dataclasses.dataclass(frozen=True)
class MeshConfig(Checked, where="mesh"):
    """Devices along each axis; ``data=-1`` takes all that the others leave."""

    data: Annotated[int, AtLeast(-1)]
    fsdp: Count
    tensor: Count
    sequence: Count


@dataclasses.dataclass(frozen=True)
class RunConfig(Checked):
    """Everything that decides a run."""

    seed: Seed
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    train: TrainConfig
    mesh: MeshConfig

    def __post_init__(self):
        super().__post_init__()
        readout = "each" if self.data.synthetic_task is None else self.data.synthetic_task.readout
        if self.model.readout != readout:
            raise UserError(f"model.readout={self.model.readout!r}: data.task={self.data.task} asks for {readout!r}")
        if self.data.synthetic_task is not None and self.train.sample_every_steps:
            raise UserError(
                f"data.task={self.data.task} has no text to write: set train.sample_every_steps=0, not "
                f"{self.train.sample_every_steps}"
            )


def from_config_dict(config: ConfigDict | Mapping[str, Any]) -> RunConfig:
    """A ConfigDict (or the nested dict of a config.json) as frozen dataclasses.

    Options of mixers that the pattern does not use are dropped, and so are those of tasks other than data.task.

    Raises:
      UserError: an unknown or missing field, a wrong type, or values that cannot work together.
    """
    if isinstance(config, ConfigDict):
        config = config.copy_and_resolve_references().to_dict()
    return build(RunConfig, _with_task(_with_mixer_configs(dict(config))), "config")


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """The ``model`` part alone, with the same errors."""
    return build(ModelConfig, _with_mixer_configs({"model": dict(values)})["model"], "config.model")


def to_dict(config: RunConfig) -> dict:
    """The nested plain dict of a RunConfig: what config.json holds."""
    values = dataclasses.asdict(config)
    values["model"]["mixers"] = {name: dataclasses.asdict(options) for name, options in config.model.mixers}
    values["data"]["tasks"] = {name: dataclasses.asdict(options) for name, options in config.data.tasks}
    return values


def save(config: RunConfig, path: str) -> None:
    """Write config.json, whole or not at all."""
    atomic.write_text(path, json.dumps(to_dict(config), indent=2) + "\n")


def load(path: str) -> RunConfig:
    """Read config.json. Raises UserError when it is missing or not the config of a run."""
    try:
        values = json_text.read(path, most_bytes=MOST_CONFIG_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: is this the folder of a run?") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not the config of a run")
    if isinstance(values.get("data"), dict):
        values["data"] = LEGACY_DATA_DEFAULTS | values["data"]
    if isinstance(values.get("train"), dict):
        values["train"] = LEGACY_TRAIN_DEFAULTS | values["train"]
    if isinstance(values.get("optim"), dict):
        values["optim"] = LEGACY_OPTIM_DEFAULTS | values["optim"]
    if isinstance(values.get("model"), dict):
        values["model"] = LEGACY_MODEL_DEFAULTS | values["model"]
        options = values["model"].get("mixers")
        for name, young in LEGACY_MIXER_DEFAULTS.items():
            if isinstance(options, dict) and isinstance(options.get(name), dict):
                options[name] = young | options[name]
    return from_config_dict(values)


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted names of the fields in which two configs differ, with the value in each (None: absent)."""
    flat_old, flat_new = flatten(to_dict(old)), flatten(to_dict(new))
    return {
        name: (flat_old.get(name), flat_new.get(name))
        for name in sorted(flat_old.keys() | flat_new.keys())
        if name not in flat_old or name not in flat_new or flat_old[name] != flat_new[name]
    }


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, by dotted names."""
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _with_mixer_configs(values: dict[str, Any]) -> dict[str, Any]:
    """The options of mixers, whose types depend on their names, as their dataclasses; the rest as it is."""
    try:
        pattern, options = values["model"]["pattern"], values["model"]["mixers"]
    except (KeyError, TypeError):
        return values  # what is missing or no group of fields is said by build, like any other field
    if not isinstance(pattern, str) or not isinstance(options, Mapping):
        return values
    return values | {"model": {**values["model"], "mixers": _mixer_configs(pattern, options)}}


def _mixer_configs(pattern: str, options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    for name in options:
        mixers.load(name)
    return tuple(
        (name, build(mixers.load(name).Config, options[name], f"config.model.mixers.{name}"))
        for name in mixers_in_pattern(pattern)
        if name in options
    )


def _with_task(values: dict[str, Any]) -> dict[str, Any]:
    """The options of the synthetic task, whose types depend on its name, as its dataclass; of text none."""
    try:
        task, options = values["data"]["task"], values["data"]["tasks"]
    except (KeyError, TypeError):
        return values
    if not isinstance(task, str) or not isinstance(options, Mapping):
        return values
    chosen = ()
    if task != TEXT:
        cls = tasks.load(task)
        if task not in options:
            raise UserError(f"data.task is {task!r}, but data.tasks has no options for it")
        chosen = ((task, build(cls, options[task], f"config.data.tasks.{task}")),)
    return values | {"data": {**values["data"], "tasks": chosen}}
