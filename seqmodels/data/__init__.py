"""Text to batches: sources, repair, tokenizers, a cache of tokens, the order of training.

    dataset = data.prepare(config, seed=0)
    batch = dataset.train_batch(step)                    # a pure function of (seed, step)
    data.save_validation(dataset, workdir)               # all that eval.py needs of the data
    for batch in data.load_validation(workdir).batches(16, 256): ...

Knows no model and imports no JAX.
"""

from seqmodels.data.dataset import DataConfig, Dataset, prepare, save_validation, validation_from_source
from seqmodels.data.tokenizer import Tokenizer, load_tokenizer, prompt_tokens
from seqmodels.data.validation import ValidationSet, load_validation

__all__ = [
    "DataConfig",
    "Dataset",
    "Tokenizer",
    "ValidationSet",
    "load_tokenizer",
    "load_validation",
    "prepare",
    "prompt_tokens",
    "save_validation",
    "validation_from_source",
]
