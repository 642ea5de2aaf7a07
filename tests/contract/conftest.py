import jax
import pytest


@pytest.fixture(autouse=True)
def strict_dtypes():
    """A bfloat16 array that silently meets a float32 one is an error here."""
    with jax.numpy_dtype_promotion("strict"):
        yield
