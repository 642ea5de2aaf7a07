"""What ``--help`` and ``--help=GROUP`` print: a command's flags; a group's fields, from the dataclasses that declare them."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from seqmodels import channel_layers, fields, mixers, packages, ranges, suggest
from seqmodels.config import LAYER_KINDS, RunConfig
from seqmodels.data import tasks
from seqmodels.errors import UserError
from seqmodels.escape import escape

GROUPS = ("data", "model", "optim", "train", "mesh")
OPTIONS = ("data.tasks", *(f"model.{kind}" for kind in LAYER_KINDS))  # groups of groups: one for each layer or task


def groups() -> Mapping[str, type]:
    """Every group by its dotted name, ``model.mixers.gla``; a mixer's file is imported."""
    declared = {name: hint for name, hint in ranges.declared(RunConfig).items() if dataclasses.is_dataclass(hint)}
    return {
        **declared,
        **{f"data.tasks.{name}": task for name, task in tasks.TASKS.items()},
        **{f"model.channel_layers.{name}": channel_layers.load(name).Config for name in channel_layers.names()},
        **{f"model.mixers.{name}": mixers.load(name).Config for name in mixers.names()},
    }


def page(asked: str, prefix: str = "config.") -> str:
    """The fields of a group: how each is given, its default, its type and range, and what it means.

    Args:
        asked: a group's dotted name, or the last part of it; "all" for every group.
        prefix: what stands before the names.

    Raises:
        UserError: there is no such group.
    """
    known = groups()
    asked = asked.removeprefix("config.").removeprefix("base.")
    found = [name for name in known if asked == "all" or asked in (name, name.rpartition(".")[2])]
    for options in OPTIONS:
        if asked in (options, options.rpartition(".")[2]):
            found = [name for name in known if name.startswith(f"{options}.")]
    if not found:
        near = suggest.hint(asked, [*known, *OPTIONS, *(name.rpartition(".")[2] for name in known)])
        raise UserError(f"--help={asked}: there is no such group of fields; {near}known: {', '.join((*GROUPS, *OPTIONS))}, all")
    return "\n\n".join("\n".join(_lines(name, known[name], prefix)) for name in found)


def say_help(
    asked: str,
    doc: str,
    meanings: Mapping[str, str],
    *,
    groups: Iterable[str] = GROUPS,
    group_page: Callable[[str], str] = page,
) -> None:
    """Print what ``--help``, or ``--help=GROUP``, prints of a command with a config.

    Args:
        asked: the group; "" for the command itself.
        doc: of the command.
        meanings: of its flags, by their names.
        groups: of fields, as ``--help=GROUP`` takes them.
        group_page: what is printed of a group.
    """
    text = group_page(asked) if asked else _help_page(doc, meanings, f"{', '.join(groups)}, all")
    print(escape(packages.as_typed(text), "terminal"))


def _help_page(doc: str, meanings: Mapping[str, str], groups: str) -> str:
    width = max(map(len, (*meanings, "config.FIELD=VALUE"))) + 2
    flags = [f"  --{name:{width}}{meaning}" for name, meaning in meanings.items()]
    return "\n".join([
        doc.strip(), "", "flags:", *flags, f"  --{'config.FIELD=VALUE':{width}}another value of a field",
        f"  --{'help=GROUP':{width}}the fields of a group, with meaning, default and range: {groups}",
    ])  # fmt: skip


def _lines(name: str, group: type, prefix: str) -> Iterable[str]:
    yield f"{prefix}{name}: {' '.join((group.__doc__ or '').split()) if name in GROUPS else f'the options of {group.__module__}'}"
    for field in dataclasses.fields(group):
        dotted = f"{name}.{field.name}"
        if dotted in OPTIONS:
            yield f"  --{prefix}{dotted}.NAME.FIELD=VALUE\n      --help={field.name} lists them, --help=NAME those of one"
            continue
        _, comment = fields.source(group, field.name)
        yield f"  --{prefix}{dotted}={field.default}\n      {comment} [{ranges.describe_type(ranges.declared(group)[field.name])}]"
