"""From an ml_collections config to frozen dataclasses, once, at the boundary; and to JSON and back.

A field is declared once, in the dataclass beside the code that reads it: type, range, default, and a comment that says what it
means. ``configs/base.py`` lists all of them, written from there (``tools/pages/base_config.py``). A config has every field: one
that is missing, misspelt or of another type is an error here and never a silent default.
``config.json`` carries a version; ``seqmodels/migrations.py`` brings what earlier versions wrote up to date.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from ml_collections import ConfigDict, config_dict

from seqmodels import channel_layers, migrations, mixers, suggest
from seqmodels.data import TEXT, DataConfig, atomic, tasks
from seqmodels.errors import UserError
from seqmodels.escape import say
from seqmodels.fields import build
from seqmodels.formats import json_text
from seqmodels.model import ModelConfig
from seqmodels.pattern import names_in_pattern
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
    declared,
    short_repr,
    unpack_type,
)

LOGGERS = ("tensorboard", "wandb")
SCHEDULES = ("cosine", "linear", "constant")  # of the learning rate, after warm-up

MOST_CONFIG_BYTES = 4 << 20

# groups of options of layers in config.model -> the registry of their names
LAYER_KINDS = {"channel_layers": channel_layers, "mixers": mixers}

# Fields that say where something is, or is kept: a path, a name on the hub, a cache. They belong to who runs a program. In the
# folder of a run they are a record of who trained it: who opens the folder reads and writes none of these places.
PLACE_FIELDS = (
    "data.source", "data.revision", "data.validation_source", "data.tokenizer", "data.cache_dir", "train.init_from",
    "train.compilation_cache_dir",
)  # fmt: skip
# What training writes into a run folder beside its checkpoints, and what is read there.
RUN_FILES = (
    "config.json", "data.json", "history.jsonl", "metrics.jsonl", "samples.txt", "tokenizer.json", "validation.npz",
)  # fmt: skip
DEFAULT_CACHE_DIR = DataConfig.cache_dir
DEFAULT_COMPILATION_CACHE_DIR = "~/.cache/seqmodels/xla"


@dataclasses.dataclass(frozen=True)
class OptimConfig(Checked, where="optim"):
    """How parameters move."""

    learning_rate: Positive = 2e-3  # peak
    schedule: Annotated[str, OneOf(SCHEDULES)] = "cosine"  # after warm-up: cosine, linear or constant
    warmup_steps: CountOrZero = 50  # linear from 0 to the peak, in optimizer steps
    decay_steps: Count | None = None  # step at which the decay ends; None: train.steps
    final_fraction: Fraction = 0.1  # of the peak, where the decay ends
    weight_decay: NonNegative = 0.1  # AdamW's, on kernels and embeddings; never on norms, biases, gates, SSM parameters
    beta1: Annotated[float, AtLeast(0), Below(1)] = 0.9  # decay of the gradient's mean
    beta2: Annotated[float, AtLeast(0), Below(1)] = 0.95  # decay of the gradient's square
    eps: Epsilon = 1e-8  # AdamW's epsilon
    clip_norm: Positive = 1.0  # global gradient norm above which gradients are scaled down
    accumulation_steps: Count = 1  # micro-batches per optimizer step; data.batch_size is their sum
    # (step, factor) of --resume_learning_rate, which writes them into the run folder
    rate_changes: tuple[tuple[CountOrZero, Annotated[float, Above(0), AtMost(1)]], ...] = ()


@dataclasses.dataclass(frozen=True)
class TrainConfig(Checked, where="train"):
    """How a run begins, how long it goes and what it reports."""

    init_from: str | None = None  # run folder whose parameters this run begins with; None: random ones
    steps: Count = 1000  # optimizer steps
    skip_nonfinite: bool = False  # leave out and count steps whose loss or gradient is not finite, instead of stopping
    log_every_steps: Count = 10  # a row of metrics.jsonl and TensorBoard
    eval_every_steps: Count = 100  # loss on the validation split
    eval_tokens: Count = 131072  # validation tokens scored (of a task: read) during training; eval.py takes all
    checkpoint_every_steps: Count = 100  # between two saves
    keep_checkpoints: Count = 2  # newest ones kept, beside the best
    sample_every_steps: CountOrZero = 250  # a text written by the model; 0: never
    sample_prompt: str | None = None  # how it begins; None: as the data do (docs/training.md)
    compilation_cache_dir: str = DEFAULT_COMPILATION_CACHE_DIR  # compiled programs; "" keeps none
    loggers: str = "tensorboard"  # beside metrics.jsonl, commas between them: tensorboard, wandb; "" for none
    profile_steps: str = ""  # FIRST:END, steps (from 0) that a profile is written of, for XProf; "" for none

    def __post_init__(self):
        super().__post_init__()
        for name in self.logger_names:
            if name not in LOGGERS:
                hint = suggest.hint(name, LOGGERS)
                wrong = f"train.loggers={short_repr(self.loggers)} names {short_repr(name)}"
                raise UserError(f"{wrong}; {hint}known: {', '.join(LOGGERS)}")
        if self.profile_steps and self.profiled is None:
            raise UserError(f"train.profile_steps={short_repr(self.profile_steps)} must be FIRST:END, such as 10:13")

    @property
    def logger_names(self) -> tuple[str, ...]:
        """The loggers, each once."""
        return tuple(dict.fromkeys(name.strip() for name in self.loggers.split(",") if name.strip()))

    @property
    def profiled(self) -> tuple[int, int] | None:
        """The first step of the profile and the one after its last; None for no profile."""
        found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", self.profile_steps)
        return (int(found[1]), int(found[2])) if found and int(found[1]) < int(found[2]) else None


@dataclasses.dataclass(frozen=True)
class MeshConfig(Checked, where="mesh"):
    """Devices along each axis."""

    data: Annotated[int, AtLeast(-1)] = -1  # devices along the batch; -1: all that the other axes leave
    fsdp: Count = 1  # devices that share parameters and optimizer state, and split the batch too
    tensor: Count = 1  # devices that split heads, the layers' widths and the vocabulary
    sequence: Count = 1  # devices that split time; data.seq_len is a multiple of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Checked):
    """Everything that decides a run."""

    seed: Seed = 0  # decides initialisation, data order and dropout
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


def options(cls: type) -> ConfigDict:
    """The Config of a layer, or a task, as a ConfigDict of its defaults; an optional field becomes a typed placeholder."""
    values = ConfigDict()
    for field in dataclasses.fields(cls):
        kind, _, optional = unpack_type(declared(cls)[field.name])
        if optional:
            values[field.name] = config_dict.placeholder(kind)
        if field.default is not None:
            values[field.name] = field.default
    return values


def from_config_dict(config: ConfigDict | Mapping[str, Any]) -> RunConfig:
    """A ConfigDict (or the nested dict of a config.json) as frozen dataclasses.

    Options of layers that the pattern does not use are dropped, and so are those of tasks other than data.task.

    Raises:
      UserError: an unknown or missing field, a wrong type, or values that cannot work together.
    """
    if isinstance(config, ConfigDict):
        config = config.copy_and_resolve_references().to_dict()
    return build(RunConfig, _with_task(_with_layer_configs(dict(config))), "config")


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """The ``model`` part alone, with the same errors."""
    return build(ModelConfig, _with_layer_configs({"model": dict(values)})["model"], "config.model")


def to_dict(config: RunConfig) -> dict:
    """The nested plain dict of a RunConfig: what config.json holds."""
    values = dataclasses.asdict(config)
    for kind in LAYER_KINDS:
        values["model"][kind] = {name: dataclasses.asdict(options) for name, options in getattr(config.model, kind)}
    values["data"]["tasks"] = {name: dataclasses.asdict(options) for name, options in config.data.tasks}
    return values


def model_record(config: RunConfig) -> dict:
    """What the model is computed by, for a checkpoint's record: the version, and the options by dotted names."""
    return {"version": migrations.VERSION, "options": json.loads(json.dumps(flatten(to_dict(config)["model"])))}


