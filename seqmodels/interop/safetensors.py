"""The .safetensors format: a length, a JSON header of dtypes, shapes and byte ranges, then the bytes.

Nothing in such a file is ever executed, which is why it is the only format read here.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import jax.numpy as jnp
import numpy as np

from seqmodels.data import atomic
from seqmodels.errors import UserError

DTYPES: Final = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16)}
FILE_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"
MAX_HEADER_BYTES: Final = 100_000_000  # the format's own limit


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of one or several files by name, memory-mapped: bytes are read when they are looked at."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


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
        UserError: it is cut off or damaged, or holds a tensor that is not float32, float16 or bfloat16.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise UserError(f"{path} is cut off or not a safetensors file: its header does not fit into its {size} bytes")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {
                name: (entry["dtype"], tuple(map(int, entry["shape"])), *map(int, entry["data_offsets"]))
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged: its header cannot be read ({type(error).__name__}: {error})") from None
    data = np.memmap(path, np.uint8, "r", offset=8 + length) if size > 8 + length else np.zeros(0, np.uint8)
    return Tensors({name: _tensor(path, data, name, *entry) for name, entry in entries.items()})


def _tensor(path: Path, data: np.ndarray, name: str, dtype: str, shape: tuple[int, ...], first: int, end: int) -> np.ndarray:
    if dtype not in DTYPES:
        raise UserError(f"{path}: {name} is {dtype}; only {', '.join(DTYPES)} can be read (is this checkpoint quantized?)")
    count = int(np.prod(shape, dtype=object))
    if not 0 <= first <= end or end - first != count * DTYPES[dtype].itemsize:
        raise UserError(f"{path} is damaged: {name} of shape {list(shape)} has the bytes {first} to {end}")
    if end > len(data):
        raise UserError(f"{path} is cut off: {name} ends at byte {end}, but there are {len(data)}")
    return data[first:end].view(DTYPES[dtype]).reshape(shape)


def _read_shards(folder: Path) -> Tensors:
    path = folder / INDEX_NAME
    try:
        places = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        names = sorted({Path(place).name for place in places.values()})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: it has no weight_map ({type(error).__name__}: {error})") from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {missing[0]}, which {INDEX_NAME} names")
    shards = {name: read(folder / name) for name in names}
    # All that is in the shards, whether or not the index names it: whoever takes the tensors refuses what has no place. What the
    # index names and no shard has is left to them, too: of tensors that share their values a writer keeps one name.
    tensors: dict[str, np.ndarray] = {}
    for file, shard in shards.items():
        twice = tensors.keys() & shard.keys()
        if twice:
            raise UserError(f"{folder / file} has {min(twice)}, which another shard has as well")
        tensors |= shard
    return Tensors(tensors)


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
