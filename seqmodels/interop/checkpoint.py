"""From a folder that transformers or flash-linear-attention saved to a run folder, and back."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels import config as config_lib
from seqmodels import data, model, suggest
from seqmodels.config import RunConfig
from seqmodels.data import atomic
from seqmodels.data.text import end_of_text
from seqmodels.data.text.tokenizer import END_OF_TEXT
from seqmodels.decoding.sampling import Sampling
from seqmodels.errors import UserError
from seqmodels.formats import json_text
from seqmodels.formats.limits import size
from seqmodels.interop import kinds, model_card, safetensors, table
from seqmodels.model import ModelConfig
from seqmodels.pattern import layer_name, parse_pattern, parts_of, with_options
from seqmodels.training import checkpoint

EXPORT_DTYPES: Final = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16), "float16": np.dtype(np.float16)}
ADAPTER_NAME: Final = "adapter_config.json"  # transformers applies the adapter that it describes
# Windows that eval.py scores, where the model was trained for longer ones.
LONGEST_WINDOW: Final = 1024
# Of a field that is no dimension of a tensor, such as a chunk's length.
MOST_SIZE: Final = 1 << 20


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A checkpoint of theirs in our terms; `theirs` is its config.json, and `params` are float32."""

    kind: table.Kind
    theirs: dict[str, Any]
    config: ModelConfig
    params: dict


def read(folder: str | os.PathLike, report: Callable[[str], None] = lambda line: None) -> Foreign:
    """Read a folder with config.json and safetensors.

    Args:
        report: called with one line for each thing a person should know.

    Raises:
        UserError: it is no such folder, or of a kind, with a field or with a tensor that has no place here.
    """
    folder = Path(folder)
    if (folder / ADAPTER_NAME).exists():
        raise UserError(
            f"{folder} has {ADAPTER_NAME}: an adapter changes what its model computes, and is not applied here; merge it (PEFT's "
            "merge_and_unload), and save the model that comes of it"
        )
    theirs = _read_json(folder)
    kind = kinds.load(theirs["model_type"])
    config = table.read_config(kind, theirs, report)
    tensors = safetensors.read_folder(folder)
    check_size(config, tensors)
    shapes = model.param_shapes(config, config.vocab_size)
    return Foreign(kind, theirs, config, table.read_tensors(kind, config, shapes, tensors))


def check_size(config: ModelConfig, tensors: safetensors.Tensors) -> None:
    """Raises UserError where a model of this config is much larger than all the tensors: before memory is asked for.

    Whatever a model computes while it is built (a matrix of its state size, say) is bounded by this as well.
    """
    there = tensors.count
    most = 2 * there + MOST_SIZE  # a tensor that is missing is said by its name, later
    sizes = {"model.repeats": config.repeats, "model.d_model": config.d_model, "model.vocab_size": config.vocab_size}
    sizes |= {
        f"model.mixers.{name}.{field}": value
        for name, options in config.mixers
        for field, value in vars(options).items()
        if type(value) is int and field != "window"
    }
    least = config.d_model * (config.vocab_size + config.repeats)  # the embedding, and a norm in each layer
    largest = max(sizes, key=sizes.get)
    if least <= most and sizes[largest] <= most:
        one = model.param_shapes(dataclasses.replace(config, repeats=1), config.vocab_size)
        layers = sum(leaf.size for leaf in jax.tree.leaves(one["layers"]))
        least = sum(leaf.size for leaf in jax.tree.leaves(one)) + (config.repeats - 1) * layers
    elif least <= most:
        raise UserError(f"config.json asks for {largest}={sizes[largest]:,}: its tensors hold {there:,} numbers")
    if least > most:
        raise UserError(
            f"config.json describes a model of {least:,} parameters or more ({size(4 * least)} in float32, "
            f"{config.repeats:,} layers), but its tensors hold {there:,} numbers: it is not the config of these tensors"
        )