def other_options(record: Mapping | None, config: RunConfig) -> list[str]:
    """How a config's model is another than that of a `model_record`, one text for each option.

    Options that only one of them has, as those that a mixer got since, and records of another version say nothing.
    """
    now = model_record(config)
    if record is None or record["version"] != now["version"]:
        return []
    before, after = record["options"], now["options"]
    return [
        f"model.{name} {before[name]!r} -> {after[name]!r}" for name in before if name in after and before[name] != after[name]
    ]


def save(config: RunConfig, path: str) -> None:
    """Write config.json, whole or not at all, with the digest of what it says."""
    values = {"version": migrations.VERSION} | to_dict(config)
    atomic.write_text(path, json.dumps({"digest": json_text.digest(values)} | values, indent=2) + "\n")


def load(path: str, *, report: Callable[[str], None] = say) -> RunConfig:
    """Read config.json.

    Args:
      report: called with one line where the digest in it is another one: the file was edited, or damaged.

    Raises:
      UserError: it is missing, or not the config of a run.
    """
    try:
        values = json_text.read(path, most_bytes=MOST_CONFIG_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: is this the folder of a run?") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not the config of a run")
    if values.pop("digest", None) not in (None, json_text.digest(values)):
        report(f"{path} is not as it was written: somebody has edited it, or it is damaged")
    try:
        return from_config_dict(migrations.up_to_date(values))
    except migrations.Newer as newer:
        raise UserError(f"{path} {newer}") from None


def with_caches(config: RunConfig, *, cache_dir: str, compilation_cache_dir: str) -> RunConfig:
    """The config of a folder that is opened: what is kept is kept where its reader keeps it."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, cache_dir=cache_dir),
        train=dataclasses.replace(config.train, compilation_cache_dir=compilation_cache_dir),
    )


def differences(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted names of the fields in which two configs differ, with the value in each (None: absent); the pattern first."""
    flat_old, flat_new = flatten(to_dict(old)), flatten(to_dict(new))
    return {
        name: (flat_old.get(name), flat_new.get(name))
        for name in sorted(flat_old.keys() | flat_new.keys(), key=lambda name: (name != "model.pattern", name))
        if name not in flat_old or name not in flat_new or flat_old[name] != flat_new[name]
    }


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, by dotted names."""
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _with_layer_configs(values: dict[str, Any]) -> dict[str, Any]:
    """The options of layers, whose types depend on their names, as their dataclasses; the rest as it is."""
    model = values.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("pattern"), str):
        return values  # what is missing or no group of fields is said by build, like any other field
    options = {kind: model[kind] for kind in LAYER_KINDS if isinstance(model.get(kind), Mapping)}
    configs = {kind: _layer_configs(kind, model["pattern"], group) for kind, group in options.items()}
    return values | {"model": {**model, **configs}}


def _layer_configs(kind: str, pattern: str, options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    for name in options:
        LAYER_KINDS[kind].load(name)
    return tuple(
        (name, build(LAYER_KINDS[kind].load(name).Config, options[name], f"config.model.{kind}.{name}"))
        for name in names_in_pattern(pattern)
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
