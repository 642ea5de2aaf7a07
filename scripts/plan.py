"""What a run would need and cost on devices that are not there, before they are rented.

    python scripts/plan.py --config=configs/hybrid.py:published --devices=v5e:256 --tokens=160e9 --price=1.2
    python scripts/plan.py --config=configs/tinystories.py:gla --devices=h200:8 --config.data.batch_size=64 --lower

For every mesh.data x mesh.fsdp x mesh.tensor over which the batch divides: bytes of parameters, optimizer, gradients and activations
on one device, whether they fit, and the bytes that a device receives in collectives. For the config's mesh, or else the best of
these: FLOPs per token, tokens a second at --utilisation of the data sheet's peak (a guess of yours: 0.4 by default), and with
--tokens and --price (of one device for an hour) time and price. All from shapes: nothing is allocated. --lower traces and lowers
the training step for all devices. --compile compiles it: for the devices asked for, where they are here or their compiler is
(v5e, v5p, v6e, h200: `make aot-venv`), else for as many CPU devices (XLA_FLAGS=--xla_force_host_platform_device_count=8 makes
virtual ones). The last line of stdout is one JSON object.
"""

import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone, uninstalled, in any directory

if __name__ == "__main__":  # ahead of imports that fail without the packages
    from seqmodels.packages import check_packages

    check_packages()

import jax

from benchmarks import hlo
from seqmodels import command_line, config_help, ops, ranges, screen
from seqmodels.config import MeshConfig, RunConfig, from_config_dict
from seqmodels.device_memory import gib
from seqmodels.errors import UserError
from seqmodels.escape import say
from seqmodels.training import run_folder, scale, topologies
from seqmodels.training.state import Trainer

NUMBERS = {"tokens": ranges.Positive, "utilisation": ranges.Probability, "price": ranges.Positive}
SHOWN = 12  # meshes
FLAGS = {
    "config": "a Python file with get_config(), or FILE:NAME for get_config(NAME)",
    "devices": "KIND:NUMBER, such as v5e:256",
    "utilisation": "the part of the data sheet's peak that is reached (default 0.4)",
    "tokens": "to train on (default those of the config's steps)",
    "price": "of one device for an hour",
    "lower": "trace and lower the training step for all devices",
    "compile": "compile it, for these devices or as many CPU devices",
}


def main(argv: Sequence[str]) -> None:
    asked = command_line.asked_for_help(argv)
    if asked is not None:
        config_help.say_help(asked, __doc__, FLAGS)
        return
    config, values = command_line.config_and_flags(
        argv, {"devices": None, "utilisation": "0.4", "tokens": "", "price": "", "lower": False, "compile": False}
    )
    for name, hint in NUMBERS.items():
        values[name] = ranges.parser(hint, name)(values[name]) if values[name] else None
    config, devices = from_config_dict(config), scale.parse_devices(values["devices"])

    data_vocab_size = run_folder.expected_vocab_size(config)
    plans = scale.plans(config, data_vocab_size, devices)
    best = chosen(config, plans) or plans[0]
    trainer = scale.abstract_trainer(config, data_vocab_size, MeshConfig(**best.mesh))
    summary = {
        "parameters": trainer.num_parameters, "flops_per_token": trainer.flops_per_token,
        "devices": values["devices"], "utilisation": values["utilisation"],
        "tokens_per_second": values["utilisation"] * devices.count * devices.flops_per_second / trainer.flops_per_token,
        "mesh": best.mesh, "fits": best.fits, "bytes_on_a_device": vars(best.memory), "bytes_received": best.sent,
    }  # fmt: skip
    tokens = values["tokens"] or config.train.steps * config.data.batch_size * config.data.seq_len
    hours = tokens / summary["tokens_per_second"] / 3600
    summary |= {"tokens": tokens, "hours": hours}
    if values["price"] is not None:
        summary["price"] = values["price"] * devices.count * hours
    report(plans, summary, devices)
    if values["lower"]:
        with screen.phase("tracing the training step"):
            summary["lowered"] = lowered(trainer, devices.platform)
    if values["compile"]:
        with screen.phase("compiling the training step"):
            summary["compiled"] = compiled(config, data_vocab_size, best, devices)
    print(json.dumps(summary))


def chosen(config: RunConfig, plans: list[scale.Plan]) -> scale.Plan | None:
    """The plan of the config's own mesh; None of the default one, or where there is none for so many devices.

    Raises:
        UserError: the config has a mesh, and it does not fit the devices.
    """
    sizes = {axis: getattr(config.mesh, axis) for axis in ("fsdp", "tensor") if getattr(config.mesh, axis) != 1}
    if config.mesh.data != -1:
        sizes["data"] = config.mesh.data
    if not sizes:
        return None
    for plan in plans:
        if sizes.items() <= plan.mesh.items():
            return plan
    asked = " ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    raise UserError(f"{asked} is no mesh of so many devices over which the batch divides; leave it out to see those that are")


