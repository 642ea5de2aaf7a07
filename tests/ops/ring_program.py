"""Softmax attention with its time split over eight virtual devices: ``python -m tests.ops.ring_program``, JSON lines.

By length and window, of the compiled gradient: the bytes that a device receives by kind, the numbers of its largest array, its
temporaries. Then, with packed documents of which some hold a NaN: the largest differences from one device.
"""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import hlo
from seqmodels import ops
from seqmodels.config import MeshConfig
from seqmodels.ops.softmax_attention import init_cache
from seqmodels.training.sharding import make_mesh
from tests.programs import compiler_options

H, G, K, V = 2, 1, 16, 16
CASES = ((1024, None), (2048, None), (1024, 33), (2048, 33))


def compiled(mesh, steps: int, window: int | None) -> dict:
    """What is read from the program of the gradient of outputs alone."""
    by_step = NamedSharding(mesh, PartitionSpec(None, "sequence"))
    q, k, v = (jax.ShapeDtypeStruct((1, steps, *x), jnp.float32, sharding=by_step) for x in ((H, K), (G, K), (G, V)))

    def loss(q, k, v):
        with ops.on_mesh(mesh):
            return jnp.sum(jnp.square(ops.softmax_attention(q, k, v, window=window)[0]))

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(q, k, v)
    program = program.compile(compiler_options=compiler_options())
    text = program.as_text()
    sizes = [math.prod(map(int, each.split(","))) for each in re.findall(r"\w\[([\d,]+)\]", text)]
    return {
        "steps": steps, "window": window, "received": hlo.bytes_received(text), "largest_array": max(sizes),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
    }  # fmt: skip


def with_nan(mesh, window: int | None) -> dict:
    """Documents of several devices and several of one; a NaN among a query, a key, a value and the cache."""
    steps, B = 64, 2
    rng = np.random.default_rng(0)
    q, k, v, o_bar = (jnp.asarray(rng.normal(size=(B, steps, *x)), jnp.float32) for x in ((H, K), (G, K), (G, V), (H, V)))
    reset = jnp.zeros((B, steps), bool).at[0, jnp.array([13, 41, 44])].set(True).at[1, jnp.array([8, 9, 63])].set(True)
    cache = init_cache(B, steps + 5, G, K, V, window=window)
    _, cache = jax.jit(ops.softmax_attention)(q[:, :5], k[:, :5], v[:, :5], cache=cache)
    cache = cache._replace(keys=cache.keys.at[1, 0, 3].set(jnp.nan))
    q, k, v = q.at[0, 42, 0].set(jnp.nan), k.at[0, 15].set(jnp.nan), v.at[1, 11].set(jnp.nan)

    def run(mesh):
        def outputs(q, k, v):
            with ops.on_mesh(mesh):
                return ops.softmax_attention(q, k, v, cache=cache, reset=reset, window=window)

        def both(q, k, v):
            o, pull, after = jax.vjp(outputs, q, k, v, has_aux=True)
            return o, after, pull(jnp.where(jnp.isfinite(o), o_bar, 0))

        return jax.device_get(jax.jit(both, compiler_options=compiler_options())(q, k, v))

    one, eight = (jax.tree.leaves(run(each)) for each in (None, mesh))
    return {
        "window": window, "bad": int(np.isnan(one[0]).any(-1).sum()),
        "same_nan": all(np.array_equal(np.isnan(x), np.isnan(y)) for x, y in zip(one, eight, strict=True)),
        "difference": max(float(np.abs(np.nan_to_num(x) - np.nan_to_num(y)).max()) for x, y in zip(one, eight)),
    }  # fmt: skip


if __name__ == "__main__":
    ring = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1, sequence=8))
    for case in CASES:
        print(json.dumps(compiled(ring, *case)), flush=True)
    for reach in (None, 21):
        print(json.dumps(with_nan(ring, reach)), flush=True)
