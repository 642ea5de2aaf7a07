"""Objects are whole and known by name; of several processes one holds the lock, however the one before it ended."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from seqmodels import object_store
from seqmodels.errors import UserError
from seqmodels.object_store import Lease, ObjectStore


@pytest.fixture(scope="module")
def s3():
    """The URL of a bucket of a server that speaks Amazon's protocol, on this machine."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
        pytest.skip("pip install 'moto[server]' for the tests on S3's protocol")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    program = f"from moto.server import main; main(['-p', '{endpoint.rpartition(':')[2]}'])"
    server = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    environment = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            for _ in range(300):
                try:
                    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT"))
                    break
                except OSError:
                    time.sleep(0.1)
            yield "s3://bucket"
        finally:
            server.terminate()
            server.wait()


@pytest.fixture(params=["file", "s3"])
def store(request, tmp_path):
    place = f"file://{tmp_path}" if request.param == "file" else request.getfixturevalue("s3")
    return ObjectStore(f"{place}/runs/{request.node.name.partition('[')[0]}")


def test_objects_by_name(store, tmp_path):
    (tmp_path / "large").write_bytes(b"x" * 3_000_000)
    store.write_files([("checkpoints/1/a", tmp_path / "large"), ("b", tmp_path / "large"), ("c", tmp_path / "vanished")])
    store.write("checkpoints/10/a", b"")
    assert store.names() == ["b", "checkpoints/1/a", "checkpoints/10/a"]
    assert store.names("checkpoints/1/") == ["checkpoints/1/a"]
    assert store.read("b")[0] == b"x" * 3_000_000 and store.read("checkpoints/10/a")[0] == b""
    assert store.read("c")[0] is None
    store.delete(["b", "c"])
    assert store.names() == ["checkpoints/1/a", "checkpoints/10/a"]


def test_a_conditional_write_is_of_what_was_read(store):
    _, absent = store.read("a")
    first = store.write("a", b"1", if_generation=absent)
    assert first is not None and store.write("a", b"2", if_generation=absent) is None
    assert store.write("a", b"3", if_generation=first) is not None
    assert store.write("a", b"4", if_generation=first) is None and store.read("a")[0] == b"3"


@pytest.mark.parametrize("url", ["gs://bucket", "http://a/b", "s3://b/x", "s3:///x"])
def test_what_is_no_place_in_a_store_is_one_line(url):
    with pytest.raises(UserError, match=url) as error:
        ObjectStore(url)
    assert "\n" not in str(error.value)


def test_a_server_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(object_store, "_FIRST_RETRIES", 0)
    for name, value in {"ENDPOINT_URL": "http://127.0.0.1:9", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with pytest.raises(UserError, match="s3://bucket/run cannot be reached") as error:
        ObjectStore("s3://bucket/run")
    assert "\n" not in str(error.value)


def test_an_object_whose_name_leads_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a\\b").touch()
    with pytest.raises(UserError, match="whose name"):
        ObjectStore(f"file://{tmp_path}/run").names()


def test_a_url_stays_a_url_and_a_path_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    assert object_store.workdir("gs://bucket/run") == "gs://bucket/run"
    assert object_store.workdir("~/run") == object_store.local("~/run") == Path("/home/x/run")
    with pytest.raises(UserError, match="train.init_from=s3://a/b must be a folder"):
        object_store.local("s3://a/b", "train.init_from")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(Lease, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(Lease, "LOST_SECONDS", 1.0)


def test_the_lock_is_one_process_s_and_ends_with_it(store, quick, capsys):
    with Lease(store) as first:
        with pytest.raises(UserError, match=f"another process is training.*process {os.getpid()}"):
            Lease(store).__enter__()
        first.check()
    assert store.names() == []
    with Lease(store):
        assert store.names() == [Lease.NAME]
    assert "ignores" not in capsys.readouterr().err


def killed_lease(store, monkeypatch):
    """A lock that is held and no longer beats."""
    with monkeypatch.context() as patch:
        patch.setattr(Lease, "_beat_until_ended", lambda self: None)
        return Lease(store).__enter__()


def test_the_lock_of_a_process_that_was_killed_is_taken_over(store, quick, monkeypatch):
    killed = killed_lease(store, monkeypatch)
    with Lease(store) as second:
        second.check()
        with pytest.raises(UserError, match="taken over"):
            killed.check()
        killed.__exit__()
        assert store.read(Lease.NAME)[0] is not None  # the second's, which the first must not delete
        second.check()


def test_a_process_that_is_known_to_have_ended_is_not_waited_for(store, quick, monkeypatch):
    killed = killed_lease(store, monkeypatch)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited"))
    with Lease(store, former=killed.owner):
        pass


def test_a_store_that_ignores_conditions_is_said(tmp_path, quick, monkeypatch, capsys):
    store = ObjectStore(f"file://{tmp_path}/run")
    write = store.write
    monkeypatch.setattr(store, "write", lambda name, content, **condition: write(name, content))
    with Lease(store):
        pass
    assert "ignores conditional writes" in capsys.readouterr().err


def test_a_beat_that_was_sent_twice_is_still_ours(store, quick, monkeypatch):
    with Lease(store) as lease:
        write = store.write

        def twice(name, content, **condition):
            write(name, content, **condition)
            return write(name, content, **condition)

        monkeypatch.setattr(store, "write", twice)
        lease.check()
        monkeypatch.undo()
        lease.check()
