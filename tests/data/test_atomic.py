"""A file is written whole or not at all, and whoever reads the old one goes on reading it."""

import errno
import os
import socket
from pathlib import Path

import pytest

from seqmodels.data.atomic import check_file_name, disk_errors_as_user_errors, write_whole
from seqmodels.errors import UserError


def test_the_new_content_takes_the_name_and_the_old_stays_with_its_readers(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with open(path, "rb") as reader:
        write_whole(path, lambda file: file.write(b"new content"))
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new content"


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
