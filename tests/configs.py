"""Small complete configs for tests: base.py with the sizes turned down."""

from configs import base
from seqmodels.config import RunConfig, from_config_dict
from seqmodels.pattern import channel_layers_in_pattern, load_layer, mixers_in_pattern

START = {"model.branch_rms": base.get_config().model.branch_rms}  # the start that runs have


def tiny(**overrides) -> RunConfig:
    """A RunConfig of width 32 on bytes of the toy source. ``tiny(**{"model.repeats": 1})`` changes fields.

    Without what takes most of a short run's time: the forward pass that scales the branches (`START` has it), an evaluation of
    131,072 tokens, a sample of the text.
    """
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
        "model.branch_rms": None,
        "optim.warmup_steps": 2,
        "train.steps": 10,
        "train.eval_tokens": 512,
        "train.sample_every_steps": 0,
    } | overrides
    config.update_from_flattened_dict(settings)
    return from_config_dict(config)


def layer_configs(pattern: str, **options) -> dict[str, tuple]:
    """``mixers`` and ``channel_layers`` of a ModelConfig: defaults, of the mixers with ``options``."""
    return {
        "mixers": tuple((name, load_layer(name).Config(**options)) for name in mixers_in_pattern(pattern)),
        "channel_layers": tuple((name, load_layer(name).Config()) for name in channel_layers_in_pattern(pattern)),
    }
