"""Hybrids: Mamba-2, attention and MLPs in the published order of Waleffe et al. (arXiv 2406.07887), and two simpler kinds.

    python train.py --config=configs/hybrid.py:small --workdir=runs/hybrid          2 million tokens, like configs/tinystories.py
    python train.py --config=configs/hybrid.py:published --workdir=runs/hybrid_8b   the sizes of the 8B model, for a large machine
    python train.py --config=configs/hybrid.py:swa --workdir=runs/swa               attention that sees 64 tokens and that sees all
    python train.py --config=configs/hybrid.py:parallel --workdir=runs/parallel     attention and Mamba-2 side by side

The published model has 56 layers: 24 Mamba-2 (M), 4 attention (*), 28 MLP (-). The small one is its first quarter, 14 layers
in the same proportions: 6, 1 and 7. Neither has positions (the Mamba layers tell the order). Deviation: the published
MLP is not gated and 4 d_model wide; ours is gated with as many parameters.

``swa`` alternates sliding windows with full attention (Gemma 2, arXiv 2408.00118, section 2); ``parallel`` reads each input by both
mixers and takes the mean of their normed outputs (after Hymba, arXiv 2411.13676).
"""

from configs import base
from seqmodels.errors import UserError

LAYERS = {"M": "mamba2", "*": "attention", "-": "mlp"}
PUBLISHED = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"
SIZES = ("small", "published", "swa", "parallel")
PATTERNS = {"swa": "attention(window=64) mlp attention mlp", "parallel": "attention+mamba2 mlp"}


def pattern(letters: str) -> str:
    """The published notation in the words of config.model.pattern."""
    return " ".join(LAYERS[letter] for letter in letters)


def get_config(size: str = "small"):
    if size not in SIZES:
        raise UserError(f"there is no hybrid {size!r}; known: {', '.join(SIZES)}")
    config = base.get_config()
    if size in PATTERNS:
        config.model.pattern = PATTERNS[size]
        config.model.repeats = 8 // len(PATTERNS[size].split())  # eight layers, like configs/tinystories.py
    else:
        config.model.pattern = pattern(PUBLISHED[:14] if size == "small" else PUBLISHED)
        config.model.repeats = 1
        config.model.mixers.attention.rope = False
    if size != "published":
        config.train.steps = 490  # x 16 x 256 = 2.007 million tokens
        config.train.eval_every_steps = 70
        config.train.checkpoint_every_steps = 70
        return config
    config.model.d_model = 4096
    config.model.mixers.attention.num_heads = 32
    config.model.mixers.attention.num_kv_heads = 8
    config.model.mixers.mamba2.d_state = 128
    config.model.mixers.mamba2.head_dim = 64
    config.model.mixers.mamba2.num_groups = 8
    config.model.tie_embeddings = False
    config.model.compute_dtype = "bfloat16"
    config.model.remat = True
    config.data.vocab_size = 256_000
    config.data.seq_len = 4096
    config.data.batch_size = 32
    config.optim.learning_rate = 2.5e-4
    config.optim.final_fraction = 0.1
    return config
