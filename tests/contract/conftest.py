import jax
import pytest
from flax import nnx


@pytest.fixture(autouse=True)
def strict():
    """A bfloat16 array that silently meets a float32 one is an error; modules are trees, as Flax will make them."""
    with jax.numpy_dtype_promotion("strict"), nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        yield
