"""Small complete configs for tests: base.py with the sizes turned down."""

from configs import base
from seqmodels.config import RunConfig, from_config_dict


def tiny(**overrides) -> RunConfig:
    """A RunConfig of width 32 on bytes of the toy source. ``tiny(**{"model.repeats": 1})`` changes fields."""
    config = base.get_config()
    config.lock()
    settings = {
        "data.source": "toy",
        "data.tokenizer": "bytes",
        "data.seq_len": 32,
        "data.batch_size": 8,
        "data.toy_documents": 200,
        "model.d_model": 32,
        "model.repeats": 2,
        "optim.warmup_steps": 2,
        "train.steps": 10,
    } | overrides
    config.update_from_flattened_dict(settings)
    return from_config_dict(config)
