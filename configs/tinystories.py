"""Small language models on TinyStories, one per mixer: ``configs/tinystories.py:<name>``.

    python train.py --config=configs/tinystories.py:attention --workdir=runs/attention

Every name trains the same network (4 repeats of width 128, 4,096 BPE tokens) for 2 million tokens; only the
sequence mixer differs, and with it the MLP where the mixer's paper has none (two Mamba layers make one repeat).
README has the results. A local copy of the data: --config.data.source=PATH; without any network:
--config.data.source=toy.
"""

from configs import base
from seqmodels import mixers


def get_config(name: str = "attention"):
    config = base.get_config()
    config.model.pattern = mixers.pattern(name)  # an unknown name is an error that lists the known ones
    config.train.steps = 490  # x 16 x 256 = 2.007 million tokens
    config.train.eval_every_steps = 70
    config.train.checkpoint_every_steps = 70
    return config
