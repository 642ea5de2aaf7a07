"""Ops whose time is split over devices: their numbers, and that what devices exchange does not grow with T."""

import jax
import jax.numpy as jnp
import pytest

from seqmodels import ops
from seqmodels.config import MeshConfig
from seqmodels.errors import UserError
from seqmodels.training.sharding import make_mesh
from tests.eight_devices import on_eight_devices
from tests.ops.sequence_parallel_program import WITH_NAN, T, cases
from tests.programs import matrix_products

pytestmark = pytest.mark.tools

NAMES = tuple(cases(T))
EIGHT_OVER_TIME = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1, sequence=8), 8)


@pytest.fixture(scope="module")
def rows(request):
    """By op, of those that are asked for: one process for all."""
    items = [item for item in request.session.items if item.path == request.path and "rows" in item.fixturenames]
    asked = {item.callspec.params["op"] for item in items}
    return {row["op"]: row for row in on_eight_devices("tests.ops.sequence_parallel_program", *sorted(asked))}


@pytest.mark.parametrize("op", NAMES)
def test_numbers_are_those_of_one_device(rows, op):
    """Outputs and last state, and every gradient; from nothing, and from a state with documents that start anywhere."""
    for kind in ("fresh", "continued"):
        results, gradients = rows[op][kind]
        assert results < 5e-6 and gradients < 1e-5, (kind, results, gradients)


@pytest.mark.parametrize("op", WITH_NAN)
def test_nan_stays_in_its_document(rows, op):
    """In outputs, the last state and every gradient."""
    assert max(rows[op]["nan"]) < 1e-5, rows[op]["nan"]


@pytest.mark.parametrize("op", NAMES)
def test_what_is_exchanged_does_not_grow_with_time(rows, op):
    """But for attention without a window, whose keys and values go round."""
    row = rows[op]
    for kind in ("fresh", "continued"):
        short, long = (row[f"bytes {kind} {steps}"] for steps in (T, 2 * T))
        if op == "softmax_attention":
            assert short < long <= 2 * short
        elif "three devices" in op:  # of T = 32; of 64 it reaches over two
            assert long <= short
        elif op == "wide causal_conv":  # of T = 32 its tail reaches over two devices
            assert long <= short
        else:
            assert long == short


def test_the_end_state_of_linear_attention_costs_one_product():
    """And one for each of its gradients; the op's own first pass would double its products."""
    q, k, v, log_decay = (jax.ShapeDtypeStruct((1, 1024, 2, 16), jnp.float32),) * 4

    def products(mesh):
        def loss(q, k, v, log_decay):
            with ops.on_mesh(mesh):
                return jnp.sum(ops.gated_linear_attention(q, k, v, log_decay, implementation="chunked")[0])

        return matrix_products(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, log_decay).jaxpr)

    one, share = products(None) / 8, products(EIGHT_OVER_TIME)
    assert one < share < 1.2 * one


def test_a_nonlinear_recurrence_says_why_it_cannot():
    z, kernel = jnp.zeros((2, 16, 8)), jnp.zeros((2, 8))
    with ops.on_mesh(EIGHT_OVER_TIME):
        with pytest.raises(UserError, match="mesh.sequence=8 cannot split lstm over time: its recurrence is nonlinear"):
            ops.lstm(z, kernel)
        jax.eval_shape(ops.lstm, z[:, :1], kernel)  # a decoded token is computed by all
