"""Text to batches: sources, repair, tokenizers, a cache of tokens, the order of training. And synthetic tasks (``synthetic``).

    dataset = data.prepare(config, seed=0)
    batch = dataset.train_batch(step)                    # a pure function of (seed, step)
    data.save_validation(dataset, workdir)               # all that eval.py needs of the data
    for batch in data.load_validation(workdir).batches(16, 256): ...

Knows no model and imports no JAX.
"""

from seqmodels.data.dataset import (
    RECORD_NAME,
    TEXT,
    DataConfig,
    Dataset,
    is_another,
    prepare,
    read_record,
    save_validation,
    validation_from_source,
)
from seqmodels.data.tasks.batches import HeldOut, TaskDataset, held_out
from seqmodels.data.text.tokenizer import Tokenizer, load_tokenizer, prompt_tokens, token_mask
from seqmodels.data.text.tokenizer import digest as tokenizer_digest
from seqmodels.data.text.unicode import well_formed
from seqmodels.data.text.validation import ValidationSet, few_documents, load_validation

__all__ = [
    "RECORD_NAME",
    "TEXT",
    "DataConfig",
    "Dataset",
    "HeldOut",
    "TaskDataset",
    "Tokenizer",
    "ValidationSet",
    "few_documents",
    "held_out",
    "is_another",
    "load_tokenizer",
    "load_validation",
    "prepare",
    "prompt_tokens",
    "read_record",
    "save_validation",
    "token_mask",
    "tokenizer_digest",
    "validation_from_source",
    "well_formed",
]
