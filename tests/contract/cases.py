"""Every mixer of the folder x every implementation, as cases for the laws."""

import contextlib
import dataclasses
import functools
import inspect
from typing import Any

import jax.numpy as jnp
from flax import nnx

from seqmodels import mixers
from tests import programs
from tests.contract.laws import CHUNK, Case, Subject, normal_inputs
from tests.contract.variants import VARIANTS

KERNEL_WITHOUT_CHUNKS = {"mamba"}  # whose kernel has no chunk size to choose, and refuses one
IMPLEMENTATIONS = ("recurrent", "associative", "parallel", "chunked", "pallas", None)
D_MODEL = 32


@dataclasses.dataclass(frozen=True)
class Builder:
    """Builds one mixer with some options changed; hashable, so that built subjects are shared."""

    mixer: str
    changes: tuple[tuple[str, Any], ...]

    def __call__(self, implementation: str | None, dtype) -> Subject:
        abstract = nnx.eval_shape(lambda: self.make(nnx.Rngs(params=0), implementation, dtype))
        built = nnx.merge(nnx.graphdef(abstract), self.initial_values())
        return Subject(built, normal_inputs(D_MODEL), context=context(implementation))

    @functools.lru_cache(maxsize=2)  # noqa: B019 (bounded, and builders live as long as the process)
    def initial_values(self) -> dict:
        """They depend on neither the implementation nor the compute dtype."""
        return programs.initialiser(lambda rngs: self.make(rngs, None, jnp.dtype("float32")))(0)

    def make(self, rngs: nnx.Rngs, implementation: str | None, dtype) -> nnx.Module:
        module = mixers.load(self.mixer)
        config = module.Config(implementation=implementation, **dict(self.changes))
        has_chunks = implementation != "pallas" or self.mixer not in KERNEL_WITHOUT_CHUNKS
        if has_chunks and any(field.name == "chunk_size" for field in dataclasses.fields(config)):
            config = dataclasses.replace(config, chunk_size=CHUNK)
        offered = {"compute_dtype": dtype, "layer_index": 1, "num_layers": 4}
        wanted = inspect.signature(module.Mixer.__init__).parameters
        options = {name: value for name, value in offered.items() if name in wanted}
        return module.Mixer(config, D_MODEL, rngs=rngs, **options)


def context(implementation: str | None):
    """Pallas kernels run in their interpreter here."""
    if implementation != "pallas":
        return contextlib.nullcontext
    from seqmodels import ops

    return ops.interpret


@functools.cache
def all_cases() -> tuple[Case, ...]:
    """Cases in the order that shares most compiled programs: implementations of one variant are neighbours."""
    return tuple(
        Case(f"{mixer}-{variant}", Builder(mixer, tuple(changes.items())), implementation)
        for mixer in mixers.names()
        for variant, changes in {"default": {}, **VARIANTS.get(mixer, {})}.items()
        for implementation in IMPLEMENTATIONS
    )
