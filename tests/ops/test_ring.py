"""Attention whose time is split over devices: what a device holds and receives, read from compiled programs, and NaN isolation.

That its numbers are those of one device is a test of tests/ops/test_sequence_parallel.py.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from seqmodels import ops
from seqmodels.config import MeshConfig
from seqmodels.ops.softmax_attention import init_cache
from seqmodels.training.sharding import make_mesh
from tests.eight_devices import on_eight_devices
from tests.ops.ring_program import CASES, G, H, K, V
from tests.programs import matrix_products

EIGHT_OVER_TIME = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1, sequence=8), 8)


@pytest.fixture(scope="module")
def rows():
    return on_eight_devices("tests.ops.ring_program")


@pytest.mark.tools
def test_a_device_holds_its_share_of_the_keys(rows):
    """Nothing on it is as large as the keys of all steps, and what it holds grows as its share does."""
    for row in rows[: len(CASES)]:
        assert row["largest_array"] < row["steps"] * G * K, row
    assert rows[1]["temporary_bytes"] < 2 * rows[0]["temporary_bytes"]


@pytest.mark.tools
def test_keys_and_values_go_round_once_each_way(rows):
    """Seven times a device's share; for the gradients seven times more, or six where XLA keeps what came first (that of JAX 0.10);
    these seven times and home.

    Before and after, halves change places, of q, k, v, o and their gradients. The steps of keys are sent with them.
    """
    for row in rows[:2]:
        steps = row["steps"] // 8
        exchanged = 2 * steps * (H + G) * (K + V)
        allowed = [(7 + again + 8) * steps * G * (K + V) + (7 + again + 1) * steps + exchanged for again in (6, 7)]
        assert_received(row, allowed)


def assert_received(row, allowed):
    """So many numbers of keys and the like by permutes, as XLA of one version or another has it, and one number by an all-reduce."""
    assert row["received"].keys() == {"collective-permute", "all-reduce"} and row["received"]["all-reduce"] == 4, row
    assert row["received"]["collective-permute"] in [4 * numbers for numbers in allowed], row


def test_all_devices_compute_alike():
    """Of keys from an earlier device half are seen by all queries, of those from a later one all by half of the queries."""
    q, k = (jax.ShapeDtypeStruct((1, 2048, heads, K), jnp.float32) for heads in (H, G))

    def loss(q, k, v):
        return jnp.sum(ops.softmax_attention(q, k, v)[0])

    with ops.on_mesh(EIGHT_OVER_TIME):
        program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, k)
    later_and_earlier = [tuple(map(matrix_products, each)) for each in branches(program.jaxpr)]
    assert len(later_and_earlier) == 4  # in the loop over devices and after it, forward and backward
    half = 256 * 256 // 2 * H * K
    assert later_and_earlier == [(2 * half,) * 2] * 2 + [(5 * half,) * 2] * 2


def branches(jaxpr) -> list[list]:
    """Of each `lax.cond` of a program, in its order."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            found.append([branch.jaxpr for branch in equation.params["branches"]])
            continue
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                found += branches(inner)
    return found


@pytest.mark.tools
def test_a_window_receives_what_it_reaches(rows):
    """Keys, their steps and values of window - 1 steps and, back, their gradients, however long a text is.

    The former once more for the gradients, where XLA does not keep them (that of JAX 0.12).
    """
    for row in rows[2 : len(CASES)]:
        assert_received(row, [32 * (2 * G * (K + V) + 1), 32 * (3 * G * (K + V) + 2)])


@pytest.mark.tools
def test_nan_stays_in_its_document(rows):
    for row in rows[len(CASES) :]:
        assert row["bad"] > 0 and row["same_nan"] and row["difference"] < 1e-5, row


def test_the_form_is_recorded_and_others_say_what_is_missing():
    x = jax.ShapeDtypeStruct((1, 64, 2, 16), jnp.bfloat16)

    def trace(implementation=None):
        jax.eval_shape(functools.partial(ops.softmax_attention, implementation=implementation), x, x, x)

    with ops.on_mesh(EIGHT_OVER_TIME):
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
