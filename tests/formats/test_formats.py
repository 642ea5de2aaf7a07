"""Each reader of foreign files reads what it should, and says of anything else in one line what is wrong: no other error,
no abort, no memory that the file's own size does not account for."""

import io
import json
import os
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from seqmodels.data.text import tokenizer as tokenizers
from seqmodels.formats import json_text, limits, npz, tokenizer_json, yaml_texts
from seqmodels.formats.limits import Malformed
from seqmodels.interop import safetensors
from tools.drills import hostile


def use_tokenizer(path):
    """Reading is not all: what was read is used."""
    loaded = tokenizers.from_json(limits.read_text(path, tokenizer_json.MOST_BYTES))
    for text in ("ab aé ba\n", "a" * 100, ""):
        loaded.decode(loaded.encode(text))
    loaded.encode_batch(["ab a", "bé"])
    return loaded.to_json()


def use_tensors(path):
    return {name: float(np.sum(tensor.astype(np.float32))) for name, tensor in safetensors.read(path).items()}


READERS = {
    "json": json_text.read,
    "npz": npz.read,
    "safetensors": use_tensors,
    "yaml": yaml_texts.read,
    "tokenizer": use_tokenizer,
}


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory):
    """What readers import is not memory that a file asks for."""
    path = tmp_path_factory.mktemp("good") / "file"
    for kind, content in hostile.good_files().items():
        path.write_bytes(content)
        READERS[kind](path)


def outcome(kind, path):
    """The value that is read, or the one line that says why there is none."""
    try:
        return READERS[kind](path)
    except limits.UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, error
        return error


def refused(kind, content, folder):
    path = folder / "file"
    path.write_bytes(content)
    tracemalloc.start()
    result = outcome(kind, path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 12 * len(content) + (4 << 20), f"{most:,} bytes for a file of {len(content):,}"
    return result


@pytest.mark.parametrize("kind", hostile.HOSTILE)
def test_hostile_files_are_refused_in_one_line(kind, tmp_path):
    for name, content in hostile.HOSTILE[kind]().items():
        result = refused(kind, content, tmp_path)
        assert isinstance(result, limits.UserError), f"{kind}: {name} was read: {result!r:.200}"


@pytest.mark.parametrize("kind", READERS)
def test_good_files_are_read(kind, tmp_path):
    (tmp_path / "file").write_bytes(hostile.good_files()[kind])
    result = outcome(kind, tmp_path / "file")
    assert not isinstance(result, limits.UserError), result


def sweep(kind, seeds, folder):
    """Damaged files of a kind; of those that consist of JSON, ones with odd values too. Returns how many were read and refused."""
    good = hostile.good_files()[kind]
    read = 0
    for seed in seeds:
        content = hostile.damaged(good, seed)
        if kind in ("json", "tokenizer") and seed % 2:
            content = hostile.odd_json(json.loads(good), seed).encode("utf-8", "surrogatepass")
        read += not isinstance(refused(kind, content, folder), limits.UserError)
    return read, len(seeds) - read


@pytest.mark.parametrize("kind", READERS)
def test_damaged_files_are_read_or_refused(kind, tmp_path):
    read, refusals = sweep(kind, range(60), tmp_path)
    assert refusals > 10 and (kind == "npz" or read), "what is damaged here is seldom what is read"


@pytest.mark.slow
@pytest.mark.parametrize("kind", READERS)
def test_many_damaged_files_are_read_or_refused(kind, tmp_path):
    """In a process of its own, with 4 GiB: an abort would end the tests."""
    program = f"""
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from tests.formats.test_formats import sweep
print(*sweep({kind!r}, range(1000, 5000), Path(sys.argv[1])))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sum(map(int, done.stdout.split())) == 4000


def test_npz_reads_what_numpy_writes(tmp_path):
    arrays = {
        "f4": np.ones((2, 3), np.float32), "scalar": np.float64(2.5), "text": np.asarray("é\U0001f600"),
        "texts": np.asarray(["a", "bcd"]), "empty": np.zeros((3, 0), np.int8),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "bool": np.array([True]),
        "big_endian": np.arange(3, dtype=">u2"), "raw": np.zeros(3, "V2"), "complex": np.array([1j]),
    }  # fmt: skip
    np.savez(tmp_path / "file.npz", **arrays)
    found = npz.read(tmp_path / "file.npz")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == np.asarray(array).dtype and found[name].shape == np.shape(array), name
        np.testing.assert_array_equal(found[name], array)


def test_npz_has_an_array_once_under_each_name(tmp_path):
    """Without the ending that numpy takes off, two members can have one name."""
    array = io.BytesIO()
    np.save(array, np.arange(3))
    with zipfile.ZipFile(tmp_path / "twice.npz", "w") as archive:
        for member in ("a", "a.npy"):
            archive.writestr(member, array.getvalue())
    with pytest.raises(limits.Malformed, match="an array is there twice"):
        npz.read(tmp_path / "twice.npz")


def test_json_takes_infinity_only_where_it_is_asked_for():
    assert json_text.parse("[Infinity, -Infinity]", "it", infinity=True) == [float("inf"), float("-inf")]
    with pytest.raises(Malformed, match="it is not valid JSON .NaN is no number"):
        json_text.parse("[NaN]", "it", infinity=True)


def test_what_is_nested_in_a_text_is_not_deep():
    assert json_text.parse(json.dumps(["[" * 1000, '\\"[' * 1000]), "it") == ["[" * 1000, '\\"[' * 1000]


def test_a_file_that_is_too_large_is_not_read_whole(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        file.truncate(1 << 40)  # takes no space
    for kind in READERS:
        assert isinstance(outcome(kind, tmp_path / "file"), limits.UserError), kind


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        for kind in READERS:
            assert "is not a regular file" in str(outcome(kind, path)), (kind, path)


def test_what_cannot_be_read_now_is_not_called_damaged(tmp_path):
    for kind in READERS:
        with pytest.raises(FileNotFoundError):
            READERS[kind](tmp_path / "nothing")


def test_sizes_for_people():
    assert limits.size(0) == "0 bytes" and limits.size(256e9) == "238.4 GiB" and limits.size(2**80) == "1,073,741,824.0 PiB"


def test_an_index_of_shards_names_files(tmp_path):
    path = tmp_path / safetensors.INDEX_NAME
    for name in ("x" * 5000, "é" * 128, "", "..", "a\0b", "\ud800", "../" * 50 + "etc/passwd"):
        path.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(limits.UserError):
            safetensors.read_folder(tmp_path)
