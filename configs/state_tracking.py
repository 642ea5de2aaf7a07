"""Tasks of keeping track of a state: ``configs/state_tracking.py:<setting>``.

    python train.py --config=configs/state_tracking.py:parity --workdir=runs/parity --config.model.pattern=lstm
    python eval.py --workdir=runs/parity --lengths=40,256,1024

Settings: parity and modular_arithmetic (arXiv:2405.04517), parity_small (a minute on one core), a5, s5 and z60 (words of
groups, arXiv:2404.08819), listops (a small one), listops_arena (the Long Range Arena's, arXiv:2011.04006).
"""

from configs import probes


def get_config(setting: str = "parity"):
    return probes.configured(setting, SETTINGS)


def _formal_language(task):
    """Trained to 40 tokens, tested to 256, as NX-AI/xlstm does."""

    def change(config):
        config.data.task = task
        config.data.seq_len, config.data.batch_size = 40, 256
        config.model.d_model = 64
        config.model.mixers.attention.num_heads = 1
        config.train.steps = 20_000
        config.optim.learning_rate, config.optim.warmup_steps, config.optim.final_fraction = 1e-3, 2_000, 1e-3

    return change


def _parity_small(config):
    """The parity of every prefix, trained to 40 tokens, tested to 80: with a label on the last token alone an LSTM needs longer."""
    _formal_language("parity")(config)
    config.data.tasks.parity.every, config.data.tasks.parity.test_lengths = True, (10, 20, 40, 80)
    config.data.batch_size, config.model.d_model, config.train.steps = 64, 32, 1_000
    config.optim.learning_rate, config.optim.warmup_steps = 5e-3, 100


def _group_word(group, elements, tests=()):
    """Words of so many elements, tested at others too. Over there width 512 and up to 500 epochs at a rate of 1e-4."""

    def change(config):
        config.data.task = "group_word"
        config.data.tasks.group_word.group = group
        config.data.tasks.group_word.test_lengths = tuple(1 + length for length in (elements, *tests))
        config.data.seq_len, config.data.batch_size = 1 + elements, 512
        config.train.steps = 10_000
        config.optim.learning_rate, config.optim.weight_decay = 1e-3, 0.01

    return change


def _listops(config):
    """Expressions of 51 to 255 tokens."""
    config.data.task = "listops"
    config.data.seq_len, config.data.batch_size = 256, 32
    config.data.tasks.listops.train_examples, config.data.tasks.listops.test_examples = 96_000, 2_000
    config.model.pattern = "attention mlp"
    config.train.steps = 5_000
    config.optim.learning_rate = 1e-3


def _listops_arena(config):
    """Expressions of 501 to 1,999 tokens. Over there the answer is read off a token of its own, in front."""
    _listops(config)
    config.data.seq_len = 2_000
    task = config.data.tasks.listops
    task.longer_than, task.max_depth, task.max_arguments = 500, 10, 10
    config.model.d_model, config.model.repeats, config.model.channel_layers.mlp.hidden = 512, 4, 1024
    config.model.mixers.attention.num_heads = 8
    config.optim.warmup_steps = 1_000


SETTINGS = {
    "parity": _formal_language("parity"),
    "parity_small": _parity_small,
    "modular_arithmetic": _formal_language("modular_arithmetic"),
    "a5": _group_word("A5", 12),
    "z60": _group_word("Z60", 12),
    "s5": _group_word("S5", 32, (64, 128, 256)),
    "listops": _listops,
    "listops_arena": _listops_arena,
}
