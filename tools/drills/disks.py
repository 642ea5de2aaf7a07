"""Disks that are full or read-only, and a home folder that is not there."""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import eval as eval_program
from tools.drills.interruptions import reference
from tools.drills.trials import Count, Place, in_child, outcome, train_in_child


def full_disk(place: Place) -> Count:
    """A disk of a uniform size that fills up while a run trains: one line and exit status 1; with more space, the same end."""
    expected, _ = reference(place)
    count = Count()
    needed = sum(path.stat().st_size for path in (place.folder / "reference").rglob("*") if path.is_file())
    for _ in range(place.some(2, 20)):
        kibibytes = place.draw.randint(16, 2 * needed // 1024)
        with small_disk(place, kibibytes) as disk:
            if disk is None:
                count.left_out = "mounting a small disk is not permitted here"
                return count
            first = train_in_child(place.flags(disk / "run"))
            resize(disk, "64m")
            again = train_in_child(place.flags(disk / "run"))
            what = f"{kibibytes} KiB"
            if first.code and not first.in_one_line:
                count.record(False, f"{what}: exit status {first.code}: {first.err[-200:]}")
            elif again.code:
                count.record(False, f"{what}, then 64 MiB: exit status {again.code}: {again.err[-200:]}")
            else:
                count.record(outcome(disk / "run") == expected, f"{what}, then 64 MiB: another end than that of a run left alone")
    return count


def small_files(place: Place) -> Count:
    """No file may grow beyond a uniform size (RLIMIT_FSIZE): one line and exit status 1; without the limit, the same end."""
    expected, _ = reference(place)
    count = Count()
    largest = max(path.stat().st_size for path in (place.folder / "reference").rglob("*") if path.is_file())
    for _ in range(place.some(1, 20)):
        most = place.draw.randint(1, largest)
        workdir = place.new("small") / "run"
        first = train_in_child(place.flags(workdir), limit=(resource.RLIMIT_FSIZE, most))
        again = train_in_child(place.flags(workdir))
        if first.code and not first.in_one_line:
            count.record(False, f"files of {most} bytes: exit status {first.code}: {first.err[-200:]}")
        elif again.code:
            count.record(False, f"files of {most} bytes, then any: exit status {again.code}: {again.err[-200:]}")
        else:
            count.record(outcome(workdir) == expected, f"files of {most} bytes, then any: another end")
        shutil.rmtree(workdir.parent)
    return count


def read_only_disk(place: Place) -> Count:
    """A run folder that cannot be written: it is read all the same; what would be written says so in one line."""
    reference(place)
    count = Count()
    with small_disk(place, 65536) as disk:
        if disk is None:
            count.left_out = "mounting a small disk is not permitted here"
            return count
        shutil.copytree(place.folder / "reference", disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        caches = [f"--compilation_cache_dir={place.folder / 'programs'}"]

        def evaluate() -> None:
            sys.argv = ["eval.py", f"--workdir={disk / 'run'}", *caches]
            eval_program.main()

        def load() -> None:
            from seqmodels.run import load_run

            print(load_run(disk / "run").fingerprint)

        opened, evaluated = in_child(load), in_child(evaluate)
        count.record(opened.code == 0, f"load_run: exit status {opened.code}: {opened.err[-200:]}")
        count.record(evaluated.in_one_line, f"eval.py: exit status {evaluated.code}: {evaluated.err[-200:]}")
        trained = train_in_child(place.flags(disk / "new"))
        count.record(trained.in_one_line, f"train.py in it: exit status {trained.code}: {trained.err[-200:]}")
        cached = train_in_child(place.flags(place.new("cache") / "run", data__cache_dir=disk / "tokens"))
        count.record(cached.in_one_line, f"data.cache_dir in it: exit status {cached.code}: {cached.err[-200:]}")
    return count


def no_home(place: Place) -> Count:
    """HOME is not set, or is no folder that can be written: the caches' defaults are below it, and nothing is a traceback."""
    count = Count()
    for home in (None, "/nonexistent/home", "/dev/null", "")[: place.some(2, 4)]:
        flags = [flag for flag in place.flags(place.new("home") / "run") if "cache_dir" not in flag]
        caches = {"XDG_CACHE_HOME": None, "JAX_COMPILATION_CACHE_DIR": str(place.folder / "programs")}
        # Where HOME is not set, ~ is what the system has for this user; tokens go to a folder of the drill instead.
        flags += [] if home else [f"--config.data.cache_dir={place.folder / 'tokens'}"]
        ended = train_in_child(flags, environment={"HOME": home} | caches)
        count.record(ended.code == 0 or ended.in_one_line, f"HOME={home!r}: exit status {ended.code}: {ended.err[-200:]}")
    return count


@contextlib.contextmanager
def small_disk(place: Place, kibibytes: int) -> Iterator[Path | None]:
    """A file system in memory of that size; None where this process may not mount one."""
    disk = place.new("disk")
    mounted = (
        os.geteuid() == 0
        and shutil.which("mount") is not None
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", disk], capture_output=True
        ).returncode
    )
    try:
        yield disk if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", disk], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
