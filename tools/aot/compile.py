"""The worker of ``python -m tools.aot``: compiles cases for one chip and writes what came of each as a line of JSON.

    python -m tools.aot.compile CHIP REPORT_FOLDER CASE [CASE ...]

``__main__.py`` starts it, with the environment that makes the compilers write their reports, and again after a case at which one
of them crashed or did not end. A line ``{"case": ...}`` alone says that a case has begun.
"""

import json
import shutil
import sys
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp

from seqmodels import ops
from seqmodels.training import flops, topologies
from seqmodels.training.state import Trainer
from tools.aot import reports
from tools.aot.cases import CASES, CHIPS, PIECES, STEPS, UNOPTIMISED_ON_TPU, Chip, step_config


def main(chip_name: str, folder: str, *names: str) -> None:
    chip = CHIPS[chip_name]
    devices = topologies.devices(chip.kind, chip.count)
    for name in names:
        say({"case": name})
        unoptimised = chip.device == "tpu" and name in UNOPTIMISED_ON_TPU
        jax.config.update("jax_optimization_level", "O0" if unoptimised else "UNKNOWN")
        begun = time.process_time()
        try:
            with ops.compile_for(chip.device):
                result = step(name, chip, devices[0]) if name in STEPS else kernels(name, chip, devices[0], Path(folder))
        except Exception as error:  # the compiler's: what it did not like is in its first lines
            traceback.print_exc()
            result = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        say({"case": name} | result | {"seconds": time.process_time() - begun})


def say(result: dict) -> None:
    print(json.dumps(result), flush=True)


def kernels(name: str, chip: Chip, device: jax.Device, folder: Path) -> dict:
    """An op's gradient with respect to all of its floating point inputs, and so its forward pass as well."""
    case = CASES[name]
    marks = {key: x for key, x in case.inputs.items() if x.dtype == jnp.bool_}
    inputs = {key: x for key, x in case.inputs.items() if key not in marks}

    def gradient(inputs, marks):
        (output, state), pull = jax.vjp(lambda inputs: case.run(**inputs, **marks), inputs)
        # A cotangent that is not a constant; a cache has counters, too.
        cotangent = jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.inexact) else _no_cotangent(x), state)
        return output, pull((output, cotangent))[0]

    place = jax.sharding.SingleDeviceSharding(device)
    try:
        traced = jax.jit(gradient, in_shardings=place, out_shardings=place).trace(inputs, marks)
    except NotImplementedError as lacking:
        return {"kind": "op", "lacks": str(lacking)}
    shutil.rmtree(folder)
    folder.mkdir()
    compiled = traced.lower(lowering_platforms=(chip.platform,)).compile(chip.options)
    known = list(flops.kernels(traced.jaxpr.jaxpr))
    if chip.device == "tpu":
        found = reports.of_tpu(compiled.as_text(), folder, known)
    else:
        found = reports.of_gpu(folder, known)
    return {"kind": "op", "temp_bytes": compiled.memory_analysis().temp_size_in_bytes, "kernels": found}


def _no_cotangent(x):
    return jnp.zeros(x.shape, jax.dtypes.float0)


def step(name: str, chip: Chip, device: jax.Device) -> dict:
    """A whole training step on one device."""
    config = step_config(name)
    trainer = Trainer(config, PIECES, devices=[device])
    tokens = jax.ShapeDtypeStruct((config.data.batch_size, config.data.seq_len), jnp.int32)
    with ops.record_choices() as choices:
        traced = trainer.trace({"inputs": tokens, "targets": tokens})
    compiled = traced.lower(lowering_platforms=(chip.platform,)).compile(chip.options)
    memory, program = compiled.memory_analysis(), compiled.as_text()
    return {
        "kind": "step",
        "choices": list(choices),
        "num_kernels": program.count('custom_call_target="tpu_custom_call"') + program.count("mosaic_gpu_v2"),
        "parameters": trainer.num_parameters,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
