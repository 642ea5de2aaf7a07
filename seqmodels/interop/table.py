"""What a kind of checkpoint is: a table of its config's fields and its tensors, read in both directions.

Their config is config.json with nested fields as dotted names ("rope_parameters.rope_theta"). Ours is flat too: the fields of
ModelConfig, and with "mixer." or "channel." before them those of the Config of the pattern's mixer or channel layer.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from seqmodels import config as config_lib
from seqmodels.errors import UserError
from seqmodels.model import ModelConfig
from seqmodels.pattern import is_channel_layer, load_layer, parse_pattern

REQUIRED: Final = object()
OMIT: Final = object()

# What the trained weights compute does not depend on these fields of ours.
IMMATERIAL: Final = (
    "branch_rms",
    "dropout",
    "remat",
    "compute_dtype",
    "mixer.implementation",
    "mixer.chunk_size",
    "mixer.input_bias",
)

# Fields of theirs that mean the same in every kind, or nothing to what the weights compute.
IGNORED: Final = frozenset(
    "model_type architectures transformers_version dtype torch_dtype _name_or_path _attn_implementation_autoset "
    "bos_token_id eos_token_id pad_token_id use_cache initializer_range max_position_embeddings auto_map "
    "fuse_norm fuse_swiglu fuse_cross_entropy fuse_linear_cross_entropy use_l2warp attn_mode attnres_block_size "
    "attention_dropout pretraining_tp".split()
)
NOT_QUANTIZED: Final = "quantization_config"


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of theirs that decides one or several of ours.

    Attributes:
      theirs: its name; of several, separated by blanks, the first that is present is read and all are written.
      ours: names of ours, separated by blanks; without ``read`` all have the same value, and the first is written.
      default: what their library takes where the field is absent; REQUIRED: it must be there. A null is not absent to it: of a field
        that is true or false it is false, where the default is None it is that, and elsewhere it is refused.
      choices: their values -> ours; the first of theirs with our value is written. None: any value, the same.
      read: (their value, all of theirs) -> our value, or a tuple of one for each of ours.
      write: all of ours -> their value, or OMIT.
    """

    theirs: str
    ours: str
    default: Any = REQUIRED
    choices: Mapping[Any, Any] | None = None
    read: Callable[[Any, Mapping[str, Any]], Any] | None = None
    write: Callable[[Mapping[str, Any]], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A field of theirs that we can only have at one of ``values``; absent is as good. A null is false to their library.

    The first is written, unless it is None: then the field is not in their library's configs, or is absent as a rule.
    """

    theirs: str
    values: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Derived:
    """A field of theirs that follows from ours: written, and where present and not null it must agree."""

    theirs: str
    value: Callable[[Mapping[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one of our parameters lies in their tensor: ``load(theirs, our shape)`` and its inverse ``save(ours)``."""

    load: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]


SAME: Final = Layout(lambda theirs, shape: theirs, lambda ours: ours)
# torch's linear layers are [output, input], our kernels [input, output]
TRANSPOSED: Final = Layout(lambda theirs, shape: theirs.T, lambda ours: ours.T)
# a depthwise convolution is [channels, 1, width] there, [width, channels] here
DEPTHWISE: Final = Layout(lambda theirs, shape: theirs.reshape(len(theirs), -1).T, lambda ours: ours.T[:, None])
# [heads, width] here, one axis there
FLAT: Final = Layout(lambda theirs, shape: theirs.reshape(shape), lambda ours: ours.reshape(-1))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of theirs, which holds one parameter of ours or, one below the other, several.

    Attributes:
      theirs: its name; in a layer, without what the layers' names begin with.
      ours: the parameters' paths, separated by blanks. In a layer they begin with ``mixer``, ``mixer_norm``, ``channel`` or
        ``channel_norm``.
      layout: None: by our name: TRANSPOSED for a kernel, DEPTHWISE for a conv_kernel, otherwise SAME.
      also: in a layer, another name that their library gives it, by a field that changes nothing else; read, never written.
    """

    theirs: str
    ours: str
    layout: Layout | None = None
    also: str | None = None

    def layout_of(self, path: str) -> Layout:
        if self.layout is not None:
            return self.layout
        return DEPTHWISE if path.endswith("conv_kernel") else TRANSPOSED if path.endswith("kernel") else SAME


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of checkpoint.

    Attributes:
      model_type: what its config.json calls it.
      architecture: the class that loads it.
      library: whose class that is.
      pattern: of one layer of theirs in ours.
      fields: how the configs correspond.
      ours: fields of ours that never differ.
      ignored: fields of theirs, beside IGNORED, that change nothing that the weights compute.
      outer: tensors outside the layers. A path may be that of a parameter of all layers, stacked.
      layers: what the names within layer i begin with, after formatting with i.
      inner: tensors of each layer.
    """

    model_type: str
    architecture: str
    library: str
    pattern: str
    fields: tuple[Field | Fixed | Derived, ...]
    outer: tuple[Tensor, ...]
    layers: str
    inner: tuple[Tensor, ...]
    ours: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignored: frozenset[str] = frozenset()

    @property
    def layers_of(self) -> dict[str, str]:
        """``mixer`` and, if it has one, ``channel``: the names of the pattern's layers."""
        return {"channel" if is_channel_layer(spec) else "mixer": spec for spec in parse_pattern(self.pattern)}

    def path(self, name: str) -> tuple[str, ...]:
        """Where ``mixer/query_kernel`` and the like are among the model's parameters."""
        first, *rest = name.split("/")
        for position, (called, spec) in enumerate(self.layers_of.items()):
            if first in (called, f"{called}_norm"):
                return ("layers", f"{position}_{spec}", "norm" if first.endswith("_norm") else "layer", *rest)
        return tuple(name.split("/"))


