"""Rotary positions against other people's numbers, and the law that makes them useful."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.ops.rotary import document_positions, rotary
from seqmodels.ops.softmax_attention import softmax_attention
from tests.goldens import load
from tests.programs import fast_jit


def close(actual, expected, tolerance=2e-6):
    np.testing.assert_allclose(np.asarray(actual, np.float64), np.asarray(expected, np.float64), atol=tolerance, rtol=0)


def draw(shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


@pytest.mark.parametrize("side", ["q", "k"])
def test_golden_rotations(side):
    golden = load("rope")
    x, T = golden.arrays[side], golden.arrays[side].shape[1]
    start = jnp.full((x.shape[0],), golden.entry["offset"], jnp.int32)
    close(rotary(x, document_positions(T)), golden.arrays[f"{side}_rot"])
    close(rotary(x, document_positions(T, start=start)), golden.arrays[f"{side}_rot_off"])
    close(rotary(x, document_positions(T), interleaved=True), golden.arrays[f"{side}_rot_interleaved"])


def test_golden_attention_on_rotated_queries_and_keys():
    arrays = load("rope").arrays
    positions = document_positions(arrays["q"].shape[1])

    def run(q, k, v):
        q, k = rotary(q, positions), rotary(k, positions)
        return softmax_attention(q * q.shape[-1] ** -0.5, k, v)[0], q, k

    @fast_jit
    def run_and_pull(q, k, v, cotangents):
        outputs, pull_back = jax.vjp(run, q, k, v)
        return outputs, pull_back(cotangents)

    cotangents = tuple(arrays[f"cot_{name}"] for name in ("o", "q_rot", "k_rot"))
    outputs, gradients = run_and_pull(arrays["q"], arrays["k"], arrays["v"], cotangents)
    for output, name in zip(outputs, ("o", "q_rot", "k_rot"), strict=True):
        close(output, arrays[name])
    for gradient, letter in zip(gradients, "qkv", strict=True):
        close(gradient, arrays[f"grad_{letter}"], 5e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_products_depend_on_distance_alone(interleaved):
    q, k = draw((2, 1, 5, 1, 16))

    def products(shift):
        turned = (rotary(x, document_positions(5) + shift, interleaved=interleaved) for x in (q, k))
        return jnp.einsum("bthk,bshk->ts", *turned)

    near, far = products(0), products(1000)
    close(near, far, 2e-3)  # angles of 1000 radians have an error of 6e-5 in float32
    assert np.max(np.abs(near - jnp.einsum("bthk,bshk->ts", q, k))) > 0.1


def test_frequencies_of_ones_own():
    x, positions = draw((2, 7, 3, 8)), document_positions(7)
    close(rotary(x, positions, frequencies=10000.0 ** -(jnp.arange(4) / 4)), rotary(x, positions))
    close(rotary(x, positions, base=100.0, frequencies=jnp.zeros(4)), x)
    with pytest.raises(ValueError, match="4 pairs"):
        rotary(x, positions, frequencies=jnp.zeros(8))
    with pytest.raises(ValueError, match="must be even"):
        rotary(x[..., :7], positions)


def test_bfloat16_is_turned_by_float32_angles():
    """Position 1001 has no bfloat16: rounded before the angle, the fastest pair would turn by radians too far."""
    x = draw((1, 1, 1, 8), jnp.bfloat16)
    position = jnp.full((1, 1), 1001, jnp.int32)
    turned = rotary(x, position)
    assert turned.dtype == jnp.bfloat16
    close(turned, rotary(x.astype(jnp.float32), position), 0.02)


def test_positions_count_from_the_start_of_the_document():
    reset = jnp.array([[0, 0, 1, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], bool)
    start = jnp.array([3, 8, 5], jnp.int32)
    expected = [[3, 4, 0, 1, 0], [8, 9, 10, 11, 12], [0, 1, 2, 3, 4]]
    np.testing.assert_array_equal(document_positions(5, start=start, reset=reset), expected)
    np.testing.assert_array_equal(document_positions(5), [[0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(document_positions(5, start=start), np.array(start)[:, None] + np.arange(5))


def test_cosines_are_computed_once_for_all_rows_and_heads():
    """XLA's CPU compiler would put them into the loop over q: B H = 32 times as many, which took a tenth of a training step."""
    q = draw((8, 64, 4, 16))
    program = jax.jit(lambda q: rotary(q, document_positions(q.shape[1])).transpose(0, 2, 1, 3)).lower(q).compile().as_text()
    computed = re.findall(r"f32\[([\d,]+)\]\S* (?:cosine|sine)\(", program)
    assert computed and all(np.prod([int(n) for n in shape.split(",")]) == 64 * 8 for shape in computed)
    # What holds a cosine is an array of that size: it is read from memory, not computed anew, by what turns q.
    loops = [text for text in program.split("\n\n") if " cosine(" in text or " sine(" in text]
    roots = [re.search(r"ROOT \S+ = f32\[([\d,]+)\]", text)[1] for text in loops]
    assert all(np.prod([int(n) for n in shape.split(",")]) == 64 * 8 for shape in roots)
