"""Every mixer on meshes of eight virtual devices: ``python -m tests.training.eight_devices MIXER[:VOCABULARY]...``, JSON lines.

By mixer and mesh: the largest differences of loss, hidden states and gradients from one device, and what the compiled program does
on a device. A process of its own, since XLA makes its devices when a process first asks for them.
"""

import json
import math
import sys
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import hlo
from benchmarks.suites.meshes import MESHES
from seqmodels import model, ops
from seqmodels.config import MeshConfig
from seqmodels.training import sharding
from seqmodels.training.loss import cross_entropy_and_correct
from tests.configs import tiny
from tests.programs import compiler_options, fast_jit

VOCAB = 48
CAP = 5.0  # of the logits
ROWS = 8 * 11  # sizes that are multiples of it hold all rows: no other size is a multiple of 11, and
TIME = 7  # rows x steps of a device are no multiple of 8


def config(mixer: str) -> model.ModelConfig:
    """One layer of a mixer, in float32."""
    return tiny(**{"model.pattern": mixer, "model.repeats": 1, "model.branch_rms": None}).model


def compile_gradient(graphdef, shapes, mesh, batch: dict):
    """(parameters, batch) -> ((loss, (hidden states, correct)), gradients), where training has them; and XLA's messages."""

    def gradient(params, batch):
        def mean_loss(params, weights):
            network = model.merge(graphdef, params)
            hidden, _ = network.features(batch["inputs"])
            head = network.head_kernel()
            total, correct, weight = cross_entropy_and_correct(hidden, head, batch["targets"], weights, logit_cap=CAP)
            return total / weight, (hidden, correct)

        with ops.on_mesh(mesh):
            results, (gradients, of_weights) = jax.value_and_grad(mean_loss, argnums=(0, 1), has_aux=True)(
                params, batch["weights"]
            )
            return results, gradients | {"weights": of_weights}

    places, rows = sharding.tree_shardings(shapes, mesh), NamedSharding(mesh, sharding.BATCH)
    whole = NamedSharding(mesh, PartitionSpec())
    # Hidden states lie where the model has them: told to give rows, XLA would split rows all through it.
    jitted = jax.jit(gradient, in_shardings=(places, rows), out_shardings=((whole, (None, whole)), places | {"weights": rows}))
    lowered = jitted.lower(shapes, batch)
    with hlo.compiler_messages() as messages:
        compiled = lowered.compile(compiler_options=compiler_options())
    return compiled, messages, places, rows


def difference(expected, found) -> float:
    """The largest, relative to the largest number expected."""
    expected, found = np.asarray(expected), np.asarray(found)
    return float(np.abs(expected - found).max() / (np.abs(expected).max() or 1.0))


def measure(mixer: str, vocab_size: int) -> list[dict]:
    """A row for each mesh."""
    random = np.random.default_rng(0)
    inputs = random.integers(0, vocab_size, (ROWS, TIME)).astype(np.int32)
    weights = random.uniform(0.5, 1.5, (ROWS, TIME)).astype(np.float32)
    batch = {"inputs": inputs, "targets": (inputs * 7 + 1) % vocab_size, "weights": weights}
    network = config(mixer)
    graphdef, shapes = model.graphdef(network, vocab_size), model.param_shapes(network, vocab_size)
    params = fast_jit(model.init_params, static_argnums=(0, 1))(network, vocab_size, jax.random.key(0))
    reference = None
    rows = []
    for name, sizes in MESHES.items():
        started = time.process_time()
        devices = jax.devices()[: math.prod(sizes.values())]
        mesh = sharding.make_mesh(MeshConfig(**dict.fromkeys(sharding.AXES, 1) | sizes), devices)
        compiled, messages, places, by_row = compile_gradient(graphdef, shapes, mesh, batch)
        (loss, (hidden, correct)), gradients = compiled(jax.device_put(params, places), jax.device_put(batch, by_row))
        by_path = {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}
        reference = reference or (loss, hidden, by_path, correct)
        errors = {path: difference(reference[2][path], leaf) for path, leaf in by_path.items()}
        found = hlo.collectives(compiled.as_text())
        whole = [each for each in found if any(size and size % ROWS == 0 for _, shape in each.shapes for size in shape)]
        rows.append({
            "mixer": mixer, "mesh": name, "flops": compiled.cost_analysis()["flops"],
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "loss": difference(reference[0], loss), "hidden": difference(reference[1], hidden),
            "correct": difference(reference[3], correct),
            "gradient": max(errors.values()), "gradient_of": max(errors, key=errors.get),
            "whole_batch": [[each.kind, each.shapes] for each in whole],
            "in_loops": [[each.kind, each.shapes] for each in found if each.in_loop],
            "rematerialisations": hlo.rematerialisations(messages),
            "cpu_seconds": time.process_time() - started,
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    for each in sys.argv[1:]:
        name, _, vocabulary = each.partition(":")
        for found in measure(name, int(vocabulary or VOCAB)):
            print(json.dumps(found | {"mixer": each}), flush=True)
