"""A run folder in an object store is what it is on a disk: whole at any moment, one process's, and all that is needed to go on."""

import json
import shutil

import pytest

from seqmodels import processes
from seqmodels.errors import UserError
from seqmodels.object_store import Lease, ObjectStore
from seqmodels.run import load_run
from seqmodels.training import loop, remote_folder
from seqmodels.training.remote_folder import COMMIT, Mirror
from tests.configs import tiny
from tests.stores import Killed, Requests, watched

pytestmark = pytest.mark.tools


@pytest.fixture
def url(tmp_path):
    return f"file://{tmp_path}/bucket/run"


@pytest.fixture
def store(url):
    return ObjectStore(url)


def mirror_of(store, folder):
    folder.mkdir(parents=True, exist_ok=True)
    lease = Lease(store)
    lease._generation = store.write(Lease.NAME, b"{}")
    return Mirror(store, folder, lease)


def checkpoint(folder, step, text="x"):
    """A folder like Orbax's of one step, and the row that comes before it."""
    place = folder / "checkpoints" / str(step)
    for name in ("state/d/a", "record/b", "_METADATA"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(f"{text} {step} {name}")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(f"row {step}\n")
    return place


def content(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def steps(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def run_of_three(folder, mirror):
    """Three checkpoints, of which the newest two stay, as the loop has it: a folder is deleted after the next one is published."""
    (folder / "config.json").write_text("{}")
    mirror.publish()
    for step in (1, 2, 3):
        mirror.publish(checkpoint(folder, step))
        if step > 2:
            shutil.rmtree(folder / "checkpoints" / str(step - 2))
    (folder / "metrics.jsonl").open("a").write("last row\n")
    mirror.publish()


def test_another_machine_gets_what_was_put_there(store, tmp_path):
    run_of_three(tmp_path / "a", mirror_of(store, tmp_path / "a"))
    (tmp_path / "b" / "tensorboard").mkdir(parents=True)
    (tmp_path / "b" / "tensorboard" / "left over").touch()
    checkpoint(tmp_path / "b", 9)
    mirror_of(store, tmp_path / "b").take()
    assert content(tmp_path / "b") == content(tmp_path / "a") and steps(tmp_path / "b") == [2, 3]


def test_a_process_killed_at_any_request_leaves_a_checkpoint_or_none(tmp_path):
    """What is found there: steps that were whole in the folder, the newest that was committed among them, and its rows."""
    with watched(all_requests := Requests()):
        store = ObjectStore(f"file://{tmp_path}/whole/run")
        run_of_three(tmp_path / "whole copy", mirror_of(store, tmp_path / "whole copy"))
    for last in range(len(all_requests.made)):
        store, folder, found = ObjectStore(f"file://{tmp_path}/{last}/run"), tmp_path / f"{last} copy", tmp_path / f"{last} found"
        requests = Requests(last)
        with watched(requests), pytest.raises(Killed):
            run_of_three(folder, mirror_of(store, folder))
        mirror = mirror_of(store, found)
        mirror.take()
        committed = [int(name.split("/")[1]) for name in requests.made if name.endswith(COMMIT)]
        there, files = steps(found), content(found)
        assert not committed or max(committed) in there or committed.count(max(committed)) > 1
        for step in there:
            assert files[f"checkpoints/{step}/state/d/a"] == f"x {step} state/d/a".encode()
            assert sum(name.startswith(f"checkpoints/{step}/") for name in files) == 3
            assert f"row {step}\n".encode() in files["metrics.jsonl"]
        mirror.publish(checkpoint(found, 4))  # and what was half written is no longer there
        names = set(store.names()) - {Lease.NAME}
        assert names == {*content(found), *(f"checkpoints/{step}/{COMMIT}" for step in steps(found))}


def test_only_what_has_changed_is_written(store, tmp_path):
    mirror = mirror_of(store, tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("{}")
    (tmp_path / "a" / "link").symlink_to("/etc/hostname")
    (tmp_path / "a" / ".lock").touch()
    mirror.publish()
    with watched(requests := Requests()):
        mirror.publish(checkpoint(tmp_path / "a", 1))
    assert "config.json" not in requests.made and "metrics.jsonl" in requests.made
    assert not {"link"} & set(store.names())


def test_a_file_that_is_deleted_is_deleted_there(store, tmp_path):
    mirror = mirror_of(store, tmp_path / "a")
    (tmp_path / "a" / "x").touch()
    mirror.publish()
    (tmp_path / "a" / "x").unlink()
    mirror.publish()
    assert store.names() == [Lease.NAME]


@pytest.mark.parametrize("name", ["state/d/a", COMMIT])
def test_a_damaged_checkpoint_is_left_out_and_written_again(store, tmp_path, capsys, name):
    mirror = mirror_of(store, tmp_path / "a")
    for step in (1, 2):
        mirror.publish(checkpoint(tmp_path / "a", step))
    store.write(f"checkpoints/2/{name}", b"damaged")
    mirror = mirror_of(store, tmp_path / "b")
    mirror.take()
    assert steps(tmp_path / "b") == [1] and f"checkpoints/2 is not what was written ({name})" in capsys.readouterr().err
    mirror.publish()
    assert store.read(f"checkpoints/2/{name}")[0] == b"damaged"  # nothing is thrown away
    mirror.publish(checkpoint(tmp_path / "b", 2, "again"))
    mirror_of(store, tmp_path / "c").take()
    assert content(tmp_path / "c")["checkpoints/2/state/d/a"] == b"again 2 state/d/a"


def test_only_damaged_checkpoints_stop_the_run(store, tmp_path):
    mirror_of(store, tmp_path / "a").publish(checkpoint(tmp_path / "a", 1))
    store.write("checkpoints/1/_METADATA", b"damaged")
    with pytest.raises(UserError, match=r"none of the checkpoints \[1\]"):
        mirror_of(store, tmp_path / "b").take()
    with pytest.raises(UserError, match=r"none of the checkpoints \[1\]"):
        remote_folder.opened(store.url, tmp_path / "cache")


def test_a_reader_gets_one_checkpoint_and_no_events(store, tmp_path):
    mirror = mirror_of(store, tmp_path / "a")
    (tmp_path / "a" / "tensorboard").mkdir()
    (tmp_path / "a" / "tensorboard" / "events").touch()
    for step in (1, 2):
        mirror.publish(checkpoint(tmp_path / "a", step))
    folder = remote_folder.opened(store.url, tmp_path / "cache")
    assert steps(folder) == [2] and sorted(path.name for path in folder.iterdir()) == ["checkpoints", "metrics.jsonl"]
    assert steps(remote_folder.opened(store.url, tmp_path / "cache", step=1)) == [1, 2]
    with pytest.raises(UserError, match=r"no checkpoint of step 7 in .*; there are \[1, 2\]"):
        remote_folder.opened(store.url, tmp_path / "cache", step=7)


def test_who_has_lost_the_lock_commits_nothing(store, tmp_path):
    mirror = mirror_of(store, tmp_path / "a")
    place = checkpoint(tmp_path / "a", 1)
    write_files = store.write_files

    def another_takes_over(files):
        write_files(files)
        store.write(Lease.NAME, b"another's")

    store.write_files = another_takes_over
    with pytest.raises(UserError, match="taken over"):
        mirror.publish(place)
    assert f"checkpoints/1/{COMMIT}" not in store.names()


# -- A run ------------------------------------------------------------------------------------------------------


def config_in(folder, **changes):
    every = {"train.steps": 6, "train.log_every_steps": 1, "train.eval_every_steps": 3, "train.checkpoint_every_steps": 2}
    small = {"model.repeats": 1, "train.eval_tokens": 64, "train.sample_every_steps": 0, "data.toy_documents": 40}
    return tiny(**every | small | {"data.cache_dir": str(folder / "cache")} | changes)


def rows(text):
    timed = ("seconds", "tokens_per_second", "mfu")
    return [{name: value for name, value in json.loads(line).items() if name not in timed} for line in text.splitlines()]


def test_a_run_that_is_killed_goes_on_elsewhere_and_ends_as_one_left_alone(store, tmp_path, monkeypatch, capsys):
    loop.train(config_in(tmp_path), tmp_path / "alone")
    monkeypatch.setattr(Lease, "LOST_SECONDS", 0.2)
    requests = Requests(last=8, since=f"checkpoints/2/{COMMIT}")
    with monkeypatch.context() as patch, watched(requests), pytest.raises(Killed):
        patch.setattr(Lease, "__exit__", lambda self, *error: self._ended.set())  # a process that is killed leaves its lock
        loop.train(config_in(tmp_path), store.url)
    assert remote_folder._committed(store.names()) == {2}
    shutil.rmtree(tmp_path / "cache" / "runs")  # another machine
    loop.train(config_in(tmp_path), store.url)
    assert "gives no sign: taking over" in capsys.readouterr().err
    assert rows(store.read("metrics.jsonl")[0].decode()) == rows((tmp_path / "alone" / "metrics.jsonl").read_text())
    assert Lease.NAME not in store.names()

    shutil.rmtree(tmp_path / "cache" / "runs")
    run = load_run(store.url, cache_dir=str(tmp_path / "cache"))
    alone = load_run(tmp_path / "alone")
    assert run.step == 6 and run.fingerprint == alone.fingerprint
    assert run.evaluate(max_tokens=64).loss == alone.evaluate(max_tokens=64).loss


def test_what_is_wrong_names_the_url(store, tmp_path):
    loop.train(config_in(tmp_path, **{"train.steps": 2}), store.url)
    before = store.names()
    with pytest.raises(UserError, match=f"^{store.url} holds a run of another config: model.d_model 32 -> 64"):
        loop.train(config_in(tmp_path, **{"train.steps": 2, "model.d_model": 64}), store.url)
    assert store.names() == before
    with pytest.raises(UserError, match="nowhere is not a run folder"):
        load_run(f"file://{tmp_path}/bucket/nowhere", cache_dir=str(tmp_path / "cache"))


def test_two_processes_do_not_train_in_one_folder(store, tmp_path, monkeypatch):
    monkeypatch.setattr(Lease, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(Lease, "LOST_SECONDS", 1.0)
    with Lease(store), pytest.raises(UserError, match="another process is training"):
        loop.train(config_in(tmp_path), store.url)


def test_a_local_folder_has_no_mirror(tmp_path):
    with remote_folder.mirrored(None, tmp_path, processes.Group.alone()) as mirror:
        assert mirror is None
    remote_folder.keep(tmp_path, tmp_path / "nothing.png")
