"""A step with kernels in their interpreter, on one device and on a mesh of eight:
``python -m tests.training.kernels_program``, JSON lines.
"""

import contextlib
import json

import jax
import numpy as np

from seqmodels import ops
from seqmodels.training.state import Trainer
from tests.configs import START, tiny

MESHES = {"xla": (1, 1, 1), "one": (1, 1, 1), "mesh": (2, 2, 2)}


def measure(name: str) -> dict:
    """Loss, the gradient of a parameter that all devices share, and which forms ran."""
    inputs = np.random.default_rng(0).integers(0, 48, (8, 16)).astype(np.int32)
    sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), MESHES[name]))
    with contextlib.nullcontext() if name == "xla" else ops.interpret("tpu"), ops.record_choices() as choices:
        config = tiny(**START | {"model.pattern": "mamba hgrn", "model.repeats": 1, "data.seq_len": 16}, **sizes)
        trainer = Trainer(config, 48, jax.devices()[: np.prod(MESHES[name])])
        state, metrics = trainer.train_step(trainer.init(), trainer.put({"inputs": inputs, "targets": (inputs * 7 + 1) % 48}))
    mean_gradient = state["optimizer"][1][0].mu["layers"]["0_mamba"]["layer"]["A_log"]
    return {"loss": float(metrics["loss"]), "gradient": np.asarray(mean_gradient).ravel().tolist(), "choices": list(choices)}


if __name__ == "__main__":
    for each in MESHES:
        print(json.dumps({"name": each} | measure(each)), flush=True)
