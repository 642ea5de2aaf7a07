"""A training process asks for huge pages by starting again, once, and with the same command line."""

import os
import subprocess
import sys

import pytest

from seqmodels import huge_pages

PROGRAM = """
import os, resource, sys
from seqmodels import huge_pages

huge_pages.restart_with_huge_pages()
import jax, jax.numpy as jnp

step = jax.jit(lambda x: x * 2)  # 128 MiB, freed when the result is dropped
x = jnp.ones((2**10, 2**15))
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(os.getpid(), sys.argv[1:], faults)
"""


def run(tunables: str | None) -> int:
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    if tunables is not None:
        environment["GLIBC_TUNABLES"] = tunables
    command = [sys.executable, "-c", PROGRAM, "--flag=a b", ""]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    pid, rest = output.split(" ", 1)
    assert int(pid) == process.pid  # a signal to the process that was started reaches the one that trains
    arguments, faults = rest.rsplit(" ", 1)
    assert arguments == "['--flag=a b', '']"
    return int(faults)


@pytest.mark.tools
def test_small_pages_are_gone():
    setting = huge_pages.SYSTEM_SETTING
    if sys.platform != "linux" or not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("this system does not wait to be asked for huge pages")
    small = run(tunables="")
    assert small > 10_000, "the program no longer shows what huge pages are for"
    assert run(tunables=None) < small / 20


@pytest.mark.parametrize("setting", ["[always] madvise never\n", "always madvise [never]\n", None])
def test_no_restart_where_it_would_not_help(monkeypatch, tmp_path, setting):
    path = tmp_path / "enabled"
    if setting is not None:
        path.write_text(setting)
    monkeypatch.setattr(huge_pages, "SYSTEM_SETTING", path)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(os, "execv", lambda *arguments: pytest.fail("restarted"))
    huge_pages.restart_with_huge_pages()
    assert "GLIBC_TUNABLES" not in os.environ