# -- configs ----------------------------------------------------------------------------------------------------


def read_config(kind: Kind, theirs: Mapping[str, Any], report: Callable[[str], None] = lambda line: None) -> ModelConfig:
    """Our config of theirs.

    Args:
      report: called with one line if there are fields that the table does not know, and one for each sign that it is another class.

    Raises:
      UserError: a field is missing, or has a value that we cannot do; it is named. So is one that the table does not know beside
        others that it knows in one group ("rope_parameters"): it says how these are meant.
    """
    theirs = flatten(theirs)
    ours = dict(kind.ours)
    known = set(IGNORED | kind.ignored)
    for entry in (*kind.fields, Fixed(NOT_QUANTIZED, (None,))):
        names = entry.theirs.split()
        known |= set(names)
        present = [name for name in names if name in theirs and theirs[name] is not None]
        if isinstance(entry, Field):
            ours |= _read_field(kind, entry, theirs, present)
        elif isinstance(entry, Fixed):
            odd = [name for name in names if name in theirs and not _is_fixed(theirs[name], entry.values)]
            if odd:
                _refuse(kind, odd[0], theirs, entry.values)
    for entry in kind.fields:
        if isinstance(entry, Derived) and entry.theirs in theirs and theirs[entry.theirs] is not None:
            expected = _computed(entry.theirs, theirs, lambda entry=entry: entry.value(ours))
            if theirs[entry.theirs] != expected:
                _refuse(kind, entry.theirs, theirs, (expected,))
    groups = {name.rpartition(".")[0] for name in known} - {""}
    unknown = []
    for name, value in theirs.items():
        if known & _and_groups(name) or isinstance(value, Mapping) or value in (None, False, []):
            continue
        if groups & _and_groups(name):
            raise UserError(f"config.json has {name}={value!r}; of a {kind.model_type} seqmodels does not know what that changes")
        unknown.append(f"{name}={value!r}")
    if unknown:
        report(f"config.json: unknown here, and taken to change nothing: {', '.join(unknown)}")
    _say_whose_class(kind, theirs, report)
    return _model_config(kind, ours)


def _is_fixed(value: Any, values: tuple[Any, ...]) -> bool:
    return value in values or (value is None and False in values)


def _say_whose_class(kind: Kind, theirs: Mapping[str, Any], report: Callable[[str], None]) -> None:
    own = theirs["architectures"] if "architectures" in theirs else None
    if own and own != [kind.architecture]:
        report(f"config.json is of {own!r}, and is read as a {kind.architecture}")
    if "auto_map" in theirs and theirs["auto_map"]:
        report(f"config.json names code of its own (auto_map), which is not run: the model is read as a {kind.architecture}")