def report(plans: list[scale.Plan], summary: dict, devices: scale.Devices) -> None:
    """For a person, on stderr."""
    say(f"{summary['parameters']:,} parameters, {summary['flops_per_token']:.3g} FLOPs per token of training")
    say(f"{devices.count} x {devices.kind}: {gib(devices.memory)} and {devices.flops_per_second:.3g} FLOP/s each")
    say(f"{'data':>6}{'fsdp':>6}{'tensor':>7}{'params':>13}{'optimizer':>13}{'gradients':>13}{'activations':>13}{'received':>13}")
    for plan in plans[:SHOWN]:
        parts = (gib(size) for size in (*vars(plan.memory).values(), sum(plan.sent.values())))
        sizes = f"{plan.mesh['data']:>6}{plan.mesh['fsdp']:>6}{plan.mesh['tensor']:>7}"
        say(sizes + "".join(f"{part:>13}" for part in parts) + ("" if plan.fits else "   does not fit"))
    if len(plans) > SHOWN:
        say(f"and {len(plans) - SHOWN} meshes more")
    price = f", {summary['price']:,.0f} at that price" if "price" in summary else ""
    say(
        f"at a utilisation of {summary['utilisation']:g}: {summary['tokens_per_second']:,.0f} tokens/s; {summary['tokens']:.3g} "
        f"tokens in {summary['hours']:,.1f} hours{price}"
    )
    if not plans[0].fits:
        say("no mesh fits: take more devices, a smaller data.batch_size, more optim.accumulation_steps, or model.remat")


def lowered(trainer: Trainer, platform: str) -> dict[str, float]:
    """The training step on a mesh without devices."""
    begun = time.perf_counter()
    text = scale.lower(trainer, platform).as_text()
    figures = {
        "seconds": time.perf_counter() - begun, "bytes": len(text),
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip
    say(
        f"lowered for {trainer.mesh.size} devices in {figures['seconds']:.1f} s: {len(text) / 2**20:.1f} MiB of StableHLO, "
        f"{gib(figures['peak_memory'])} of this process"
    )
    return figures


def compiled(config: RunConfig, data_vocab_size: int | None, plan: scale.Plan, wanted: scale.Devices) -> dict:
    """What XLA makes of it for `compiler_devices`: bytes of temporaries and, by kind, of collectives, on one device and step.

    Its FLOPs are XLA's, which counts the body of a loop once.

    Raises:
        UserError: the compiler refuses it, as where it does not fit, or there is no compiler.
    """
    devices = compiler_devices(wanted)
    trainer = scale.trainer_on(config, data_vocab_size, MeshConfig(**plan.mesh), devices)
    begun = time.perf_counter()
    with ops.record_choices() as choices:
        lowered = scale.lower(trainer, wanted.platform if devices[0].platform != "cpu" else "cpu")
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the step does not compile for {len(devices)} x {devices[0].device_kind}: {reason[:300]}") from error
    received = hlo.bytes_received(program.as_text())
    analysis = program.memory_analysis()
    figures = {
        "device": devices[0].device_kind, "seconds": time.perf_counter() - begun, "forms": list(choices),
        "temporary_bytes": analysis.temp_size_in_bytes, "argument_bytes": analysis.argument_size_in_bytes,
        "flops": (program.cost_analysis() or {}).get("flops"), "bytes_received": received,
    }  # fmt: skip
    say(f"compiled for {len(devices)} x {figures['device']} in {figures['seconds']:.0f} s")
    say(f"temporaries {gib(figures['temporary_bytes'])}; collectives {received}")
    return figures


def compiler_devices(wanted: scale.Devices) -> list[jax.Device]:
    """The devices here if they are enough and of that platform, else those of a compiler, else as many CPU devices.

    Raises:
        UserError: there are none of these.
    """
    here = jax.devices()
    platforms = {"tpu": "tpu", "gpu": "cuda"}
    if platforms.get(jax.default_backend()) == wanted.platform and len(here) >= wanted.count:
        return here[: wanted.count]
    lacking = topologies.unsupported_reason(wanted.kind, wanted.platform)
    if not lacking:
        return topologies.devices(wanted.kind, wanted.count)
    if len(here) >= wanted.count:
        say(f"{lacking}: compiling for {here[0].device_kind}")
        return here[: wanted.count]
    raise UserError(
        f"--compile: {lacking}; or XLA_FLAGS=--xla_force_host_platform_device_count={wanted.count} compiles for virtual CPU devices"
    )


if __name__ == "__main__":
    command_line.run(lambda: main(sys.argv))
