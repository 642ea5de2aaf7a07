"""MAD's tasks of giving tokens back (arXiv:2403.17844): ``configs/copying.py:<setting>``.

    python train.py --config=configs/copying.py:selective_copying --workdir=runs/copying --config.model.pattern="gla mlp"

Settings: selective_copying, compression, memorization. Over there the rate is 1e-4, 5e-4 or 1e-3 and the weight decay 0 or
0.1, the best kept; accuracy is the mean over classes (here over labels), and a task's score the mean over the baseline,
which is the setting here, and changes of one thing at a time (override config.data.tasks.<task> and data.seq_len).
"""

from configs import probes


def get_config(setting: str = "selective_copying"):
    return probes.configured(setting, SETTINGS)


def _compression(config):
    probes.mad("compression", 32)(config)
    config.model.readout = "last"


def _memorization(config):
    """256 examples: two batches an epoch."""
    probes.mad("memorization", 32)(config)
    config.train.steps = 400


SETTINGS = {
    "selective_copying": probes.mad("selective_copying", 256),
    "compression": _compression,
    "memorization": _memorization,
}
