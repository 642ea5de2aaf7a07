"""Entry points keep the memory they free: a step's temporaries are not cleared by the kernel again and again."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from seqmodels import command_line

kept = command_line.keep_freed_memory() if sys.argv[1] == "keep" else None
if kept is False:
    sys.exit(77)
step = jax.jit(lambda x: x * 2)  # 128 MiB, freed when the result is dropped
x = jnp.ones((2**10, 2**15))
faults = []
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""


def page_faults_of_a_step(mode: str) -> int:
    result = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, timeout=300)
    if result.returncode == 77:
        pytest.skip("this system's malloc has no such setting")
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def test_a_step_touches_no_fresh_pages():
    fresh = page_faults_of_a_step("default")
    assert fresh > 10_000, "the program no longer shows what the setting is for"
    assert page_faults_of_a_step("keep") < fresh / 20
