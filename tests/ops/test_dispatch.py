"""What an op resolved to is recorded when it is traced, for whoever asked; chunk sizes come from one table."""

import jax
import jax.numpy as jnp
import pytest

from seqmodels import ops
from seqmodels.ops.dispatch import CHUNK_SIZES

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
    table = CHUNK_SIZES["delta_rule"][device]

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
    assert all(set(sizes) >= {"cpu", "tpu", "gpu"} for sizes in CHUNK_SIZES.values())


def attend(dtype=jnp.bfloat16, **options):
    x = jax.ShapeDtypeStruct((1, 512, 2, 64), dtype)
    return choices_of(lambda x: ops.gated_linear_attention(x, x, x, **options), x)


def test_a_kernel_is_named_with_its_chunks_and_a_call_that_leaves_it_says_why():
    with ops.interpret("tpu"):
        assert attend() == ["gated_linear_attention: pallas tpu/gated_linear_attention (chunk 128)"]
        assert attend(chunk_size=32) == ["gated_linear_attention: pallas tpu/gated_linear_attention (chunk 32)"]
        assert attend(implementation="chunked") == ["gated_linear_attention: chunked (chunk 64)"]
        (left,) = attend(dtype=jnp.float16)
        assert left == (
            "gated_linear_attention: pallas tpu/chunk_scan (chunk 64), not tpu/gated_linear_attention: "
            "q is float16, neither bfloat16 nor float32"
        )


def test_a_chunk_size_that_a_kernel_would_ignore_leaves_it():
    x, A, B = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 256, 128), (128, 16), (1, 256, 16)))

    def scan(**options):
        return choices_of(lambda x, A, B: ops.selective_scan(x, x, A, B, B, **options), x, A, B)

    with ops.interpret("tpu"):
        (line,) = attend(chunk_size=10)
        assert "tpu/chunk_scan (chunk 10), not tpu/gated_linear_attention: its chunks have 16, 32, 64" in line
        assert scan() == ["selective_scan: pallas tpu/selective_scan"]
        assert scan(chunk_size=32) == [
            "selective_scan: chunked (chunk 32), not tpu/selective_scan: chunk_size=32, and the kernel has no chunks to choose"
        ]
        with pytest.raises(NotImplementedError, match="chunk_size=32, and the kernel has no chunks"):
            scan(chunk_size=32, implementation="pallas")


def test_a_device_without_kernels_gives_no_reasons():
    assert attend() == ["gated_linear_attention: chunked (chunk 64)"]
    with pytest.raises(NotImplementedError, match="no Pallas kernel for this device"):
        attend(implementation="pallas")
