"""Writes configs/base.py, the list of every field of a run's config, from the dataclasses that declare them.

    python -m tools.pages.base_config

A field's default and its comment stand beside its type (seqmodels/model.py, seqmodels/config.py, seqmodels/data/dataset.py), behind it
in the line or in lines of their own above it. tests/test_config.py fails when configs/base.py is not what this would write.
"""

import ast
import dataclasses
from pathlib import Path

from seqmodels import command_line, fields, ranges
from seqmodels.config import RunConfig
from seqmodels.data import atomic

PATH = Path(__file__).resolve().parents[2] / "configs" / "base.py"

HEAD = '''"""The one complete config: every field with its meaning and unit. Other configs state only differences.

    python train.py --config=configs/tinystories.py:attention --workdir=runs/attention --config.train.steps=2000

Written by `python -m tools.pages.base_config` from the dataclasses that declare the fields; the options of a layer or a task come
from its file.
"""

from ml_collections import config_dict
from ml_collections.config_dict import ConfigDict

from seqmodels import channel_layers, mixers
from seqmodels.config import options
from seqmodels.data import tasks


def get_config() -> ConfigDict:
    config = ConfigDict()
'''
# groups of options, by the names of what has them: their fields are declared in files of their own
OPTIONS = {
    "data.tasks": "ConfigDict({name: options(task) for name, task in tasks.TASKS.items()})",
    "model.channel_layers": "ConfigDict({name: options(channel_layers.load(name).Config) for name in channel_layers.names()})",
    "model.mixers": "ConfigDict({name: options(mixers.load(name).Config) for name in mixers.names()})",
}


def main() -> None:
    command_line.Parser(description=__doc__.splitlines()[0]).parse_args()
    atomic.write_text(PATH, text())
    print(f"wrote {PATH.name}")


def text() -> str:
    """What configs/base.py should hold."""
    lines = []
    for name, hint in ranges.declared(RunConfig).items():
        if dataclasses.is_dataclass(hint):
            lines += ["", f"    config.{name} = ConfigDict()", *_group(hint, f"{name}.")]
        else:
            lines += _field(RunConfig, name, "")
    return HEAD + "\n".join(lines) + "\n    return config\n"


def _group(group: type, prefix: str) -> list[str]:
    return [line for field in dataclasses.fields(group) for line in _field(group, field.name, prefix)]


def _field(group: type, name: str, prefix: str) -> list[str]:
    dotted = prefix + name
    if dotted in OPTIONS:
        return [f"    config.{dotted} = {OPTIONS[dotted]}"]
    default = next(field.default for field in dataclasses.fields(group) if field.name == name)
    kind, _, optional = ranges.unpack_type(ranges.declared(group)[name])
    written, comment = fields.source(group, name)
    if written != repr(default):
        try:
            ast.literal_eval(written)
        except ValueError:  # a constant's name
            written = f'"{default}"' if isinstance(default, str) else repr(default)
    comment = f"  # {comment}"
    if not optional:
        return [f"    config.{dotted} = {written}{comment}"]
    lines = [f"    config.{dotted} = config_dict.placeholder({kind.__name__}){comment if default is None else ''}"]
    return lines if default is None else [*lines, f"    config.{dotted} = {written}{comment}"]


if __name__ == "__main__":
    command_line.run(main)
