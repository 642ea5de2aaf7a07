"""A checkpoint comes back bit for bit, or is noticed to be damaged and the one before it is used."""

import errno
import json
import os
import re
import shutil
import tempfile
import threading
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
import tensorstore as ts

from seqmodels.errors import UserError
from seqmodels.formats import json_text
from seqmodels.training import checkpoint


def make_state(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "params": {
            "embedding": jax.random.normal(keys[0], (70, 40)),
            "layers": {"0": {"query_kernel": jax.random.normal(keys[1], (3, 40, 40)).astype(jnp.bfloat16)}},
        },
        "optimizer": (jnp.int32(seed), {"mu": jax.random.normal(keys[2], (40, 40))}, jnp.array([True])),
        "step": jnp.int32(seed),
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


ABSTRACT = abstract(make_state(0))


def write(directory, *saves, keep=2):
    writer = checkpoint.Writer(directory, keep=keep)
    for step, loss in saves:
        writer.save(step, make_state(step), {"seed": 7}, validation_loss=loss)
    writer.close()


def assert_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def array_file(step_directory):
    """The file that holds most of a step's arrays."""
    files = (file for file in (step_directory / "state").rglob("*") if file.is_file())
    return max(files, key=lambda file: file.stat().st_size)


def truncate(step_directory):
    file = array_file(step_directory)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_byte(step_directory):
    file = array_file(step_directory)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(step_directory):
    shutil.rmtree(step_directory)
    step_directory.mkdir()


def record_of(step_directory, **changes):
    """The record with other values under a digest that is right; None takes a name away."""
    path = step_directory / "record" / "metadata"
    record = json.loads(path.read_text()) | changes
    record = {name: value for name, value in record.items() if name != "digest" and value is not None}
    path.write_text(json.dumps(record | {"digest": json_text.digest(record)}))


def test_round_trip(tmp_path):
    assert checkpoint.restore(tmp_path, ABSTRACT) is None
    write(tmp_path, (10, 2.0), (20, None))
    restored = checkpoint.restore(tmp_path, ABSTRACT)
    assert (restored.step, restored.record) == (20, {"seed": 7, "step": 20})
    assert_equal(restored.state, make_state(20))
    only_params = checkpoint.restore(tmp_path, {"params": ABSTRACT["params"]}, step=10)
    assert only_params.step == 10
    assert_equal(only_params.state, {"params": make_state(10)["params"]})


def test_a_state_of_another_step_than_its_folder_s_is_not_used(tmp_path):
    write(tmp_path, (10, None))
    writer = checkpoint.Writer(tmp_path)
    writer.save(20, make_state(19), {}, validation_loss=None)
    writer.close()
    said = []
    assert checkpoint.restore(tmp_path, ABSTRACT, report=said.append).step == 10
    assert "its state is after 19 steps, and its folder and its record say 20" in said[0]


def test_a_step_has_its_name_when_all_its_files_have_reached_the_disk(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def record(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if "tmp" in path.removeprefix(str(tmp_path)):
            assert not (tmp_path / "5").exists()
            synced.append(re.sub(r"^5[^/]*", "5", path.removeprefix(f"{tmp_path}/")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    write(tmp_path, (5, 1.0))
    files = {str(path.relative_to(tmp_path)) for path in (tmp_path / "5").rglob("*") if "commit" not in path.name}
    assert len(files) > 5 and files | {"5"} <= set(synced)


def test_the_newest_and_the_best_stay(tmp_path):
    write(tmp_path, (1, 3.0), (2, 1.0), (3, None), (4, 2.0))
    assert checkpoint.steps(tmp_path) == [2, 3, 4]
    # The losses outlive the process.
    write(tmp_path, (5, 1.5), (6, None))
    assert checkpoint.steps(tmp_path) == [2, 5, 6]


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, empty])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(tmp_path, damage, capfd):
    directory = tmp_path / "checkpoints"
    write(directory, (10, None), (20, None))
    damage(directory / "20")
    lines = []
    # A reader touches nothing, ...
    restored = checkpoint.restore(directory, ABSTRACT, report=lines.append)
    assert restored.step == 10 and checkpoint.steps(directory) == [10, 20]
    assert_equal(restored.state, make_state(10))
    assert re.search(r"checkpoints/20 cannot be restored: \S", lines[0])
    assert lines[1] == "using the checkpoint of step 10 instead"
    assert "Traceback" not in capfd.readouterr().err
    # ... a run makes room for the step to be saved again.
    checkpoint.restore(directory, ABSTRACT, set_aside=True)
    assert checkpoint.steps(directory) == [10] and checkpoint.steps(tmp_path / "checkpoints_broken") == [20]
    write(directory, (20, None))
    assert checkpoint.restore(directory, ABSTRACT).step == 20


def test_nothing_whole_is_an_error_and_loses_nothing(tmp_path):
    write(tmp_path, (10, None), (20, None))
    truncate(tmp_path / "10")
    flip_a_byte(tmp_path / "20")
    with pytest.raises(UserError, match="none of the checkpoints"):
        checkpoint.restore(tmp_path, ABSTRACT, set_aside=True)
    assert checkpoint.steps(tmp_path) == [10, 20]


def test_a_reader_never_advises_deletion(tmp_path):
    write(tmp_path, (10, None))
    truncate(tmp_path / "10")
    with pytest.raises(UserError) as error:
        checkpoint.restore(tmp_path, ABSTRACT)
    assert "delete" not in str(error.value) and "damaged" in str(error.value)


@pytest.fixture
def as_nobody():
    """Permissions hold for the test, whoever runs it; yields a folder that others may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        user = os.geteuid()
        yield Path(folder)
        os.seteuid(user)


def test_a_checkpoint_without_read_permission_is_not_damaged(as_nobody):
    directory = as_nobody / "checkpoints"
    write(directory, (10, None), (20, None))
    locked = array_file(directory / "20")
    locked.chmod(0)
    if os.geteuid() == 0:
        os.seteuid(65534)
    with pytest.raises(UserError, match="checkpoints/20 cannot be read now: permission denied"):
        checkpoint.restore(directory, ABSTRACT, set_aside=True)
    with pytest.raises(UserError, match="cannot be read now: permission denied"):
        checkpoint.restore(directory, ABSTRACT, step=20)
    os.seteuid(os.getuid())
    assert checkpoint.steps(directory) == [10, 20]
    locked.chmod(0o600)
    assert checkpoint.restore(directory, ABSTRACT).step == 20
    directory.chmod(0)
    if os.geteuid() == 0:
        os.seteuid(65534)
    with pytest.raises(UserError, match="cannot be listed: permission denied"):
        checkpoint.restore(directory, ABSTRACT)


def test_no_part_of_a_checkpoint_without_permission_is_damaged(as_nobody):
    directory = as_nobody / "checkpoints"
    write(directory, (10, None), (20, None))
    if os.geteuid() == 0:
        for path in [as_nobody, *as_nobody.rglob("*")]:
            os.chown(path, 65534, 65534)
    for place in [directory / "20", *sorted((directory / "20").rglob("*"))]:
        mode = place.stat().st_mode
        place.chmod(0)
        if os.getuid() == 0:
            os.seteuid(65534)
        try:
            restored = checkpoint.restore(directory, ABSTRACT, set_aside=True)  # not every file is needed
            assert restored.step == 20, place
        except UserError as error:
            assert "checkpoints/20 cannot be read now: permission denied" in str(error), place
        os.seteuid(os.getuid())
        place.chmod(mode)
        assert checkpoint.steps(directory) == [10, 20], place


@pytest.mark.parametrize(
    "error, cause",
    [
        (OSError(errno.EIO, "Input/output error", "x"), "input/output error"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (MemoryError(), "out of memory"),
        (ValueError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 68719476736 bytes."), "out of memory"),
        (Exception("Failed to open [OS error 24: EMFILE Too many open files]"), "ulimit -n"),
    ],
)
def test_what_is_in_the_way_stops_and_is_named(tmp_path, monkeypatch, error, cause):
    write(tmp_path, (10, None), (20, None))

    def fails(*_):
        try:
            raise error
        except Exception as inner:
            raise ValueError("wrapped by a library") from inner

    monkeypatch.setattr(checkpoint, "_read_step", fails)
    with pytest.raises(UserError, match=f"checkpoint .*/20 cannot be read now: .*{cause}"):
        checkpoint.restore(tmp_path, ABSTRACT, set_aside=True)
    assert checkpoint.steps(tmp_path) == [10, 20]


def test_a_reader_beside_a_writer_takes_what_is_newest_now(tmp_path, monkeypatch):
    write(tmp_path, (10, None), (20, None))
    read_step = checkpoint._read_step

    def meanwhile(*arguments):
        monkeypatch.setattr(checkpoint, "_read_step", read_step)
        write(tmp_path, (30, None), (40, None))
        return read_step(*arguments)

    monkeypatch.setattr(checkpoint, "_read_step", meanwhile)
    lines = []
    assert checkpoint.restore(tmp_path, ABSTRACT, report=lines.append).step == 40 and not lines
    monkeypatch.setattr(checkpoint, "_read_step", meanwhile)
    shutil.rmtree(tmp_path / "30")
    with pytest.raises(UserError, match=r"step 40 .* was deleted by the run that writes there.* there are \[50, 60\]"):
        monkeypatch.setattr(checkpoint, "_read_step", lambda *a: (write(tmp_path, (50, None), (60, None)), read_step(*a)))
        checkpoint.restore(tmp_path, ABSTRACT, step=40)


@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "record/metadata", "state/_METADATA", "state/manifest.ocdbt", "array"])
def test_what_is_no_file_in_a_checkpoint_is_not_waited_for(tmp_path, put, name):
    write(tmp_path, (10, None), (20, None))
    path = array_file(tmp_path / "20") if name == "array" else tmp_path / "20" / name
    path.unlink()
    put(path)
    lines = []
    assert checkpoint.restore(tmp_path, ABSTRACT, report=lines.append).step == 10
    assert f"{path.name} is not a regular file" in lines[0]


def test_an_array_in_parts_that_are_larger_than_it_is_not_decompressed(tmp_path):
    """40 KiB would become a part of 1 GiB, of which the array takes its corner; here they become 10 MiB."""
    write(tmp_path, (10, None), (20, None))
    store = ts.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{tmp_path / '20' / 'state'}/"}}).result()
    about = json.loads(store.read(b"params.embedding/.zarray").result().value)
    store.write(b"params.embedding/0.0", pyarrow.compress(bytes(4 * 40 << 16), codec="zstd", asbytes=True)).result()
    changed = (
        {"chunks": [1 << 16, 40]}, {"chunks": [0, 40]}, {"chunks": [70]}, {"shape": 3}, {"compressor": {"id": "blosc"}},
        {"filters": [{"id": "x"}]},
    )  # fmt: skip
    for changes in changed:
        store.write(b"params.embedding/.zarray", json.dumps(about | changes)).result()
        lines = []
        assert checkpoint.restore(tmp_path, ABSTRACT, report=lines.append).step == 10
        assert re.search(
            "20 cannot be restored: (an array of .70, 40. is in|its arrays are compressed|the description)", lines[0]
        )


def test_a_link_to_a_folder_in_a_step_is_damage_and_a_step_that_is_one_is_read(tmp_path):
    write(tmp_path, (10, None), (20, None))
    (tmp_path / "20" / "state").rename(tmp_path / "elsewhere")
    (tmp_path / "20" / "state").symlink_to(tmp_path / "elsewhere")
    lines = []
    assert checkpoint.restore(tmp_path, ABSTRACT, report=lines.append).step == 10
    assert "state is a symbolic link to a folder" in lines[0]
    (tmp_path / "10").rename(tmp_path / "moved")
    (tmp_path / "10").symlink_to(tmp_path / "moved")
    assert_equal(checkpoint.restore(tmp_path, ABSTRACT, step=10).state, make_state(10))


def test_a_file_of_a_checkpoint_that_is_too_large_is_not_read(tmp_path):
    write(tmp_path, (10, None), (20, None))
    os.truncate(tmp_path / "20" / "record" / "metadata", 1 << 40)
    lines = []
    assert checkpoint.restore(tmp_path, ABSTRACT, report=lines.append).step == 10
    assert "metadata has 1.0 TiB" in lines[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"checksums": None}, {"checksums": []}, {"checksums": {"params/embedding": "x"}}, {"model": [1]}, {"model": {}},
        {"model": {"version": 4}}, {"model": {"version": 4, "options": [1]}}, {"digests": "x"}, {"digests": ["x"]},
        {"digests": {"train": 1}},
        {"tokenizer": [1]}, {"order": [1]}, {"seconds": "x"}, {"log": [1]}, {"log": {"metrics.jsonl": {}}}, {"data": 5},
        {"log": {"metrics.jsonl": {"bytes": "a", "digest": "b"}}}, {"skipped": [1]}, {"skipped": "ab"}, {"step": "20"},
    ],
    ids=str,
)  # fmt: skip
def test_a_record_that_no_run_wrote_is_damage(tmp_path, changes, two_steps):
    directory = shutil.copytree(two_steps, tmp_path / "checkpoints")
    record_of(directory / "20", **changes)
    lines = []
    assert checkpoint.restore(directory, ABSTRACT, report=lines.append).step == 10
    assert re.search(r"20 cannot be restored: (its record is damaged|'checksums')", lines[0])


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two_steps")
    write(directory, (10, None), (20, None))
    return directory


@pytest.mark.parametrize("set_aside", [False, True])
def test_a_checkpoint_of_another_model_is_not_called_damaged(two_steps, set_aside):
    other = {"an array of (70, 40), not (70, 80)": (70, 80), "an array of (70, 40), not (70,)": (70,), "no params/head": None}
    for said, shape in other.items():
        params = ABSTRACT["params"]
        like = params["embedding"]
        change = {"embedding" if shape else "head": jax.ShapeDtypeStruct(shape or (3,), like.dtype, sharding=like.sharding)}
        with pytest.raises(UserError, match=f"checkpoints?.*/20 holds {re.escape(said)}: it is of another model, or tokenizer"):
            checkpoint.restore(two_steps, {"params": params | change}, set_aside=set_aside)
    assert checkpoint.steps(two_steps) == [10, 20]


def test_a_step_that_is_deleted_bit_by_bit_is_not_called_damaged(tmp_path, monkeypatch):
    """The run that writes there deletes a folder file by file: a reader finds some of them gone, and the name still there."""
    write(tmp_path, (10, None), (20, None), (30, None), keep=3)
    monkeypatch.setattr(checkpoint, "DELETION_SECONDS", 1.0)

    def deleting(step):
        array_file(tmp_path / str(step)).unlink()
        threading.Timer(0.2, shutil.rmtree, [tmp_path / str(step)]).start()

    deleting(10)
    with pytest.raises(UserError, match=r"step 10 .* was deleted by the run that writes there.* there are \[20, 30\]"):
        checkpoint.restore(tmp_path, ABSTRACT, step=10)
    deleting(30)
    lines = []
    assert checkpoint.restore(tmp_path, ABSTRACT, report=lines.append).step == 20 and not lines
    deleting(20)
    with pytest.raises(UserError, match="the checkpoints in .* were deleted while they were read"):
        checkpoint.restore(tmp_path, ABSTRACT)


def test_a_damaged_step_that_is_asked_for_is_not_called_deleted(tmp_path, monkeypatch):
    write(tmp_path, (10, None), (20, None))
    truncate(tmp_path / "10")
    read_step = checkpoint._read_step
    monkeypatch.setattr(checkpoint, "_read_step", lambda *a: (write(tmp_path, (30, None), keep=3), read_step(*a))[1])
    with pytest.raises(UserError, match=r"none of the checkpoints \[10\] .* they are damaged"):
        checkpoint.restore(tmp_path, ABSTRACT, step=10)


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    state = make_state(1)
    state["optimizer"][1]["mu"] = state["optimizer"][1]["mu"].at[3, 4].set(jnp.inf)
    writer = checkpoint.Writer(tmp_path)
    with pytest.raises(checkpoint.NonFinite) as error:
        writer.save(10, state, {}, validation_loss=None)
    writer.close()
    assert error.value.names == ("optimizer/1/mu",) and checkpoint.steps(tmp_path) == []


def test_a_step_that_is_not_there(tmp_path):
    write(tmp_path, (10, None))
    with pytest.raises(UserError, match=r"no checkpoint of step 11 .* there are \[10\]"):
        checkpoint.restore(tmp_path, ABSTRACT, step=11)


def test_every_single_flipped_bit_changes_the_checksum():
    """Of any dtype, at any place, in an array that repeats itself."""

    def checksum(array):
        return int(checkpoint._examined({"a": jnp.asarray(array)})["a"][0])

    for dtype in (np.uint8, np.float16, np.int32, np.float32):
        plain = np.zeros((3, 5), dtype)
        expected = checksum(plain)
        for place in np.ndindex(plain.shape):
            bits = plain.copy()
            bits[place] = np.frombuffer(np.array([1], np.uint64).tobytes()[: plain.itemsize], dtype)[0]
            assert checksum(bits) != expected
    swapped = np.arange(6, dtype=np.float32)
    assert checksum(swapped[::-1]) != checksum(swapped)


def test_garbage_is_collected_after_a_failure_alone(tmp_path, monkeypatch):
    """It takes longer, the more a process has in memory."""
    collected = []
    monkeypatch.setattr(checkpoint, "gc", types.SimpleNamespace(collect=lambda: collected.append(True)))
    write(tmp_path, (10, None), (20, None))
    assert checkpoint.restore(tmp_path, ABSTRACT).step == 20 and not collected
    flip_a_byte(tmp_path / "20")
    assert checkpoint.restore(tmp_path, ABSTRACT).step == 10 and collected == [True]


@pytest.mark.parametrize("name", ["007", "\u0663", "3.tmp", "+3", "3_0"])
def test_a_folder_of_no_step_s_name_is_none(tmp_path, name):
    write(tmp_path, (1, None))
    (tmp_path / name).mkdir()
    assert checkpoint.steps(tmp_path) == [1]
    lines = []
    assert checkpoint.restore(tmp_path, ABSTRACT, report=lines.append, set_aside=True).step == 1 and lines == []
    write(tmp_path, (2, None), (3, None))
    assert checkpoint.steps(tmp_path) == [2, 3]


def test_a_folder_whose_name_is_not_utf_8_is_refused_and_not_called_damaged(tmp_path):
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    for act in (checkpoint.steps, lambda path: checkpoint.restore(path, ABSTRACT)):
        with pytest.raises(UserError, match="is not UTF-8.*rename it"):
            act(folder / "checkpoints")
