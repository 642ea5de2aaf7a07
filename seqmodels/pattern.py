"""The pattern of a model: its residual layers in order, as a line of text.

    attention mlp                                        a Transformer
    attention(window=64) mlp attention mlp               options of one layer; the others have those of config.model.mixers
    gla+mamba2 mlp                                       two mixers side by side on one input

A layer is a channel layer of ``seqmodels/channel_layers``, or one or several mixers of ``seqmodels/mixers`` side by side; each may
have options in brackets. Which options there are, and of which type, ``ModelConfig`` checks: here a pattern is text and names.
"""

import ast
import dataclasses
import functools
from types import ModuleType
from typing import Any

from seqmodels import channel_layers, fields, mixers, registry
from seqmodels.errors import UserError

_OPEN, _CLOSE = "(", ")"
MOST_LAYERS = 1024  # written out: each is compiled by itself, those of model.repeats are not


@functools.lru_cache(maxsize=1024)
def parse_pattern(pattern: str) -> tuple[str, ...]:
    """The layers of a pattern, in order, each as text without blanks.

    Raises:
      UserError: an empty pattern, brackets that do not match, an unknown layer, or more than `MOST_LAYERS`.
    """
    specs = tuple("".join(spec.split()) for spec in split_outside_brackets(_joined(pattern), None))
    if not specs:
        raise UserError('model.pattern is empty; write layers in order, like "attention mlp"')
    if len(specs) > MOST_LAYERS:
        raise UserError(
            f"model.pattern has {len(specs):,} layers; write at most {MOST_LAYERS:,}, and say how often they come with model.repeats"
        )
    for spec in dict.fromkeys(specs):
        parts = parts_of(spec)
        for name, _ in parts:
            load_layer(name)
            if is_channel_layer(name) and len(parts) > 1:
                raise UserError(f"model.pattern has {spec!r}: {name} is a channel layer, which stands alone")
    return specs


def load_layer(name: str) -> ModuleType:
    """The module of a mixer or a channel layer. Raises UserError for an unknown name."""
    for kind in (mixers, channel_layers):
        if name in kind.names():
            return kind.load(name)
    raise registry.unknown("mixer or channel layer", name, (*mixers.names(), *channel_layers.names()))


def layer_class(name: str) -> type:
    """The ``Mixer`` of a mixer's module, the ``Layer`` of a channel layer's. Raises UserError for an unknown name."""
    module = load_layer(name)
    return module.Layer if is_channel_layer(name) else module.Mixer


def is_channel_layer(name: str) -> bool:
    """Whether a name is that of a channel layer."""
    return name in channel_layers.names()


def parts_of(spec: str) -> tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]:
    """The mixers that stand side by side in a layer, each with its options: ``(("attention", (("window", 64),)),)``.

    Raises:
      UserError: what is no name, or no ``option=value``.
    """
    return tuple(_part(part, spec) for part in split_outside_brackets(spec, "+"))


def _part(part, spec):
    name, bracket, inside = part.partition(_OPEN)
    if bracket and not inside.endswith(_CLOSE) or not name or _CLOSE in name:
        raise UserError(f'model.pattern has {spec!r}; write a layer like "attention(window=64)" or "gla+mamba2"')
    options = {}
    for option in split_outside_brackets(inside[:-1], ",") if bracket else ():
        key, equals, value = option.partition("=")
        if not (key and equals and value) or key in options:
            raise UserError(f"model.pattern has {spec!r}: {option!r} is not one option=value")
        options[key] = _value(value)
    return name, tuple(options.items())


def _value(text):
    """A number, True, False, None or a tuple of them; anything else is a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def with_options(config: Any, name: str, options: tuple[tuple[str, Any], ...]) -> Any:
    """The Config of a mixer or a channel layer with the options of one layer.

    Raises:
      UserError: an option that it has not, of another type, or out of range.
    """
    if not options:
        return config
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return fields.build(type(config), values | dict(options), f"model.pattern: {name}")


def layer_name(spec: str) -> str:
    """The layer without its options, ``attention`` or ``gla+mamba2``: what its parameters are called."""
    return "+".join(name for name, _ in parts_of(spec))


def mixers_in_pattern(pattern: str) -> tuple[str, ...]:
    """The distinct mixers of a pattern, in order of appearance."""
    return tuple(name for name in names_in_pattern(pattern) if not is_channel_layer(name))


def channel_layers_in_pattern(pattern: str) -> tuple[str, ...]:
    """The distinct channel layers of a pattern, in order of appearance."""
    return tuple(name for name in names_in_pattern(pattern) if is_channel_layer(name))


def names_in_pattern(pattern: str) -> tuple[str, ...]:
    """The distinct layers of a pattern, mixers and channel layers, in order of appearance."""
    return tuple(dict.fromkeys(name for spec in parse_pattern(pattern) for name, _ in parts_of(spec)))


def split_outside_brackets(text: str, separator: str | None) -> list[str]:
    """``text.split(separator)`` that leaves what stands in brackets together; None: blanks, as ``str.split`` has it.

    Raises:
      UserError: brackets that do not match.
    """
    parts, part, depth = [], [], 0
    for letter in text:
        depth += (letter == _OPEN) - (letter == _CLOSE)
        if depth < 0:
            break
        if depth == 0 and (letter.isspace() if separator is None else letter == separator):
            parts.append("".join(part))
            part = []
        else:
            part.append(letter)
    if depth:
        raise UserError(f"the brackets in {text!r} do not match")
    parts.append("".join(part))
    return [part for part in parts if part.strip()] if separator is None else parts


def _joined(pattern):
    """The pattern without blanks around ``+`` and before brackets: they are part of one layer."""
    specs = pattern.replace("+", " + ").replace(_OPEN, f" {_OPEN}").split()
    joined = ""
    for spec in specs:
        glued = spec.startswith((_OPEN, "+")) or joined.endswith("+")
        joined += spec if glued or not joined else f" {spec}"
    return joined
