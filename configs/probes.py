"""What the configs of synthetic tasks have alike: recall.py, copying.py, state_tracking.py."""

from collections.abc import Callable, Mapping

from ml_collections.config_dict import ConfigDict

from configs import base
from seqmodels.errors import UserError


def configured(setting: str, settings: Mapping[str, Callable[[ConfigDict], None]]) -> ConfigDict:
    """base.py with two layers of attention alone, changed by a setting.

    Raises:
      UserError: there is no such setting.
    """
    if setting not in settings:
        raise UserError(f"there is no setting {setting!r}; known: {', '.join(settings)}")
    config = base.get_config()
    config.model.pattern = "attention"
    config.model.repeats = 2
    config.optim.final_fraction = 0.0
    config.train.sample_every_steps = 0  # there is no text to write
    settings[setting](config)
    config.train.eval_every_steps = config.train.checkpoint_every_steps = max(1, config.train.steps // 10)
    return config


def mad(task: str, length: int) -> Callable[[ConfigDict], None]:
    """The setting of one of MAD's tasks (arXiv:2403.17844): 12,800 examples, 200 times, by two mixers and two MLPs."""

    def change(config: ConfigDict) -> None:
        config.data.task = task
        config.data.seq_len, config.data.batch_size = length, 128
        config.model.pattern = "attention mlp"
        config.model.mixers.attention.num_heads = 16
        config.train.steps = 200 * 12_800 // 128
        config.optim.learning_rate, config.optim.warmup_steps, config.optim.beta2 = 5e-4, 0, 0.999

    return change
