"""What may stand in the place of a file or a folder that a program expects."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def in_its_place(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Removes what is there, and makes something else of its name."""

    def replace(path: Path) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return replace


OF_ANOTHER_KIND = {
    "a folder": in_its_place(Path.mkdir),
    "a pipe": in_its_place(os.mkfifo),
    "a device": in_its_place(lambda path: path.symlink_to("/dev/zero")),
    "a link to nothing": in_its_place(lambda path: path.symlink_to("/nowhere/at/all")),
    "a link to itself": in_its_place(lambda path: path.symlink_to(path.name)),
    "no bytes": in_its_place(lambda path: path.write_bytes(b"")),
}
