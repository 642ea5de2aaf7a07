"""What an op resolved to is recorded when it is traced, for whoever asked; chunk sizes come from one table."""

import jax
import jax.numpy as jnp
import pytest

from seqmodels import ops
from seqmodels.ops import tuning

T = 40
X = jax.ShapeDtypeStruct((1, T, 1, 8), jnp.float32)
GATE = jax.ShapeDtypeStruct((1, T, 1), jnp.float32)


def choices_of(function, *arguments):
    with ops.record_choices() as choices:
        jax.eval_shape(function, *arguments)
    return list(choices)


def test_each_choice_once_in_order():
    def hybrid(x, gate):
        for _ in range(2):
            x = ops.gated_linear_attention(x, x, x)[0]
            x = ops.delta_rule(x, x, x, gate, implementation="recurrent")[0]
        return ops.softmax_attention(x, x, x)

    assert choices_of(hybrid, X, GATE) == [
        "gated_linear_attention: chunked (chunk 40)",
        "delta_rule: recurrent",
        "softmax_attention: chunked",
    ]


def test_only_tracing_chooses_and_only_inside():
    run = jax.jit(lambda x: ops.gated_linear_attention(x, x, x)[0])
    x = jnp.ones(X.shape)
    with ops.record_choices() as outer:
        with ops.record_choices() as inner:
            run(x)
        with ops.record_choices() as again:
            run(x)
    with ops.record_choices() as later:
        pass
    jax.eval_shape(lambda x: ops.linear_recurrence(x, x), x)
    assert list(outer) == list(inner) == ["gated_linear_attention: chunked (chunk 40)"]
    assert not again and not later


@pytest.mark.parametrize("device", ["cpu", "tpu", "gpu"])
def test_a_chunk_is_the_tables_or_as_asked_and_no_longer_than_the_sequence(device):
    table = tuning.CHUNK_SIZES["delta_rule"][device]

    def chunks(steps, chunk_size):
        x, gate = (jax.ShapeDtypeStruct((1, steps, *like.shape[2:]), jnp.float32) for like in (X, GATE))
        with ops.compile_for(device):
            return choices_of(
                lambda x, gate: ops.delta_rule(x, x, x, gate, implementation="chunked", chunk_size=chunk_size), x, gate
            )

    assert chunks(1000, None) == [f"delta_rule: chunked (chunk {table})"]
    assert chunks(1000, 7) == ["delta_rule: chunked (chunk 7)"]
    assert chunks(5, None) == chunks(5, 7) == ["delta_rule: chunked (chunk 5)"]


def test_every_table_knows_every_device():
    assert all(set(sizes) == {"cpu", "tpu", "gpu"} for sizes in tuning.CHUNK_SIZES.values())
