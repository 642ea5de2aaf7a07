"""--suite=meshes: what a training step does on one of eight devices, for every mixer and mesh, counted in the compiled program.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python scripts/benchmark.py --suite=meshes --out=benchmarks/results/meshes.json

Nothing is run or timed: virtual devices of a CPU say what a device computes, holds and sends. FLOPs, bytes of temporaries and
collectives are of one device and one step; a loop counts once. A row that stands in --out already, of the same commit, is not
counted again. tools/pages/meshes.py makes docs/meshes.md of them.
"""

import argparse
import collections
import json
import math

import jax
import jax.numpy as jnp

from benchmarks import hlo
from benchmarks.timing import Progress, names_out_of, positive, write_results
from configs import base
from seqmodels import mixers
from seqmodels.circumstances import circumstances
from seqmodels.config import RunConfig, from_config_dict
from seqmodels.errors import UserError
from seqmodels.training import sharding
from seqmodels.training.state import Trainer

MESHES = {
    "one": {},
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "data x fsdp": {"data": 2, "fsdp": 4},
    "data x fsdp x tensor": {"data": 2, "fsdp": 2, "tensor": 2},
}
SEQUENCE = {"sequence": {"sequence": 8}}
VOCAB_SIZE = 256


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mixers", type=names_out_of("mixer", mixers.names()), default=",".join(mixers.names()), help="whose models"
    )
    known = MESHES | SEQUENCE
    parser.add_argument("--meshes", type=names_out_of("mesh", known), default=",".join(MESHES), help=f"of {', '.join(known)}")
    parser.add_argument("--width", type=positive, default=64, help="of the residual stream")
    parser.add_argument("--seq_len", type=positive, default=64, help="tokens of a row")
    parser.add_argument("--batch_size", type=positive, default=16, help="rows of a batch, over all devices")


def run(options: argparse.Namespace) -> dict:
    most = max(math.prod((MESHES | SEQUENCE)[name].values()) for name in options.meshes)
    if len(jax.devices()) < most:
        raise UserError(
            f"--suite=meshes wants {most} devices and there are {len(jax.devices())}: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={most}"
        )
    commit = circumstances()["commit"]
    found = json.loads(options.out.read_text(encoding="utf-8")) if options.out and options.out.exists() else {}
    results = {"rows": [], "before": []} | {name: found[name] for name in ("rows", "before") if name in found}
    rows = results["rows"]
    wanted = [
        {
            "mixer": mixer,
            "mesh": mesh,
            "width": options.width,
            "seq_len": options.seq_len,
            "batch_size": options.batch_size,
            "commit": commit,
        }  # fmt: skip
        for mixer in options.mixers
        for mesh in options.meshes
    ]
    wanted = [row for row in wanted if not any(row.items() <= other.items() for other in rows)]
    clock = Progress({f"{row['mixer']}, {row['mesh']}": 1.0 for row in wanted})
    header = f"  {'':40s}{'MFLOP':>9s}{'KiB temporary':>15s}{'KiB moved':>11s}{'in loops':>10s}{'gathered whole':>16s}"
    print(f"\n{header}   (per device)")
    for row in wanted:
        name = f"{row['mixer']}, {row['mesh']}"
        clock.start(name)
        row |= measure(row)
        rows.append(row)
        write_results(options.out, results)
        if "error" in row:
            print(f"  {name:40s} {row['error']}", flush=True)
            continue
        print(
            f"  {name:40s}{row['flops'] / 1e6:9.2f}{row['temporary_bytes'] / 1024:15.0f}"
            f"{sum(row['collective_bytes'].values()) / 1024:11.0f}{sum(row['in_loops'].values()):10d}"
            f"{row['rematerialisations']:16d}", flush=True,
        )  # fmt: skip
    return results


def measure(row: dict) -> dict:
    """The figures of one device: FLOPs, bytes of temporaries, arguments and collectives, and what is whole on each device."""
    sizes = (MESHES | SEQUENCE)[row["mesh"]]
    try:
        trainer = Trainer(run_config(row), VOCAB_SIZE, jax.devices()[: math.prod(sizes.values())])
    except UserError as error:
        return {"error": str(error)}
    shape = (row["batch_size"], row["seq_len"])
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=trainer.batch_sharding) for name in ("inputs", "targets")}
    lowered = trainer.trace(batch).lower()
    try:
        with hlo.compiler_messages() as messages:
            # How machine code is optimised changes none of the figures.
            compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error).splitlines()[0][:200]}
    memory = compiled.memory_analysis()
    count, moved, loops = (collections.Counter() for _ in range(3))
    found = hlo.collectives(compiled.as_text())
    for each in found:
        count[each.kind] += 1
        moved[each.kind] += each.bytes
        loops[each.kind] += each.in_loop
    return {
        "flops": compiled.cost_analysis()["flops"],
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "collectives": dict(count),
        "collective_bytes": dict(moved),
        "in_loops": dict(+loops),
        "rematerialisations": len(hlo.rematerialisations(messages)),
        "parameters": trainer.num_parameters,
        "largest_collective": max((each.bytes for each in found), default=0),
        "whole_bytes": sum(sharding.replicated(trainer.abstract_state()["params"], trainer.mesh).values()),
    }


def run_config(row: dict) -> RunConfig:
    """The config of a row: one repeat of the mixer's block."""
    config = base.get_config()
    config.data.source, config.data.tokenizer = "toy", "bytes"
    config.data.seq_len, config.data.batch_size = row["seq_len"], row["batch_size"]
    config.model.d_model, config.model.repeats, config.model.pattern = row["width"], 1, mixers.pattern(row["mixer"])
    config.mesh.update({axis: 1 for axis in sharding.AXES} | (MESHES | SEQUENCE)[row["mesh"]])
    return from_config_dict(config)
