"""A file is written whole or not at all, and whoever reads the old one goes on reading it."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from seqmodels.data import atomic
from seqmodels.data.atomic import check_file_name, disk_errors_as_user_errors, write_whole
from seqmodels.errors import UserError


def test_the_new_content_takes_the_name_and_the_old_stays_with_its_readers(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with open(path, "rb") as reader:
        write_whole(path, lambda file: file.write(b"new content"))
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new content"


def test_a_name_may_be_as_long_as_names_can_be(tmp_path):
    path = tmp_path / ("é" * 127)
    write_whole(path, lambda file: file.write(b"content"))
    assert path.read_bytes() == b"content" and list(tmp_path.iterdir()) == [path]


def test_an_error_of_a_write_names_the_file(tmp_path):
    """The system says which file cannot be opened, but not which cannot be written to, read from or synced."""

    def fail(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError) as failed:
        write_whole(tmp_path / "file", fail)
    assert failed.value.filename == str(tmp_path / "file") and list(tmp_path.iterdir()) == []


def test_a_writer_that_fails_leaves_the_old_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_whole(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "code, message",
    [(errno.ENOSPC, "no space left in 'X'"), (errno.EACCES, r"cannot write in 'X' .Permission denied")],
)
def test_what_the_disk_refuses_names_what_to_change(code, message):
    with (
        pytest.raises(UserError, match=f"{message}.*another data.cache_dir"),
        disk_errors_as_user_errors("data.cache_dir", "X"),
    ):
        raise OSError(code, "Permission denied")


def test_the_cause_is_named_and_not_another_place(tmp_path):
    for error, message in (
        (OSError(errno.EMFILE, "Too many open files", str(tmp_path / "x")), "too many open files: raise the limit"),
        (OSError(errno.EIO, "Input/output error", str(tmp_path / "x")), "the disk reports an input/output error"),
        (PermissionError(errno.EACCES, "Permission denied", "/elsewhere/corpus.txt"), "'/elsewhere/corpus.txt': permission"),
    ):
        with pytest.raises(UserError, match=message) as raised, disk_errors_as_user_errors("data.cache_dir", tmp_path):
            raise error
        assert "cannot write" not in str(raised.value) and "set another" not in str(raised.value)


def special_files(folder):
    """One of each kind of thing that is not a regular file, and links to them; a device cannot be made without being root."""
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
    (folder / "device").symlink_to("/dev/null")
    for name in ("folder", "pipe", "socket"):
        (folder / f"link_to_{name}").symlink_to(folder / name)
    return sorted(path for path in folder.iterdir())


def test_nothing_but_a_regular_file_is_replaced(tmp_path):
    for path in special_files(tmp_path):
        before = path.lstat()
        with pytest.raises(UserError, match="give the name of a file"):
            write_whole(path, lambda file: file.write(b"new"))
        assert path.lstat() == before and not list(tmp_path.glob(".*")), path


@pytest.mark.parametrize("name", ["new/", "new/.", "new/..", "", "old/"])
def test_no_file_appears_where_a_folder_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").write_text("old")
    with pytest.raises(UserError, match="name of a folder"):
        write_whole(name, lambda file: file.write(b"new"))
    assert os.listdir(tmp_path) == ["old"] and (tmp_path / "old").read_text() == "old"


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path):
    (tmp_path / "file").write_text("kept")
    for target in ("file", "nothing"):
        (tmp_path / f"link_to_{target}").symlink_to(tmp_path / target)
        write_whole(tmp_path / f"link_to_{target}", lambda file: file.write(b"new"))
        assert (tmp_path / f"link_to_{target}").read_text() == "new"
    assert (tmp_path / "file").read_text() == "kept" and not (tmp_path / "nothing").exists()


def test_what_is_written_to_and_not_replaced_may_be_a_device(tmp_path):
    assert check_file_name("/dev/null", replaced=False) == Path("/dev/null")
    with pytest.raises(UserError, match="is a folder"):
        check_file_name(tmp_path, replaced=False)


def test_a_name_is_given_only_to_what_has_reached_the_disk(tmp_path, monkeypatch):
    """In order: the content of every file, the names in its folder, the new name, and the folder that has it."""
    done = []
    fsync, replace, rename = os.fsync, os.replace, os.rename
    monkeypatch.setattr(os, "fsync", lambda d: (done.append(os.readlink(f"/proc/self/fd/{d}")), fsync(d)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("renamed"), replace(a, b)))
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append("renamed"), rename(a, b)))
    atomic.write_text(tmp_path / "file", "text")
    assert [os.path.basename(each)[:6] for each in done] == [".file.", "rename", tmp_path.name[:6]]
    done.clear()
    (tmp_path / "building/deep").mkdir(parents=True)
    for name in ("building/a", "building/deep/b"):
        (tmp_path / name).write_text("text")
    atomic.rename_folder(tmp_path / "building", tmp_path / "whole")
    *before, renamed, last = [each.removeprefix(f"{tmp_path}/") for each in done]
    assert set(before) == {"building/a", "building", "building/deep", "building/deep/b"}
    assert before.index("building/deep/b") < before.index("building/deep") < before.index("building")
    assert (renamed, last) == ("renamed", str(tmp_path))
    assert (tmp_path / "whole/deep/b").read_text() == "text"


def test_a_lock_is_held_by_one_and_ends_with_it(tmp_path, capsys):
    path = tmp_path / "a.lock"
    with atomic.lock(path) as is_held:
        assert is_held
        os.utime(path, (0, 0))  # no clock matters
        with atomic.lock(path, waiting=None) as other:
            assert not other
    with atomic.lock(path, waiting=None) as is_held:
        assert is_held
    assert capsys.readouterr().err == ""


def test_who_waits_for_a_lock_says_so_and_gets_it(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import fcntl, time\nfile = open({str(tmp_path / 'a')!r}, 'ab')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
         "print('held', flush=True)\ntime.sleep(20)"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    said = []

    def kill(line, **options):
        said.append(line)
        holder.kill()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, "say", kill)
        with atomic.lock(tmp_path / "a", waiting="waiting for it") as is_held:
            assert is_held and said == ["waiting for it"]
    holder.communicate()


def test_without_locks_nobody_waits(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with atomic.lock(tmp_path / "a") as is_held:
        assert not is_held
