"""Attention whose time is split over devices: what a device holds and receives, read from compiled programs, and NaN isolation."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from seqmodels import ops
from seqmodels.ops.softmax_attention import init_cache
from seqmodels.training.sharding import AXES
from tests.eight_devices import on_eight_devices
from tests.ops.ring_program import CASES, G, K, V


@pytest.fixture(scope="module")
def rows():
    return on_eight_devices("tests.ops.ring_program")


def test_a_device_holds_its_share_of_the_keys(rows):
    """Nothing on it is as large as the keys of all steps, and what it holds grows as its share does."""
    for row in rows[: len(CASES)]:
        assert row["largest_array"] < row["steps"] * G * K, row
    assert rows[1]["temporary_bytes"] < 2 * rows[0]["temporary_bytes"]


def test_keys_and_values_go_round_once_each_way(rows):
    """Seven times a device's share; six times more for the gradients, as XLA keeps what came first; these seven times and home."""
    for row in rows[:2]:
        share = 4 * row["steps"] // 8 * G * (K + V)
        passed = (7 + 6 + 8) * share
        assert row["received"] == {"collective-permute": passed, "all-reduce": 4}, row


def test_a_window_receives_what_it_reaches(rows):
    """Keys and values of window - 1 steps and, back, their gradients, however long a text is."""
    for row in rows[2 : len(CASES)]:
        assert row["received"] == {"collective-permute": 2 * 4 * 32 * G * (K + V), "all-reduce": 4}, row


def test_nan_stays_in_its_document(rows):
    for row in rows[len(CASES) :]:
        assert row["bad"] > 0 and row["same_nan"] and row["difference"] < 1e-5, row


def test_the_form_is_recorded_and_others_say_what_is_missing():
    x = jax.ShapeDtypeStruct((1, 64, 2, 16), jnp.bfloat16)

    def trace(implementation=None):
        jax.eval_shape(functools.partial(ops.softmax_attention, implementation=implementation), x, x, x)

    with ops.on_mesh(AbstractMesh((1, 1, 1, 8), AXES)):
        with ops.record_choices() as choices:
            trace()
            with ops.interpret():
                trace()
        with pytest.raises(NotImplementedError, match="needs all keys on one device, and mesh.sequence splits them: use impl"):
            trace("parallel")
        with ops.interpret(), pytest.raises(NotImplementedError, match="sees no keys of other devices"):
            trace("pallas")
        token = jax.ShapeDtypeStruct((1, 1, 2, 16), jnp.float32)
        jax.eval_shape(ops.softmax_attention, *(token,) * 3, cache=init_cache(1, 8, 2, K, V))  # computed by all devices alike
    ring, reason = "softmax_attention in a ring of 8 devices: chunked", "splash attention sees no keys of other devices"
    assert list(choices) == [ring, f"{ring}, not tpu/softmax_attention: {reason} (mesh.sequence)"]