def write_config(kind: Kind, ours: ModelConfig) -> dict[str, Any]:
    """Their config.json, as a nested dict, of ours.

    Raises:
      UserError: a field of ours has a value that theirs has no place for; it is named.
    """
    flat = _flat_ours(kind, ours)
    theirs: dict[str, Any] = {"architectures": [kind.architecture], "model_type": kind.model_type}
    for entry in kind.fields:
        if isinstance(entry, Fixed):
            value = OMIT if entry.values[0] is None else entry.values[0]
        elif isinstance(entry, Derived):
            value = entry.value(flat)
        else:
            value = _written(kind, entry, flat)
        for name in entry.theirs.split():
            if value is not OMIT:
                theirs[name] = value
    back = _flat_ours(kind, read_config(kind, theirs))
    for name, value in flat.items():
        # None is a width that follows from others, and the table has written it out.
        if name not in IMMATERIAL and value != back[name] and value is not None:
            raise UserError(
                f"{_our_name(kind, name)}={value!r} has no place in a {kind.model_type} checkpoint of {kind.library} "
                f"(with {back[name]!r} it had)"
            )
    return _nested(theirs)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted names, with the dicts themselves beside what is in them."""
    flat = {}
    for name, value in values.items():
        flat[prefix + name] = value
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
    return flat


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *groups, last = name.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return nested


def _and_groups(name: str) -> set[str]:
    """A dotted name, and the groups that it is in."""
    parts = name.split(".")
    return {".".join(parts[: count + 1]) for count in range(len(parts))}


def _read_field(kind: Kind, entry: Field, theirs: Mapping[str, Any], present: list[str]) -> dict[str, Any]:
    names = entry.theirs.split()
    differing = [name for name in present[1:] if theirs[name] != theirs[present[0]]]
    if differing:
        raise UserError(f"config.json has {present[0]}={theirs[present[0]]!r} but {differing[0]}={theirs[differing[0]]!r}")
    if not present and entry.default is REQUIRED:
        raise UserError(f"config.json of a {kind.model_type} lacks {names[0]}")
    value = theirs[present[0]] if present else entry.default
    if not present and any(name in theirs for name in names):
        if isinstance(value, bool):
            value = False
        elif value is not None:
            raise UserError(f"config.json has {names[0]}=None; write what is meant, or leave it out to have {value!r}")
    if entry.choices is not None:
        if not isinstance(value, (str, bool, int, float, type(None))) or value not in entry.choices:
            _refuse(kind, names[0], {names[0]: value}, tuple(entry.choices))
        value = entry.choices[value]
    ours = entry.ours.split()
    if entry.read is None:
        return dict.fromkeys(ours, value)
    value = _computed(names[0], theirs, lambda: entry.read(value, theirs))
    return dict(zip(ours, value if len(ours) != 1 else (value,), strict=True))


def _computed(name: str, theirs: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    try:
        return compute()
    except (TypeError, ValueError, ArithmeticError, KeyError, IndexError) as error:
        said = repr(theirs[name]) if name in theirs else "absent"
        raise UserError(f"config.json: {name} ({said}) cannot be: {type(error).__name__}: {error}") from None


def _written(kind: Kind, entry: Field, flat: Mapping[str, Any]) -> Any:
    if entry.write is not None:
        return entry.write(flat)
    value = flat[entry.ours.split()[0]]
    if entry.choices is None:
        return value
    for theirs, ours in entry.choices.items():
        if ours == value:
            return theirs
    name = entry.ours.split()[0]
    raise UserError(f"{_our_name(kind, name)}={value!r} has no place in a {kind.model_type} checkpoint of {kind.library}")


def _refuse(kind: Kind, name: str, theirs: Mapping[str, Any], values: tuple[Any, ...]):
    can = " or ".join(repr(value) for value in values)
    raise UserError(f"config.json has {name}={theirs[name]!r}; of a {kind.model_type} seqmodels can only do {can}")


# How the groups of layers' options are called in ModelConfig.
_GROUPS: Final = {"mixer": "mixers", "channel": "channel_layers"}


def _our_name(kind: Kind, name: str) -> str:
    called, dot, field = name.partition(".")
    return f"model.{_GROUPS[called]}.{kind.layers_of[called]}.{field}" if dot else f"model.{name}"


# Of ModelConfig, what kinds have alike unless their tables say otherwise.
_PLAIN: Final = {
    "embedding_norm": False, "branch_rms": None, "norm": "rms", "logit_cap": None, "readout": "each", "dropout": 0.0,
    "remat": False, "compute_dtype": "float32", "short_conv": "own",
}  # fmt: skip


def _model_config(kind: Kind, ours: Mapping[str, Any]) -> ModelConfig:
    fields = {name: value for name, value in ours.items() if "." not in name}
    groups: dict[str, Any] = {group: {} for group in _GROUPS.values()}
    for called, layer in kind.layers_of.items():
        options = {name.partition(".")[2]: value for name, value in ours.items() if name.startswith(f"{called}.")}
        groups[_GROUPS[called]][layer] = dataclasses.asdict(load_layer(layer).Config()) | options
    try:
        return config_lib.model_config(_PLAIN | fields | groups | {"pattern": kind.pattern})
    except UserError as error:
        raise UserError(f"config.json asks for {error}") from None


def _flat_ours(kind: Kind, config: ModelConfig) -> dict[str, Any]:
    flat = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    del flat["pattern"]
    groups = {called: dict(flat.pop(group)) for called, group in _GROUPS.items()}
    for called, layer in kind.layers_of.items():
        flat |= {f"{called}.{name}": value for name, value in vars(groups[called][layer]).items()}
    return flat


# -- tensors ----------------------------------------------------------------------------------------------------


def read_tensors(kind: Kind, config: ModelConfig, shapes: dict, tensors: Mapping[str, np.ndarray]) -> dict:
    """Our parameters, float32, of their tensors.

    Args:
      shapes: our parameters' tree, with anything that has a shape for leaves.

    Raises:
      UserError: a tensor is missing, has another shape than the config says, or has no place; it is named.
    """
    params: dict = {}
    used = set()
    embedding, head = (
        next((tensor.theirs for tensor in kind.outer if tensor.ours == ours), None) for ours in ("embedding", "output_kernel")
    )
    # A writer that keeps one name of shared values may have kept the head's.
    kept_as_head = config.tie_embeddings and embedding not in tensors and head in tensors
    for tensor in _outer(kind, config):
        name = head if kept_as_head and tensor.theirs == embedding else tensor.theirs
        for path, value in zip(tensor.ours.split(), _read(name, tensor, kind, shapes, tensors)):
            _put(params, kind.path(path), value)
        used.add(name)
    for tensor in kind.inner:
        paths = [kind.path(path) for path in tensor.ours.split()]
        stacks = [np.empty(_get(shapes, path).shape, np.float32) for path in paths]
        for layer in range(config.repeats):
            name, also = (kind.layers.format(layer) + (each or "") for each in (tensor.theirs, tensor.also))
            name = also if name not in tensors and also in tensors else name
            used.add(name)
            for stack, value in zip(stacks, _read(name, tensor, kind, shapes, tensors, stacked=True)):
                stack[layer] = value
        for path, stack in zip(paths, stacks):
            _put(params, path, stack)
    rest = [name for name in tensors if name not in used and not name.endswith("rotary_emb.inv_freq")]
    if config.tie_embeddings and head in rest:
        if not np.array_equal(np.asarray(tensors[head], np.float32), params["embedding"]):
            raise UserError(
                f"tensor {head} differs from the embedding, though config.json has tie_word_embeddings=True (or, of a "
                f"{kind.model_type}, says nothing of it); if the head is one of its own, write tie_word_embeddings: false there"
            )
        rest.remove(head)
    if rest:
        more = f" (and {len(rest) - 1} more)" if len(rest) > 1 else ""
        raise UserError(f"tensor {rest[0]}{more} has no place in a {kind.model_type} of this config.json")
    return params


def write_tensors(kind: Kind, config: ModelConfig, params: dict) -> dict[str, np.ndarray]:
    """Their tensors, float32, of our parameters: the inverse of ``read_tensors``."""
    tensors = {}

    def written(tensor, values):
        parts = [tensor.layout_of(path).save(value) for path, value in zip(tensor.ours.split(), values)]
        return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))

    for tensor in _outer(kind, config):
        tensors[tensor.theirs] = written(tensor, [np.asarray(_get(params, kind.path(path))) for path in tensor.ours.split()])
    for tensor in kind.inner:
        stacks = [np.asarray(_get(params, kind.path(path))) for path in tensor.ours.split()]
        for layer in range(config.repeats):
            tensors[kind.layers.format(layer) + tensor.theirs] = written(tensor, [stack[layer] for stack in stacks])
    return tensors


def _outer(kind: Kind, config: ModelConfig) -> list[Tensor]:
    return [tensor for tensor in kind.outer if not (config.tie_embeddings and tensor.ours == "output_kernel")]


def _read(name, tensor, kind, shapes, tensors, stacked=False) -> list[np.ndarray]:
    """The parameters of one layer, or of none, that lie in the tensor ``name``."""
    paths = tensor.ours.split()
    expected = [_get(shapes, kind.path(path)).shape[1 if stacked else 0 :] for path in paths]
    layouts = [tensor.layout_of(path) for path in paths]
    # What ours would be written as; a broadcast scalar takes no memory.
    blank = [layout.save(np.broadcast_to(np.float32(0), shape)) for layout, shape in zip(layouts, expected)]
    shape = (sum(len(part) for part in blank), *blank[0].shape[1:])
    if name not in tensors:
        cure = "; if the head is the embedding, write tie_word_embeddings: true there" if tensor.ours == "output_kernel" else ""
        raise UserError(f"tensor {name} is missing; by config.json a {kind.model_type} has it, of shape {list(shape)}{cure}")
    found = tensors[name]
    if found.shape != shape:
        raise UserError(f"tensor {name} has shape {list(found.shape)}; by config.json it must be {list(shape)}")
    ends = np.cumsum([len(part) for part in blank])
    return [
        np.asarray(layout.load(found[end - len(part) : end], shape), np.float32)
        for layout, part, end, shape in zip(layouts, blank, ends, expected)
    ]


def _get(tree: dict, path: tuple[str, ...]) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _put(tree: dict, path: tuple[str, ...], value: np.ndarray) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value