def import_folder(
    folder: str | os.PathLike,
    workdir: str | os.PathLike,
    *,
    defaults: RunConfig,
    compute_dtype: str = "float32",
    report: Callable[[str], None] = lambda line: None,
) -> RunConfig:
    """Make the run folder `workdir`, at step 0, of a folder with config.json and safetensors; returns its config.

    A tokenizer.json is taken along, if it fits; `workdir` appears whole or not at all.

    Args:
        defaults: everything in the run's config but the model.
        compute_dtype: of the activations; parameters are float32.
        report: called with one line for each thing a person should know.

    Raises:
        UserError: as `read`, or `workdir` has something in it.
    """
    folder, workdir = Path(folder), Path(workdir)
    check_new(workdir, "--workdir")
    foreign = read(folder, report)
    tokenizer = _tokenizer(folder, foreign.config, report)
    longest = foreign.theirs["max_position_embeddings"] if "max_position_embeddings" in foreign.theirs else None
    config = dataclasses.replace(
        defaults,
        model=dataclasses.replace(foreign.config, compute_dtype=compute_dtype),
        data=dataclasses.replace(
            defaults.data,
            tokenizer=str(workdir / "tokenizer.json"),
            seq_len=min(longest, LONGEST_WINDOW) if type(longest) is int and longest > 0 else LONGEST_WINDOW,
        ),
    )
    record = {
        "imported_from": str(folder),
        "tokenizer": None if tokenizer is None else data.tokenizer_digest(tokenizer),
        "model": config_lib.model_record(config),
    }
    with _whole(workdir) as temporary:
        if tokenizer is not None:
            tokenizer.save(temporary / "tokenizer.json")
        _save_params(temporary / "checkpoints", foreign.params, record)
        config_lib.save(config, str(temporary / "config.json"))
    return config


def _save_params(directory: Path, params: dict, record: Mapping[str, object]) -> None:
    """Write parameters as a checkpoint of step 0."""
    writer = checkpoint.Writer(directory, keep=1)
    try:
        writer.save(0, {"params": jax.tree.map(jnp.asarray, params)}, record, validation_loss=None)
        writer.wait()
    except checkpoint.NonFinite as error:
        names = ", ".join(error.names[:3])
        raise UserError(f"{record['imported_from']}: not all numbers are finite in {names}: it is damaged, or diverged") from None
    finally:
        writer.close()


