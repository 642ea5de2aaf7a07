"""Programs of tests that need eight devices: XLA makes a CPU's when a process first asks for them, so they run in one of their own."""

import json
import os
import pathlib
import subprocess
import sys


def on_eight_devices(module: str, *arguments: str) -> list[dict]:
    """The JSON lines that ``python -m module arguments...`` prints on eight virtual CPU devices.

    It compiles every program itself, because some of them read what the compiler says.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=pathlib.Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
