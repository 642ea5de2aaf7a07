"""Does the learning rate that short runs choose win at full length? Four mixers, every rate at both lengths, two seeds.

    python scripts/compare.py --config=configs/compare/rate_length.py --workdir=runs/rate_length --config.base.data.source=PATH

The setting is that of configs/compare/tinystories_small.py; in the folder of such a comparison its runs are used, and its report
is written anew by its own command. The report's section on the search has the table: what the choice loses, beside the
deviation between seeds. --config.rate_steps=N asks it of another length.
"""

from configs.compare import tinystories_small


def get_config():
    config = tinystories_small.get_config()
    config.mixers = "attention, gated_deltanet, mamba2, lstm"
    config.check_rates = True
    config.control = False
    return config
