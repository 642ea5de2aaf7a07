"""TinyStories on two CPU cores: 1.3 million parameters, 2 million tokens, at most 8 minutes a run.

    python scripts/compare.py --config=configs/compare/tinystories_small.py --workdir=runs/compare --config.base.data.source=PATH

The learning rate is chosen by runs of a quarter of the length, two seeds each; then two seeds at full length. The same command
goes on after a kill, and with --mixers=attention,NAMES it does these alone, in the same folder: done runs are not done again.
"""

from configs import tinystories
from configs.compare import base
from seqmodels import mixers


def get_config():
    config = base.get_config(tinystories.get_config())
    config.mixers = ", ".join(("attention", *(name for name in mixers.names() if name != "attention")))
    config.learning_rates = (4e-3, 8e-3, 16e-3)
    config.rate_steps = 120  # x 16 x 256 tokens
    config.seeds = 2
    config.validation_tokens = 262_144
    config.base.model.mixers.mamba2.head_dim = 16  # of 32 only widths that are multiples of 16 can be had; none matches
    config.base.train.sample_every_steps = 0
    config.base.train.keep_checkpoints = 1
    return config
