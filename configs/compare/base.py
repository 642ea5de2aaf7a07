"""The one complete config of a comparison: every field with its meaning. Others state only differences.

    python scripts/compare.py --config=configs/compare/toy.py --workdir=runs/compare --config.seeds=2

What is trained, on what and for how long is `config.base`, a complete training config (configs/base.py lists its fields):
--config.base.train.steps=100.
"""

from ml_collections.config_dict import ConfigDict


def get_config(base: ConfigDict) -> ConfigDict:
    config = ConfigDict()
    config.base = base  # of every run, but for the layers, the sizes, the learning rate and the seed
    config.mixers = "attention, linear_attention"  # names or patterns, commas between them; label=pattern names one
    config.match = "params"  # what all have alike: params, flops (of training, per token), state_bytes; none: the base's sizes
    config.tolerance = 0.01  # of the first mixer's, how far another may be from it
    config.control = True  # of text: compare the same model without a mixer, MLPs alone at the matched size, too
    config.learning_rates = (1e-3, 2e-3, 4e-3)  # tried for every mixer; one alone is taken as given
    config.rate_steps = 0  # optimizer steps of the runs that choose the rate, warm-up and decay shortened with them; 0: all
    config.rate_seeds = 2  # seeds per learning rate, from base.seed on
    config.rate_extensions = 3  # rates that may be added, each half (twice) the last, while the best is at an end of those tried
    config.check_rates = False  # train every rate tried at full length too: does the one that short runs choose win there?
    config.seeds = 3  # seeds at the best rate, from base.seed on
    config.validation_tokens = 0  # scored after each run: the even documents choose the rate, the odd ones are reported; 0: all
    config.contexts = (256, 1024, 4096)  # tokens read before a decoded token is timed
    config.decode_tokens = 64  # decoded and timed after each context
    return config
