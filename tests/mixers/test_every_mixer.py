"""A mixer is a file that looks like one: a header, a frozen and commented Config, shapes, initial values that follow the key."""

import ast
import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import mixers
from seqmodels.layers import weight_decay_of
from tests import programs


@pytest.fixture(params=mixers.names())
def mixer(request):
    return mixers.load(request.param)


def test_a_mixer_says_what_it_is(mixer):
    said = mixer.__doc__.lower()
    missing = [word for word in ("arxiv", "state", "numerical trap", "deviations from the paper") if word not in said]
    assert not missing, f"the header of {mixer.__name__} says nothing of: {missing}"


def test_config_is_frozen_complete_and_commented(mixer):
    config = mixer.Config()  # every field has a default
    fields = {field.name: field for field in dataclasses.fields(config)}
    assert fields["implementation"].default is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.implementation = "recurrent"
    assert hash(config) == hash(mixer.Config()), "it sits in the graphdef: tuples, no dicts or lists"
    source = pathlib.Path(mixer.__file__).read_text()
    (definition,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Config"]
    lines = source.splitlines()
    for node in definition.body:
        if isinstance(node, ast.AnnAssign):
            said = "#" in lines[node.end_lineno - 1] or lines[node.lineno - 2].lstrip().startswith("#")
            assert said, f"{node.target.id} has no comment"


def make(mixer, d_model, rngs=None):
    return mixer.Mixer(mixer.Config(), d_model, rngs=nnx.Rngs(params=0) if rngs is None else rngs)


@functools.cache
def initialiser(mixer):
    """`programs.initialiser` at width 32, compiled once for the tests below."""
    return programs.initialiser(lambda rngs: make(mixer, 32, rngs))


def test_default_config_works_at_any_multiple_of_32(mixer):
    """Traced, not compiled: the contract's laws run at width 32."""
    for d_model in (32, 96, 160):

        def outputs_and_last_kernel(x, d_model=d_model):
            wide = make(mixer, d_model)
            return wide(x)[0], wide.output_kernel[...]

        y, kernel = jax.eval_shape(outputs_and_last_kernel, jax.ShapeDtypeStruct((2, 5, d_model), jnp.float32))
        assert y.shape == (2, 5, d_model)
        assert kernel.shape[1] == d_model, "the model scales this projection with depth"


@pytest.mark.tools
def test_initialisation_follows_the_key(mixer):
    once_more = programs.initialiser(lambda rngs: make(mixer, 32, rngs))
    first, again, other = initialiser(mixer)(0), once_more(0), initialiser(mixer)(1)
    same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again))]
    changed = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other))]
    assert all(same) and any(changed)


def test_every_matrix_says_whether_it_is_decayed(mixer):
    mask = weight_decay_of(nnx.eval_shape(lambda: make(mixer, 32)))
    assert mask["output_kernel"]


@pytest.mark.tools
@pytest.mark.parametrize("implementation", ["recurrent", None])
def test_a_batch_may_have_no_rows_and_a_sequence_has_a_step(mixer, implementation):
    """Traced, with gradients, from a state and over marks: shapes follow the input, and a length of 0 is one line."""
    network = nnx.eval_shape(lambda: mixer.Mixer(mixer.Config(implementation=implementation), 32, rngs=nnx.Rngs(params=0)))
    graphdef, params = nnx.split(network)

    def loss(params, x, state, reset):
        y, state = nnx.merge(graphdef, params)(x, state, reset=reset)
        return jnp.sum(y), (y, state)

    def traced(batch, steps):
        x = jax.ShapeDtypeStruct((batch, steps, 32), jnp.float32)
        state = jax.eval_shape(lambda: network.init_state(batch, 8))
        marks = jax.ShapeDtypeStruct((batch, steps), jnp.bool_)
        _, (y, after) = jax.eval_shape(jax.grad(loss, has_aux=True), params, x, state, marks)
        assert y.shape == x.shape and jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)

    traced(0, 5)
    traced(0, 1)
    with pytest.raises(ValueError, match="at least one step|T >= 1") as error:
        traced(2, 0)
    assert "\n" not in str(error.value)
