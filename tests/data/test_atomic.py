"""A file is written whole or not at all, and whoever reads the old one goes on reading it."""

import errno

import pytest

from seqmodels.data.atomic import disk_errors_as_user_errors, write_whole
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