def export_folder(
    config: ModelConfig,
    params: dict,
    vocab_size: int,
    tokenizer: data.Tokenizer | None,
    out: str | os.PathLike,
    *,
    dtype: str = "float32",
    history: Mapping[str, object] = MappingProxyType({}),
) -> table.Kind:
    """Write the folder `out` as its library saves such a model; returns the kind. It appears whole or not at all.

    Args:
        config, params, vocab_size: the model.
        tokenizer: written as tokenizer.json; its end of text ends theirs, too.
        dtype: of the tensors; anything but float32 rounds them.
        history: what the model card says of how the model came about, by name.

    Raises:
        UserError: no kind has such a model (which field is in the way is named), or `out` has something in it.
    """
    out = Path(out)
    check_new(out, "--out")
    if dtype not in EXPORT_DTYPES:
        raise UserError(f"--dtype={dtype!r} is not one of {', '.join(EXPORT_DTYPES)}")
    kind, config, params, theirs = _as_kind(config, params, vocab_size)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer is not None:
        # What a text begins with: where that is nothing, the end of the text before.
        begin = tokenizer.beginning[0] if tokenizer.beginning else tokenizer.end_of_text
        ids |= {"bos_token_id": begin, "eos_token_id": tokenizer.end_of_text}
    theirs |= ids | {"dtype": dtype, "use_cache": True}
    tensors = {name: tensor.astype(EXPORT_DTYPES[dtype]) for name, tensor in table.write_tensors(kind, config, params).items()}
    # As scripts/generate.py draws, which a person has read samples of.
    generation = ids | {"do_sample": True, "temperature": Sampling().temperature, "top_k": 0}
    if tokenizer is not None and len(tokenizer.ends) > 1:
        generation["eos_token_id"] = list(tokenizer.ends)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    with _whole(out) as temporary:
        safetensors.write(temporary / safetensors.FILE_NAME, tensors)
        if tokenizer is not None:
            tokenizer.save(temporary / "tokenizer.json")
            end_of_text.write_ids(temporary / "tokenizer.json", tokenizer.end_name, tokenizer.ends)
        for name, content in (("config.json", theirs), ("generation_config.json", generation)):
            (temporary / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        card = model_card.text(kind, config, parameters, tokenizer, history)
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return kind


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(suggest.no_folder(folder))
    if not path.is_file():
        raise UserError(f"{folder} has no config.json: it is not a checkpoint's folder")
    theirs = _special_floats(json_text.read(path, most_bytes=config_lib.MOST_CONFIG_BYTES, infinity=True))
    if not isinstance(theirs, dict) or not isinstance(theirs.get("model_type"), str):
        raise UserError(f"{path} has no model_type: it is not the config of a checkpoint")
    return theirs


def _special_floats(value: Any) -> Any:
    """transformers 5 writes infinity, which JSON does not have, as {"__float__": "Infinity"}."""
    if isinstance(value, list):
        return [_special_floats(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return {name: _special_floats(each) for name, each in value.items()}


def _tokenizer(folder: Path, config: ModelConfig, report: Callable[[str], None]) -> data.Tokenizer | None:
    path = folder / "tokenizer.json"
    if not path.is_file():
        cure = ""
        if (folder / "tokenizer.model").is_file() or (folder / "vocab.json").is_file():
            cure = f"; AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r}) of transformers makes one"
        report(f"{folder} has no tokenizer.json: the run takes tokens, not text{cure}")
        return None
    tokenizer = data.load_tokenizer(path, report)
    if tokenizer.vocab_size <= config.vocab_size:
        if tokenizer.is_new:
            report(
                f"{folder}: no file says what ends a text, and no token has a name that does; {END_OF_TEXT!r}, id "
                f"{tokenizer.end_of_text}, is new, in a row that the model was not trained with: what it writes will not end, and "
                f'scores count that row. Write {{"eos_token": "NAME"}} to {folder / "tokenizer_config.json"} and import again'
            )
        elif tokenizer.is_guess and tokenizer.end_name == END_OF_TEXT:  # of any other name load_tokenizer says it
            report(f"{folder}: no file says what ends a text; {END_OF_TEXT!r}, id {tokenizer.end_of_text}, is taken, by its name")
        return tokenizer
    if tokenizer.end_of_text >= config.vocab_size and tokenizer.is_guess:
        report(
            f"{path} is left out, and the run takes tokens, not text: nothing says which of its tokens ends a text, and the model's "
            f'{config.vocab_size} rows leave no room for another; write {{"eos_token": "NAME"}} to '
            f"{folder / 'tokenizer_config.json'} and import again"
        )
    else:
        report(
            f"{path} is left out, and the run takes tokens, not text: its largest id is {tokenizer.vocab_size - 1}, the model has "
            f"{config.vocab_size} rows; it is another model's tokenizer.json"
        )
    return None


def _as_kind(config: ModelConfig, params: dict, vocab_size: int) -> tuple[table.Kind, ModelConfig, dict, dict[str, Any]]:
    """The kind whose table has a place for everything in the model; the model with that kind's pattern; their config."""
    complaints = []
    config = _with_plain_pattern(config)
    for kind in map(kinds.load, kinds.names()):
        copies = _copies(kind.pattern, config.pattern)
        if copies is None:
            continue
        repeated, stacked = _without_embedding_norm(kind, *_restack(kind, config, params, copies))
        repeated = dataclasses.replace(_with_hidden(kind, repeated, stacked), vocab_size=vocab_size)
        try:
            return kind, repeated, stacked, table.write_config(kind, repeated)
        except UserError as complaint:
            complaints.append(str(complaint))
    if complaints:
        raise UserError("; ".join(complaints))
    patterns = dict.fromkeys(kinds.load(name).pattern for name in kinds.names())
    raise UserError(f"no kind of checkpoint has model.pattern={config.pattern!r}; there are {', '.join(map(repr, patterns))}")


def _with_plain_pattern(config: ModelConfig) -> ModelConfig:
    """The same model with the options in its pattern among those of its layers' kinds, where all of a kind have the same."""
    parts = [part for spec in parse_pattern(config.pattern) for part in parts_of(spec)]
    options = dict(parts)
    if any(options[name] != own for name, own in parts):
        return config
    plain = " ".join(layer_name(spec) for spec in parse_pattern(config.pattern))
    own = {
        kind: tuple((name, with_options(layer, name, options[name])) for name, layer in getattr(config, kind))
        for kind in config_lib.LAYER_KINDS
    }
    return dataclasses.replace(config, pattern=plain, **own)


def _copies(pattern: str, of: str) -> int | None:
    """How many times a kind's pattern makes up a model's; None: it does not."""
    specs, wanted = parse_pattern(pattern), parse_pattern(of)
    copies, odd = divmod(len(wanted), len(specs))
    return copies if not odd and specs * copies == wanted else None


def _restack(kind: table.Kind, config: ModelConfig, params: dict, copies: int) -> tuple[ModelConfig, dict]:
    """The same model with the kind's pattern: "mamba mamba", 4 times, is "mamba", 8 times."""
    specs = parse_pattern(kind.pattern)
    layers = {
        f"{position}_{spec}": jax.tree.map(
            lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves], axis=1).reshape(-1, *leaves[0].shape[1:]),
            *(params["layers"][f"{copy * len(specs) + position}_{spec}"] for copy in range(copies)),
        )
        for position, spec in enumerate(specs)
    }
    config = dataclasses.replace(config, pattern=kind.pattern, repeats=config.repeats * copies)
    return config, params | {"layers": layers}


def _without_embedding_norm(kind: table.Kind, config: ModelConfig, params: dict) -> tuple[ModelConfig, dict]:
    """The same function for a kind without a norm on the embedding: the table holds what the norm makes of each token.

    A tied head keeps the table that it had, and is tied no more.
    """
    if not config.embedding_norm or kind.ours.get("embedding_norm"):
        return config, params
    vocab_size = len(params["embedding"])
    definition = model.graphdef(dataclasses.replace(config, compute_dtype="float32"), vocab_size)
    rest = {name: value for name, value in params.items() if name != "embedding_norm"}
    rest["embedding"] = np.asarray(model.merge(definition, params).embed(jnp.arange(vocab_size)[None])[0])
    if config.tie_embeddings:
        rest["output_kernel"] = np.asarray(params["embedding"]).T
    return dataclasses.replace(config, embedding_norm=False, tie_embeddings=False), rest


def _with_hidden(kind: table.Kind, config: ModelConfig, params: Mapping[str, Any]) -> ModelConfig:
    """The config with the hidden width of its channel layer written out."""
    if not config.channel_layers:
        return config
    kernel = functools.reduce(lambda tree, part: tree[part], kind.path("channel/output_kernel"), params)
    ((name, options),) = config.channel_layers
    return dataclasses.replace(config, channel_layers=((name, dataclasses.replace(options, hidden=kernel.shape[-2])),))


def check_new(folder: Path, flag: str) -> None:
    """Before any work: whether a folder can be made there.

    Raises:
        UserError: it cannot, or has something in it.
    """
    if folder.name in ("", ".."):
        raise UserError(f"{flag}={folder}: give the name of a new folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "not empty" if folder.is_dir() else "no folder"
        raise UserError(f"{folder} is there already and is {what}; choose another {flag}")
    above = next(each for each in folder.absolute().parents if each.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{flag}={folder}: cannot write in '{above}'; choose another {flag}")


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when all is in it, and is gone if that fails."""
    temporary = folder.with_name(f".{folder.name}.{atomic.unique()}")
    with atomic.disk_errors_as_user_errors("folder", folder.parent):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            if folder.exists():
                folder.rmdir()
            atomic.rename_folder(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
