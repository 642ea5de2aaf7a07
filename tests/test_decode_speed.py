"""Decode timing runs what `generate` runs, and counts every row."""

import jax
import pytest

from seqmodels import model
from seqmodels.evaluation import decode
from tests.configs import tiny


@pytest.mark.parametrize("batch_size", [1, 3])
def test_measure(batch_size):
    config = tiny(**{"model.repeats": 1}).model
    params = model.init_params(config, 50, jax.random.key(0))
    speed = decode.measure(
        model.graphdef(config, 50), params, 50,
        batch_size=batch_size, context=9, tokens=5, rounds=1, key=jax.random.key(1),
    )  # fmt: skip
    assert (speed.batch_size, speed.context, speed.tokens) == (batch_size, 9, 5)
    assert speed.seconds_per_step > 0.0 and speed.compile_seconds > 0.0
    assert speed.tokens_per_second == pytest.approx(batch_size / speed.seconds_per_step)
