"""The .safetensors format: a length, a JSON header of dtypes, shapes and byte ranges, then the bytes.

Nothing in such a file is ever executed, which is why it is the only format read here.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax.numpy as jnp
import numpy as np

from seqmodels.data import atomic
from seqmodels.errors import UserError
from seqmodels.formats import json_text
from seqmodels.formats.limits import Malformed, OpenFile, excerpt

DTYPES: Final = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16)}
FILE_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"
MAX_HEADER_BYTES: Final = 100_000_000  # the format's own limit
MAX_DIMENSIONS: Final = 32
MAX_NAME_BYTES: Final = 255  # of a file


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of one or several files by name, each read whenever it is asked for.

    Attributes:
        count: of the numbers that all of them hold.
    """

    def __init__(self, stored: "dict[str, _Stored]"):
        self._stored = stored
        self.count = sum(math.prod(entry.shape) for _, _, entry in stored.values())

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor, read-only; Malformed where the file was cut off meanwhile, and OSError where the system cannot read it."""
        file, offset, entry = self._stored[name]
        content = file.read(offset + entry.first, offset + entry.end)
        return np.frombuffer(content, np.uint8).view(DTYPES[entry.dtype]).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:  # that of a Mapping would read the tensor
        return name in self._stored

    def __or__(self, others: "Tensors") -> "Tensors":
        return Tensors(self._stored | others._stored)


def read_folder(folder: str | os.PathLike) -> Tensors:
    """The tensors of a checkpoint's folder: of model.safetensors, or of the shards its index names.

    Raises:
        UserError: there is neither (PyTorch's pickles are not read), or a file is missing or damaged.
    """
    folder = Path(folder)
    if (folder / FILE_NAME).is_file():
        return read(folder / FILE_NAME)
    if (folder / INDEX_NAME).is_file():
        return _read_shards(folder)
    pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
    if pickles:
        raise UserError(
            f"{folder} has {pickles[0]} but no {FILE_NAME}: a pickle can run any code and is not read; save the model "
            "again with safetensors (transformers: save_pretrained)"
        )
    raise UserError(f"{folder} has no {FILE_NAME}")


def read(path: str | os.PathLike) -> Tensors:
    """The tensors of one file.

    Raises:
        Malformed: it is cut off or damaged, or holds a tensor that is not float32, float16 or bfloat16.
        OSError: the system cannot read it.
    """
    path = Path(path)
    file = OpenFile(path)
    size = file.size
    length = int.from_bytes(file.read(0, min(8, size)), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise Malformed(f"{path} is cut off or not a safetensors file: its header does not fit into its {size} bytes")
    try:
        text = file.read(8, 8 + length).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"{path} is damaged: its header is not UTF-8 ({error.reason})") from None
    header = json_text.parse(text, f"{path} is damaged: its header")
    if not isinstance(header, dict):
        raise Malformed(f"{path} is damaged: its header is no object of tensors")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, values) for name, values in header.items()}
    _check_bytes_used_once(path, entries, size - 8 - length)
    return Tensors({name: _Stored(file, 8 + length, entry) for name, entry in entries.items()})


class _Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    first: int
    end: int


class _Stored(NamedTuple):
    file: OpenFile
    offset: int  # of the first tensor's bytes
    entry: _Entry


def _entry(path: Path, name: str, values: Any) -> _Entry:
    """What a header says of one tensor, if its bytes are as many as its shape needs."""
    shown = excerpt(name)[1:-1]
    if not isinstance(values, dict) or values.keys() != {"dtype", "shape", "data_offsets"}:
        raise Malformed(f"{path} is damaged: {shown} has not just a dtype, a shape and data_offsets")
    dtype, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Malformed(
            f"{path}: {shown} is {excerpt(dtype).strip(chr(39))}; only {', '.join(DTYPES)} can be read (is this checkpoint quantized?)"
        )
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS or not _are_sizes(offsets) or len(offsets) != 2:
        raise Malformed(f"{path} is damaged: {shown} has the shape {excerpt(shape)} and the bytes {excerpt(offsets)}")
    first, end = offsets
    if math.prod(size for size in shape if size) >= 1 << 60:  # numpy counts so, also where a dimension is 0
        raise Malformed(f"{path} is damaged: {shown} has the shape {excerpt(shape)}")
    if end - first != math.prod(shape) * DTYPES[dtype].itemsize:
        raise Malformed(f"{path} is damaged: {shown} of shape {shape} has the bytes {first} to {end}")
    return _Entry(dtype, tuple(shape), first, end)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 60 for value in values)


def _check_bytes_used_once(path: Path, entries: Mapping[str, _Entry], size: int) -> None:
    """Every byte behind the header belongs to one tensor: neither to two nor to none."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].first, item[1].end)):
        shown = excerpt(name)[1:-1]
        if entry.first != position:
            kind = "shares bytes with another tensor" if entry.first < position else "begins behind bytes of no tensor"
            raise Malformed(f"{path} is damaged: {shown}, bytes {entry.first} to {entry.end}, {kind}")
        position = entry.end
        if position > size:
            raise Malformed(f"{path} is cut off: {shown} ends at byte {position}, but there are {size}")
    if position != size:
        raise Malformed(f"{path} is damaged: {size - position} bytes at its end belong to no tensor")


def _read_shards(folder: Path) -> Tensors:
    path = folder / INDEX_NAME
    index = json_text.read(path)
    places = index["weight_map"] if isinstance(index, dict) and "weight_map" in index else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise Malformed(f"{path} is damaged: it has no weight_map of tensors to files")
    names = sorted({Path(place).name for place in places.values()})
    odd = next((name for name in names if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES), None)
    if odd is not None:
        raise Malformed(f"{path} is damaged: it names a file {excerpt(odd)}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {missing[0]}, which {INDEX_NAME} names")
    shards = {name: read(folder / name) for name in names}
    # All that is in the shards, whether or not the index names it: whoever takes the tensors refuses what has no place. What the
    # index names and no shard has is left to them, too: of tensors that share their values a writer keeps one name.
    tensors = Tensors({})
    for file, shard in shards.items():
        twice = tensors.keys() & shard.keys()
        if twice:
            raise UserError(f"{folder / file} has {min(twice)}, which another shard has as well")
        tensors |= shard
    return tensors


def write(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Write one file, whole or not at all, as Hugging Face's own writer does: in the order of names, of one dtype.

    Raises:
        ValueError: a dtype that the format's reader here does not know.
    """
    known = {dtype: name for name, dtype in DTYPES.items()}
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(tensors):
        array = tensors[name]
        if array.dtype not in known:
            raise ValueError(f"{name} is {array.dtype}, not one of {', '.join(DTYPES)}")
        header[name] = {
            "dtype": known[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8

    def fill(file):
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            file.write(np.ascontiguousarray(tensors[name]).tobytes())

    atomic.write_whole(path, fill)
