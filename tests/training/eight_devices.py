"""Every mixer on meshes of eight virtual devices: ``python -m tests.training.eight_devices MIXER...``, JSON lines.

By mixer and mesh: the largest differences of loss, hidden states and gradients from one device, and what the compiled program does
on a device. A process of its own, since XLA makes its devices when a process first asks for them.
"""

import json
import math
import sys
import time

import jax
import numpy as np

from benchmarks import hlo
from benchmarks.suites.meshes import MESHES
from seqmodels import model, ops
from seqmodels.training.loss import cross_entropy_and_correct
from seqmodels.training.sharding import AXES, path_name
from seqmodels.training.state import Trainer
from tests.configs import tiny
from tests.programs import compiler_options, fast_jit

VOCAB = 48
ROWS = 8 * 11  # sizes that are multiples of it hold all rows: no other size is a multiple of 11, and
TIME = 7  # rows x steps of a device are no multiple of 8


def config(mixer: str, sizes: dict[str, int]):
    """One layer of a mixer, in float32."""
    mesh = {f"mesh.{axis}": size for axis, size in (dict.fromkeys(AXES, 1) | sizes).items()}
    layers = {"model.pattern": mixer, "model.repeats": 1, "model.branch_rms": None}
    return tiny(**layers, **mesh, **{"data.batch_size": ROWS, "data.seq_len": TIME})


def compile_gradient(trainer: Trainer, batch: dict):
    """(parameters, batch) -> ((loss, hidden states), gradients), each where training has it; and XLA's messages."""

    def gradient(params, batch):
        def mean_loss(params):
            network = model.merge(trainer.graphdef, params)
            hidden, _ = network.features(batch["inputs"])
            total, _, weight = cross_entropy_and_correct(hidden, network.head_kernel(), batch["targets"])
            return total / weight, hidden

        with ops.on_mesh(trainer.mesh):
            return jax.value_and_grad(mean_loss, has_aux=True)(params)

    places = trainer.shardings["params"]
    jitted = jax.jit(
        gradient, in_shardings=(places, trainer.batch_sharding),
        out_shardings=((trainer.whole, trainer.batch_sharding), places),
    )  # fmt: skip
    lowered = jitted.lower(trainer.abstract_state()["params"], batch)
    with hlo.compiler_messages() as messages:
        compiled = lowered.compile(compiler_options=compiler_options())
    return compiled, messages


def difference(expected, found) -> float:
    """The largest, relative to the largest number expected."""
    expected, found = np.asarray(expected), np.asarray(found)
    return float(np.abs(expected - found).max() / (np.abs(expected).max() or 1.0))


def measure(mixer: str) -> list[dict]:
    """A row for each mesh."""
    inputs = np.random.default_rng(0).integers(0, VOCAB, (ROWS, TIME)).astype(np.int32)
    numbers = {"inputs": inputs, "targets": (inputs * 7 + 1) % VOCAB}
    params = reference = None
    rows = []
    for mesh, sizes in MESHES.items():
        started = time.process_time()
        trainer = Trainer(config(mixer, sizes), VOCAB, jax.devices()[: math.prod(sizes.values())])
        if params is None:
            params = fast_jit(model.init_params, static_argnums=(0, 1))(trainer.config.model, VOCAB, jax.random.key(0))
        batch = trainer.put(numbers)
        compiled, messages = compile_gradient(trainer, batch)
        (loss, hidden), gradients = compiled(jax.device_put(params, trainer.shardings["params"]), batch)
        by_path = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}
        reference = reference or (loss, hidden, by_path)
        errors = {path: difference(reference[2][path], leaf) for path, leaf in by_path.items()}
        found = hlo.collectives(compiled.as_text())
        whole = [each for each in found if any(size and size % ROWS == 0 for _, shape in each.shapes for size in shape)]
        rows.append({
            "mixer": mixer, "mesh": mesh, "flops": compiled.cost_analysis()["flops"],
            "loss": difference(reference[0], loss), "hidden": difference(reference[1], hidden),
            "gradient": max(errors.values()), "gradient_of": max(errors, key=errors.get),
            "whole_batch": [[each.kind, each.shapes] for each in whole],
            "in_loops": [[each.kind, each.shapes] for each in found if each.in_loop],
            "rematerialisations": hlo.rematerialisations(messages),
            "cpu_seconds": time.process_time() - started,
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for row in measure(name):
            print(json.dumps(row), flush=True)
