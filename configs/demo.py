"""`make demo`: small enough for two CPU cores and five minutes, on the embedded toy stories. No network.

    python train.py --config=configs/demo.py:attention --workdir=runs/demo/attention

The name after the colon is a mixer.
"""

from configs import base
from seqmodels import mixers


def get_config(name: str = "attention"):
    config = base.get_config()
    config.data.source = "toy"
    config.data.vocab_size = 1024
    config.data.batch_size = 8
    config.model.pattern = mixers.pattern(name)  # an unknown name is an error that lists the known ones
    config.model.repeats = 2
    config.optim.learning_rate = 3e-3
    config.train.steps = 300
    config.train.eval_every_steps = 50
    config.train.sample_every_steps = 100
    return config
