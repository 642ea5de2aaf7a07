"""The tour: three mixers, three learning rates, two seeds on the built-in stories. No network, minutes on two CPU cores.

    python scripts/compare.py --config=configs/compare/toy.py --workdir=runs/compare_toy

The report is runs/compare_toy/report.html.
"""

from configs import demo
from configs.compare import base


def get_config():
    config = base.get_config(demo.get_config())
    config.mixers = "attention, gla, mamba"
    config.learning_rates = (3e-3, 6e-3, 12e-3)
    config.rate_seeds, config.rate_extensions = 1, 1  # a tour: in earnest, as in configs/compare/base.py
    config.seeds = 2
    config.contexts = (256, 1024)
    config.base.train.steps = 150  # x 8 x 256 tokens
    config.base.train.eval_every_steps = 25
    config.base.train.sample_every_steps = 0
    config.base.train.checkpoint_every_steps = 50
    config.base.train.keep_checkpoints = 1
    return config
