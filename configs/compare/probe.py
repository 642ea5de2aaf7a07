"""Mixers on a synthetic task: accuracy beside what the state costs. ``configs/compare/probe.py:<setting>``.

    python scripts/compare.py --config=configs/compare/probe.py:mqar_sweep --workdir=runs/compare_mqar --mixers=attention,gla,mamba

The settings are those of configs/recall.py, configs/copying.py and configs/state_tracking.py. Sizes are the setting's for
every mixer (--config.match=params makes them alike). In most a mixer's name stands for one layer of it, without an MLP.
The test's examples may be longer than those of training: accuracy is drawn against length.
"""

from configs import copying, recall, state_tracking
from configs.compare import base
from seqmodels.errors import UserError

SETTINGS = {setting: module for module in (recall, copying, state_tracking) for setting in module.SETTINGS}


def get_config(setting: str = "mqar_sweep"):
    if setting not in SETTINGS:
        raise UserError(f"there is no setting {setting!r}; known: {', '.join(SETTINGS)}")
    config = base.get_config(SETTINGS[setting].get_config(setting))
    run = config.base
    run.train.keep_checkpoints = 1
    rate = run.optim.learning_rate
    config.match = "none"
    config.mixers = "attention, linear_attention, deltanet, gla, mamba, lstm"
    config.learning_rates = (rate / 4, rate, rate * 4)
    config.contexts = (256, 1024)
    return config
