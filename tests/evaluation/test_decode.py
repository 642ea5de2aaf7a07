"""Decode timing runs what `generate` runs: it goes on from the state that reading the context leaves, in every row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import model
from seqmodels.decoding import generate
from seqmodels.evaluation import decode
from seqmodels.evaluation.perplexity import state_bytes
from tests.configs import tiny
from tests.programs import fast_jit

pytestmark = pytest.mark.tools

VOCAB = 50


def build():
    config = tiny(**{"model.repeats": 2, "model.pattern": "attention linear_attention"}).model
    params = fast_jit(lambda key: model.init_params(config, VOCAB, key))(jax.random.key(0))
    return model.graphdef(config, VOCAB), params


@pytest.mark.parametrize("batch_size", [1, 3])
def test_measure(batch_size, monkeypatch):
    graphdef, params = build()
    monkeypatch.setattr(decode, "PREFILL_CHUNK", 4)
    told = {}

    def spy(graphdef, params, sampler, logits, state, **options):
        told.update(logits=logits, state=state)
        return real(graphdef, params, sampler, logits, state, **options)

    real = generate.decode
    monkeypatch.setattr(generate, "decode", spy)
    key = jax.random.key(1)
    speed = decode.measure(graphdef, params, VOCAB, batch_size=batch_size, context=9, tokens=5, rounds=1, key=key)
    assert (speed.batch_size, speed.context, speed.tokens) == (batch_size, 9, 5)
    assert speed.seconds_per_step > 0.0 and speed.compile_seconds > 0.0
    assert speed.tokens_per_second == pytest.approx(batch_size / speed.seconds_per_step)
    assert speed.prefill_tokens_per_second > 0.0
    assert speed.state_bytes == batch_size * state_bytes(graphdef, params, 14)

    prompt = jax.random.randint(key, (1, 9), 0, VOCAB, jnp.int32)
    expected, _ = fast_jit(lambda params: model.merge(graphdef, params)(prompt))(params)
    for row in told["logits"]:
        np.testing.assert_allclose(row, expected[0, -1], rtol=0, atol=1e-5)


def test_a_context_of_one_piece_is_timed_too():
    graphdef, params = build()
    speed = decode.measure(graphdef, params, VOCAB, context=3, tokens=2, rounds=1, key=jax.random.key(0))
    assert speed.prefill_tokens_per_second > 0.0
