"""Odd values over every field of a config: refused in one line, or a run that works."""

import json
import math
import types
import typing
from typing import Any, Final

from configs import base
from seqmodels import config as config_lib
from seqmodels.errors import UserError
from tools.drills.trials import TINY, Count, Place, train_in_child

ODD: Final[dict[type, tuple[Any, ...]]] = {
    int: (0, -1, -5, 1, 2, 3, 7, 2**15, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 10**18, 10**30, -(2**63)),
    float: (
        0.0,
        -0.0,
        -1.0,
        1.0,
        1e-30,
        1e-300,
        5e-324,
        1e30,
        1e300,
        math.inf,
        -math.inf,
        math.nan,
        0.5,
        2.0,
        1 - 1e-16,
    ),
    str: (
        "",
        " ",
        "x",
        "a" * 5000,
        "../..",
        "/dev/null",
        "\0",
        "é\u202e",
        "\ud800",
        "mlp",
        "attention mlp" * 300,
        "%s{}",
        "-1",
        "None",
    ),
    bool: (True, False),
    tuple: ((), (0,), (-1.0, math.nan), (1, 2, 3), ("a",), (math.inf, -math.inf)),
}
OTHER_TYPES: Final = (None, True, 1, 1.5, "x", [], {}, [[1]], {"a": 1})


def odd_values_built(place: Place) -> Count:
    """Each field's odd values, and values of other types, through `from_config_dict`: a UserError in one line, or a config."""
    count = Count()
    for name, value in _chosen(place, place.some(1500, 1_000_000)):
        try:
            _built(name, value)
            count.record(True, "")
        except UserError as error:
            short = "\n" not in str(error) and len(str(error)) < 1000
            count.record(short, f"{name}={value!r:.60}: a message of {len(str(error))} characters")
        except Exception as error:
            count.record(False, f"{name}={value!r:.60}: {type(error).__name__}: {error}")
    return count


def odd_values_trained(place: Place) -> Count:
    """Of those that are accepted, some for two steps: an error in one line, or a loss that is finite; memory within bounds."""
    count = Count()
    accepted = []
    for name, value in _chosen(place, 1_000_000):
        if name in (*config_lib.PLACE_FIELDS, "train.steps") or name.startswith("mesh."):
            continue
        try:
            accepted.append(_built(name, value))
        except Exception:
            continue
    place.draw.shuffle(accepted)
    for name, value in accepted[: place.some(4, 60)]:
        workdir = place.new("odd") / "run"
        flags = place.flags(workdir, train__steps=2, **{name.replace(".", "__"): value})
        ended = train_in_child(flags, seconds=120.0)
        what = f"{name}={value!r:.60}"
        if ended.code == 0:
            loss = json.loads(ended.out.splitlines()[-1])["validation_loss"]
            count.record(loss is not None and math.isfinite(loss), f"{what}: validation loss {loss}, exit status 0")
        else:
            count.record(ended.in_one_line, f"{what}: exit status {ended.code}: {ended.err[-200:]}")
        if ended.most_bytes > 4 << 30:
            count.record(False, f"{what}: {ended.most_bytes / (1 << 30):.1f} GiB of memory for a model of width 32")
    return count


def _chosen(place: Place, most: int) -> list[tuple[str, Any]]:
    flat = config_lib.flatten(base.get_config().to_dict())
    hints = _types()
    trials = [
        (name, value) for name in flat for value in (*_odd_of(hints[name] if name in hints else type(flat[name])), *OTHER_TYPES)
    ]
    place.draw.shuffle(trials)
    return trials[:most]


def _types() -> dict[str, type]:
    """Of optional fields, whose default says nothing."""
    found = {}
    for group in ("data", "model", "optim", "train", "mesh"):
        cls = typing.get_type_hints(config_lib.RunConfig)[group]
        for name, hint in typing.get_type_hints(cls).items():
            parts = [part for part in typing.get_args(hint) if part is not types.NoneType]
            found[f"{group}.{name}"] = parts[0] if isinstance(hint, types.UnionType) else hint
    return {name: hint for name, hint in found.items() if hint in ODD}


def _built(name: str, value: Any) -> tuple[str, Any]:
    values = base.get_config().to_dict()
    for field, given in (TINY | {name: value}).items():
        group = values
        *groups, last = field.split(".")
        for part in groups:
            group = group[part]
        group[last] = given
    if name.startswith(("model.mixers.", "model.channel_layers.")):
        values["model"]["pattern"] = name.split(".")[2]
    elif name.startswith("data.tasks."):
        values["data"]["task"] = name.split(".")[2]
    config_lib.from_config_dict(values)
    return name, value


def _odd_of(kind: type) -> tuple[Any, ...]:
    return ODD[kind] if kind in ODD else ()
