"""What the ops of --suite=gpu should give, in float64, on a CPU: made beforehand, for a device's first minutes are short.

    python -m benchmarks.float64 FOLDER SHAPE OP [OP ...]

Writes FOLDER/OP.npz, unless it is there: the inputs, the output's cotangent, and for every output and gradient what the
recurrence's definition gives, step by step, differentiated by JAX. SHAPE is a name of ``SHAPES`` here.
"""

import functools
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # read when JAX first looks for devices
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernel_cases import CASES, REHEARSAL, Shape
from seqmodels.data import atomic

SHAPES = {"check": Shape(1, 1024, 4, 128), "rehearsal": REHEARSAL}
INPUT, RESULT = "input: ", "result: "


def main(folder: str, shape: str, *names: str) -> None:
    for name in names:
        path = path_of(Path(folder), name, SHAPES[shape])
        if path.exists():
            continue
        case = CASES[name]
        inputs = case.inputs(SHAPES[shape], jax.random.key(0))
        output, pull = jax.vjp(definition(name), jax.tree.map(lambda x: x.astype(jnp.float64), inputs))
        value = next(inputs[key] for key in ("v", "x", "b") if key in inputs)
        d_output = jax.random.normal(jax.random.key(1), output.shape, value.dtype)
        (gradients,) = pull(d_output.astype(jnp.float64))
        arrays = {INPUT + key: np.asarray(x, np.float32) for key, x in (inputs | {"d_output": d_output}).items()}
        arrays |= {RESULT + key: np.asarray(x, np.float32) for key, x in (gradients | {"output": output}).items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_whole(path, functools.partial(np.savez, **arrays))


def path_of(folder: Path, name: str, shape: Shape) -> Path:
    return folder / f"{name.replace(' ', '_')}_B{shape.batch}_T{shape.steps}_H{shape.heads}_D{shape.width}.npz"


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(inputs and ``d_output``, the output and every input's gradient) by name; inputs as float32, which holds bfloat16."""
    with np.load(path) as arrays:
        named = {key: arrays[key] for key in arrays.files}
    return tuple({key.removeprefix(kind): x for key, x in named.items() if key.startswith(kind)} for kind in (INPUT, RESULT))


# ---- the definitions


def definition(name: str):
    """The op of a case, as a function of its inputs by name."""
    if name == "softmax attention":
        return attention
    if name == "linear recurrence":
        return lambda x: over_time(lambda h, a, b: (a * h + b,) * 2, jnp.zeros_like(x["b"][:, 0]), x["a"], x["b"])
    if name.startswith("selective scan"):
        return selective_scan
    return matrix_state


def over_time(step, state, *arrays):
    """``step(state, *arrays at t) -> (state, output)`` over [B, T, ...] arrays. The backward pass makes short stretches again."""
    steps = arrays[0].shape[1]
    stretch = next(size for size in (32, 16, 8, 4, 2, 1) if steps % size == 0)
    by_stretch = [jnp.moveaxis(x, 1, 0).reshape(-1, stretch, x.shape[0], *x.shape[2:]) for x in arrays]

    @jax.checkpoint
    def through(state, xs):
        return jax.lax.scan(lambda state, x: step(state, *x), state, xs)

    _, outputs = jax.lax.scan(through, state, by_stretch)
    return jnp.moveaxis(outputs.reshape(steps, *outputs.shape[2:]), 0, 1)


def matrix_state(x):
    """S = diag(exp(log decay)) S + k u^T, o = q^T S; u is v, or beta (v - k^T S); with a bonus S is read before, as RWKV-6 does."""
    v = x["v"]
    repeats = v.shape[2] // x["q"].shape[2]
    q, k = (jnp.repeat(x[name], repeats, axis=2) for name in ("q", "k"))
    log_decay = x["log_decay"] if "log_decay" in x else jnp.zeros((*v.shape[:3], 1))
    beta = x["beta"] if "beta" in x else None

    def step(S, q, k, v, log_decay, *beta):
        before = S
        S = jnp.exp(log_decay)[..., None] * S
        update = beta[0][..., None] * (v - jnp.einsum("bhk,bhkv->bhv", k, S)) if beta else v
        S = S + k[..., :, None] * update[..., None, :]
        read = before + x["bonus"][..., None] * k[..., :, None] * v[..., None, :] if "bonus" in x else S
        return S, jnp.einsum("bhk,bhkv->bhv", q, read)

    state = jnp.zeros((v.shape[0], v.shape[2], q.shape[3], v.shape[3]))
    return over_time(step, state, q, k, v, log_decay, *(() if beta is None else (beta,)))


def selective_scan(x):
    def step(h, x_t, dt, B, C):
        h = jnp.exp(dt[..., None] * x["A"]) * h + (dt * x_t)[..., None] * B[:, None]
        return h, jnp.einsum("ben,bn->be", h, C)

    return over_time(step, jnp.zeros((x["x"].shape[0], *x["A"].shape)), x["x"], x["dt"], x["B"], x["C"])


def attention(x):
    scores = jnp.einsum("bihd,bjhd->bhij", x["q"], x["k"])
    visible = np.tri(scores.shape[-1], dtype=bool)
    return jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1), x["v"])


if __name__ == "__main__":
    main(*sys.argv[1:])
