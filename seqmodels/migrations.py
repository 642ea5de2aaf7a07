"""What earlier versions wrote into a run folder, brought up to date: each version's layout, from the first on.

``config.json`` has a field ``version``; the runs before it have none, which is version 0. ``MIGRATIONS[n]`` turns the nested dict of
version n into one of version n + 1, in place. A new field of a config is one entry: a migration that gives runs made before it what
they did, ``_add(values, {"model.new_field": what_they_did})``. Values may be anything that JSON can hold: what is odd is left for
``seqmodels.config`` to refuse. ``tests/run_configs`` holds configs of each version.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# layers whose parameters had another layer's name in the checkpoints of version 0
_FORMER_LAYER_NAMES = {"rwkv_channel_mix": "mlp"}


class Newer(ValueError):
    """A config of a version that this code does not know."""


def up_to_date(values: dict[str, Any]) -> dict[str, Any]:
    """The nested dict of a config.json, of any version, as the newest version has it; without the field ``version``.

    Raises:
      Newer: its version is none of those known here.
    """
    values = {name: dict(group) if isinstance(group, Mapping) else group for name, group in values.items()}
    version = values.pop("version", 0)
    if type(version) is not int or not 0 <= version <= VERSION:
        raise Newer(f"is of version {version!r}, and this seqmodels reads versions up to {VERSION}: update it")
    for migrate in MIGRATIONS[version:]:
        migrate(values)
    return values


def former_layer_names(paths: Iterable[str], saved: Iterable[str]) -> dict[str, str]:
    """Today's name of each layer that an older checkpoint calls otherwise -> its name there.

    Args:
      paths: of the arrays wanted, ``params/layers/1_rwkv_channel_mix/layer/key_kernel``.
      saved: of the arrays in the checkpoint.
    """
    there = {part for path in saved for part in path.split("/")}
    found = {}
    for part in {part for path in paths for part in path.split("/")} - there:
        position, _, name = part.partition("_")
        if name in _FORMER_LAYER_NAMES and f"{position}_{_FORMER_LAYER_NAMES[name]}" in there:
            found[part] = f"{position}_{_FORMER_LAYER_NAMES[name]}"
    return found


def _add(values: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Set fields, by dotted names, that are not there, in the groups that are."""
    for dotted, value in fields.items():
        *groups, name = dotted.split(".")
        place: Any = values
        for group in groups:
            place = place.get(group) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place.setdefault(name, value)


def _number_the_versions(values: dict[str, Any]) -> None:
    """Version 0 grew field by field. Its last layout said in ``mlp_kind`` what the layer "mlp" of the pattern was."""
    _add(values, {
        "data.task": "text", "data.tasks": {}, "data.validation_source": None,
        "model.vocab_size": None, "model.embedding_norm": False, "model.branch_rms": None, "model.norm": "rms",
        "model.logit_cap": None, "model.readout": "each",
        "model.mixers.linear_attention.norm_eps": None, "model.mixers.linear_attention.conv_width": 0,
        "optim.rate_changes": (), "train.init_from": None, "train.skip_nonfinite": False,
    })  # fmt: skip
    model = values.get("model")
    former = ("mlp_kind", "mlp_hidden", "mlp_activation")
    if not isinstance(model, dict) or any(name not in model for name in former):
        return
    kind, hidden, activation = (model.pop(name) for name in former)
    if kind == "rwkv6":
        if isinstance(model.get("pattern"), str):
            model["pattern"] = re.sub(r"(?<!\S)mlp(?!\S)", "rwkv_channel_mix", model["pattern"])
        model["channel_layers"] = {"rwkv_channel_mix": {"hidden": hidden}}
    else:
        model["channel_layers"] = {"mlp": {"hidden": hidden, "activation": activation}}


def _report_elsewhere(values: dict[str, Any]) -> None:
    _add(values, {"train.loggers": "tensorboard", "train.profile_steps": ""})


def _stream(values: dict[str, Any]) -> None:
    _add(values, {"data.streaming": False})


def _choose_short_conv(values: dict[str, Any]) -> None:
    _add(values, {"model.short_conv": "own"})


def _narrow_the_lstm(values: dict[str, Any]) -> None:
    """Up to version 4 an LSTM stood without an MLP: by default it had the parameters of attention and MLP together, 12 D^2."""
    model = values.get("model")
    if not isinstance(model, dict) or type(model.get("d_model")) is not int:
        return
    width = 4 * round(model["d_model"] * ((25 + 192) ** 0.5 - 5) / 8 / 4)
    mixers = model.get("mixers")
    lstm = mixers.get("lstm") if isinstance(mixers, dict) else None
    if width <= 0:
        return
    if isinstance(lstm, dict) and lstm.get("hidden_size") is None:
        lstm["hidden_size"] = width
    if isinstance(model.get("pattern"), str):
        model["pattern"] = re.sub(r"(\blstm\([^()]*\bhidden_size\s*=\s*)None\b", rf"\g<1>{width}", model["pattern"])


MIGRATIONS: tuple[Callable[[dict[str, Any]], None], ...] = (
    _number_the_versions,
    _report_elsewhere,
    _stream,
    _choose_short_conv,
    _narrow_the_lstm,
)
VERSION = len(MIGRATIONS)
