"""Tasks of looking something up in what was read: ``configs/recall.py:<setting>``.

    python train.py --config=configs/recall.py:mqar_small --workdir=runs/mqar --config.model.pattern=attention

A setting says what the task is and how long it is trained on; ``config.model.pattern`` says by what. Loss and accuracy
count the labelled positions alone. Settings: mqar_small and mqar_sweep (a minute on one core), mqar, mqar_a and mqar_b
(the published ones), induction, and MAD's in_context_recall, fuzzy_recall and noisy_recall.

Multi-query associative recall is learnt by two layers without MLPs, as in its papers. There, attention has learned
positions, here rotary ones; there, layer 0 of setting B is a convolution, here it is the mixer.
"""

from configs import probes


def get_config(setting: str = "mqar_small"):
    return probes.configured(setting, SETTINGS)


def _mqar_small(config):
    """4 pairs in 32 tokens, 64 tokens in the vocabulary."""
    config.data.task = "mqar"
    config.data.seq_len, config.data.batch_size = 32, 128
    config.data.tasks.mqar.vocab_size = 64
    config.data.tasks.mqar.pairs = 4
    config.model.d_model = 64
    config.train.steps = 1500
    config.optim.learning_rate = 1.5e-3


def _mqar_sweep(config):
    """2 to 16 pairs in 64 tokens, in turns: for many mixers on a CPU (configs/compare/probe.py:mqar_sweep)."""
    config.data.task = "mqar"
    config.data.seq_len, config.data.batch_size = 64, 64
    config.data.tasks.mqar.vocab_size = 256
    config.data.tasks.mqar.train_mix = tuple((64, pairs, 0) for pairs in (2, 4, 8, 16))
    config.data.tasks.mqar.test_mix = tuple((64, pairs, 512) for pairs in (2, 4, 8, 16))
    config.model.d_model = 64
    config.train.steps = 1000
    config.optim.learning_rate = 6e-3


def _mqar(config):
    """A size between: 16 pairs in 256 tokens, 8,192 tokens in the vocabulary."""
    config.data.task = "mqar"
    config.data.seq_len, config.data.batch_size = 256, 64
    config.data.tasks.mqar.pairs = 16
    config.train.steps = 5000


def _mqar_a(config):
    """Setting A (arXiv:2312.04927, figure 2) at (L, K) = (64, 4); (128, 8), (256, 16) and (512, 64) by overrides.

    Over there d_model is 64, 128, 256 or 512, the rate 1e-4, 4.6e-4, 2.2e-3 or 1e-2, the best kept; the batch is 256 at L
    256 and 128 at L 512; the rate falls once an epoch, and training stops at an accuracy of 0.99.
    """
    config.data.task = "mqar"
    config.data.seq_len, config.data.batch_size = 64, 512
    task = config.data.tasks.mqar
    task.pairs, task.random_non_queries = 4, False
    task.train_examples, task.test_examples = 100_000, 3_000
    config.model.mixers.attention.num_heads = 1
    config.model.dropout = 0.1
    config.train.steps = 64 * (100_000 // 512)
    config.optim.learning_rate, config.optim.warmup_steps, config.optim.beta2 = 2.2e-3, 0, 0.999


def _mqar_b(config):
    """Setting B (arXiv:2402.18668, figure 2): a mixed training set, and a test that goes on to 1,024 tokens, 256 pairs.

    Over there the rate is 1e-3, 3.2e-3, 1e-2 or 3.2e-2, the best kept, and falls once an epoch.
    """
    config.data.task = "mqar"
    config.data.seq_len, config.data.batch_size = 256, 256
    sizes = ((64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000), (256, 64, 20_000))
    tests = (64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)
    config.data.tasks.mqar.train_mix = sizes
    config.data.tasks.mqar.test_mix = tuple((length, pairs, 1_000) for length, pairs in tests)
    config.model.mixers.attention.num_heads = 2
    config.train.steps = 32 * sum(examples // 256 for _, _, examples in sizes)
    config.optim.learning_rate, config.optim.warmup_steps, config.optim.beta2 = 3.2e-3, 0, 0.999


def _induction(config):
    """256 tokens, tested to 4,096. Over there the batch is 8."""
    config.data.task = "induction"
    config.data.seq_len, config.data.batch_size = 256, 32
    config.model.d_model = 64
    config.train.steps = 10_000
    config.optim.learning_rate = 1e-3


SETTINGS = {
    "mqar_small": _mqar_small,
    "mqar_sweep": _mqar_sweep,
    "mqar": _mqar,
    "mqar_a": _mqar_a,
    "mqar_b": _mqar_b,
    "induction": _induction,
    "in_context_recall": probes.mad("in_context_recall", 128),
    "fuzzy_recall": probes.mad("fuzzy_recall", 128),
    "noisy_recall": probes.mad("noisy_recall", 128),
}
