"""The first operation that gives a number that is not finite is named, whatever it is inside of."""

import jax
import jax.numpy as jnp
import pytest

from seqmodels.layers import soft_cap
from seqmodels.training.first_nonfinite import first_finding

GOOD = jnp.arange(1.0, 5.0)


@pytest.mark.parametrize(
    "function, bad, kind, operation, loops",
    [
        (lambda x: jnp.exp(jnp.log(x)) + 1.0, GOOD.at[1].set(-1.0), "nan", "log", ()),
        (lambda x: jax.jit(lambda y: 1.0 / (y - 3.0))(x * 1.0), GOOD, "inf", "div", ()),
        (jax.checkpoint(lambda x: jnp.sqrt(x) * 2.0), -GOOD, "nan", "sqrt", ()),
        (lambda x: jax.lax.scan(lambda c, y: (c * y, jnp.log(c)), 1.0, x), GOOD.at[2].set(-1.0), "nan", "log", (3,)),
        (
            lambda x: jax.lax.scan(lambda c, y: (c * y, jnp.log(c)), 1.0, x, reverse=True),
            GOOD.at[2].set(-1.0),
            "nan",
            "log",
            (1,),
        ),
        (lambda x: jax.lax.fori_loop(0, 3, lambda i, y: jnp.sqrt(y - 1.0), x), GOOD + 0.5, "nan", "sqrt", (1,)),
        (lambda x: jax.lax.cond(x[0] > 0, lambda y: y, jnp.log, x), -GOOD, "nan", "log", ()),
        (lambda x: x * 1e9, 1e9 * GOOD, "absurd", "mul", ()),
        (jax.grad(lambda x: jnp.sum(jnp.sqrt(x))), GOOD.at[0].set(0.0), "inf", "div", ()),
    ],
    ids=["plain", "jit", "remat", "scan", "reverse", "while", "cond", "absurd", "backward"],
)
def test_the_operation_and_the_iteration(function, bad, kind, operation, loops):
    healthy = 1000.0 + GOOD
    found = first_finding(function, (bad,), (healthy,))
    assert (found.kind, found.operation, found.loops) == (kind, operation, loops)
    assert found.inputs and found.inputs[0].startswith("float32")
    assert first_finding(function, (healthy,), (healthy + 1.0,)) is None


def test_infinities_on_purpose_are_no_finding():
    def masked_softmax(x):
        return jax.nn.softmax(jnp.where(jnp.arange(4) < 2, x, -jnp.inf))

    assert first_finding(masked_softmax, (GOOD,), (2 * GOOD,)) is None
    found = first_finding(masked_softmax, (GOOD.at[0].set(jnp.nan),), (GOOD,))
    assert found.kind == "nan"


def test_a_fault_of_the_program_is_found_though_it_is_there_in_health():
    def faulty(x):
        guarded = jnp.where(jnp.arange(4) < 9, x, jnp.inf)
        return jnp.sum(guarded - 1.0 / (x * 0.0) * 0.0)

    found = first_finding(faulty, (GOOD,), (2 * GOOD,))
    assert (found.kind, found.operation, found.always) == ("nan", "mul", True)


def test_the_scope_and_the_source_are_named():
    def model(x):
        with jax.named_scope("0_gla"):
            return soft_cap(x, x[0] - 1.0)

    found = first_finding(model, (GOOD,), (GOOD + 1.0,))
    assert "0_gla" in found.scope and "layers" in found.source and found.operation == "div"
