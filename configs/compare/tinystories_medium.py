"""TinyStories on one GPU, at the sizes of published points; a run is meant to take about an hour.

    python scripts/compare.py --config=configs/compare/tinystories_medium.py:256 --workdir=runs/compare_256
    python scripts/compare.py --config=configs/compare/tinystories_medium.py:512 --workdir=runs/compare_512
    python scripts/compare.py --config=configs/compare/tinystories_medium.py:cs336 --workdir=runs/compare_cs336

The first two have llama2.c's stories15M for a reference (width 288, 6 layers of 6 heads, MLP 768, 32,000 tokens), at its context of
256 and at 512, with its batch of 131,072 tokens, learning rate 5e-4 and dropout 0; it reached 1.072 nats (0.407 bits per
byte) after 100,000 steps, of which these do 2,500. The third is the model of Stanford's CS336, assignment 1 (width 512, 4 layers of 16
heads, MLP 1344, untied, 10,000 tokens, context 256) on its 327,680,000 tokens, where 1.45 nats (0.50 bits per byte) are asked for.
Their tokenizers and their validation texts are not ours: compare bits per byte. No GPU has run this yet; an H100 trains GLA of the
second's size on batches of 65,536 tokens at 1.28 million tokens/s (benchmarks/results/models_gpu.json): a run's steps would
take 4 to 5 minutes.
"""

from configs import tinystories
from configs.compare import base
from seqmodels.errors import UserError

SETTINGS = ("256", "512", "cs336")
MIXERS = "attention, mamba2, gated_deltanet, gla, mlstm, rwkv6, hgrn2, retnet"


def get_config(setting: str = "256"):
    if setting not in SETTINGS:
        raise UserError(f"there is no setting {setting!r}; known: {', '.join(SETTINGS)}")
    run = tinystories.get_config()
    run.model.compute_dtype = "bfloat16"
    run.optim.weight_decay = 0.1
    run.optim.schedule = "cosine"
    run.train.eval_tokens = 524_288
    run.train.eval_every_steps = 250
    run.train.checkpoint_every_steps = 500
    run.train.sample_every_steps = 0
    run.train.keep_checkpoints = 1
    if setting == "cs336":
        run.model.update(d_model=512, repeats=4)
        run.model.channel_layers.mlp.hidden = 1344
        heads, run.model.tie_embeddings = 16, False
        run.data.vocab_size, run.data.seq_len, run.data.batch_size = 10_000, 256, 256
        run.train.steps = 5_000  # x 65,536 = 327.68 million tokens
        run.optim.final_fraction = 0.0
        rates = (5e-4, 1e-3, 2e-3)
    else:
        run.model.update(d_model=288, repeats=6)
        run.model.channel_layers.mlp.hidden = 768
        heads = 6
        run.data.vocab_size, run.data.seq_len = 32_000, int(setting)
        run.data.batch_size = 131_072 // run.data.seq_len
        run.train.steps = 2_500  # x 131,072 = 327.68 million tokens, as many as CS336's
        run.optim.final_fraction = 0.0
        rates = (5e-4, 1e-3, 2e-3)
    for options in run.model.mixers.values():
        if "num_heads" in options:
            options.num_heads = heads
    run.optim.warmup_steps = run.train.steps // 50
    config = base.get_config(run)
    config.mixers = MIXERS
    config.learning_rates = rates
    config.rate_steps = run.train.steps // 10
    config.seeds = 3
    config.validation_tokens = 2_097_152
    return config
