"""Training with time split over eight virtual devices: ``python -m tests.training.sequence_program T MIXER...``, JSON lines.

By mixer: bytes of temporaries on a device by the compiled step, with one device and with eight, and the losses of two steps.
"""

import json
import sys

import jax
import numpy as np

from benchmarks import hlo
from seqmodels.training.state import Trainer
from tests.configs import tiny
from tests.programs import compiler_options

VOCAB = 48


def measure(mixer: str, steps: int) -> dict:
    """One row of a batch, packed with documents."""
    inputs = np.random.default_rng(0).integers(0, VOCAB, (1, steps)).astype(np.int32)
    starts = np.random.default_rng(1).random((1, steps)) < 8 / steps
    batch = {"inputs": inputs, "targets": (inputs * 7 + 1) % VOCAB, "reset": starts}
    row = {"mixer": mixer}
    for devices in (1, 8):
        layers = {"model.pattern": mixer, "model.repeats": 1, "model.branch_rms": None}
        sizes = {"data.batch_size": 1, "data.seq_len": steps, "mesh.sequence": devices}
        trainer = Trainer(tiny(**layers, **sizes), VOCAB, jax.devices()[:devices])
        state, batch_there = trainer.init(), trainer.put(batch)
        with hlo.compiler_messages() as messages:
            compiled = trainer.trace(batch_there).lower().compile(compiler_options=compiler_options())
        losses = []
        for _ in range(2):
            state, metrics = compiled(state, batch_there, trainer.peak_rate)
            losses.append(float(metrics["loss"]))
        found = hlo.collectives(compiled.as_text())
        row[str(devices)] = {
            "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "losses": losses,
            "largest_collective": max((each.bytes for each in found), default=0),
            "in_loops": [[each.kind, each.shapes] for each in found if each.in_loop],
            "rematerialisations": hlo.rematerialisations(messages),
        }
    return row


if __name__ == "__main__":
    for each in sys.argv[2:]:
        print(json.dumps(measure(each, int(sys.argv[1]))), flush=True)
