"""What --suite=kernels of benchmark.py measures: ops, sizes, the products they need, and whose kernel they are held against."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from seqmodels import ops

PASSES = ("forward", "gradient")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Heads of a width, or as many channels as all of them have."""

    batch: int
    steps: int
    heads: int
    width: int
    small: bool = False

    @property
    def channels(self) -> int:
        return self.heads * self.width


LARGE_TOKENS = 65_536
SHAPES = {
    "B8 T1024 H8 D64": Shape(8, 1024, 8, 64, small=True),
    "B32 T256 H4 D64": Shape(32, 256, 4, 64, small=True),
} | {
    f"B{LARGE_TOKENS // steps} T{steps} H32 D128": Shape(LARGE_TOKENS // steps, steps, 32, 128)
    for steps in (2048, 8192, 512, 32_768)
}
REHEARSAL = Shape(1, 128, 2, 64)


@dataclasses.dataclass(frozen=True)
class Case:
    """An op as it is measured; the first of what it returns is compared."""

    run: Callable  # (**inputs, implementation=...) -> (output, state)
    inputs: Callable[[Shape, jax.Array], dict[str, jax.Array]]
    flops_of_token: Callable[[Shape], float]  # forward; with the backward pass three times as many
    peer: Callable | None = None  # (**tensors) -> output, of PyTorch
    peer_inputs: Callable[[dict], dict] = lambda inputs: inputs
    recurrence: bool = True
    has: Callable[[Shape], bool] = lambda shape: True
    backward: float = 2.0  # FLOPs of the backward pass, in forward passes
    exponentials_of_token: Callable[[Shape], float] = lambda shape: 0.0  # forward, where they are a limit; twice as many backward

    def flops(self, shape: Shape, part: str) -> float:
        """Of the recurrence as it is defined: what a chunk computes twice or spends on its inside counts as overhead."""
        forward = shape.batch * shape.steps * self.flops_of_token(shape)
        return forward if part == "forward" else (1.0 + self.backward) * forward

    def exponentials(self, shape: Shape, part: str) -> float:
        return (1.0 if part == "forward" else 3.0) * shape.batch * shape.steps * self.exponentials_of_token(shape)


def _normal(key, *shape, dtype=jnp.bfloat16, scale=1.0):
    return scale * jax.random.normal(key, shape, dtype)


def _heads(shape: Shape, key, *, decay=0, beta=False, bonus=False, groups=None, key_width=None):
    """q, k, v [B, T, H, D], a log decay as of trained models (a memory of some tens of steps), ``decay`` wide."""
    keys = jax.random.split(key, 6)
    B, T, H, D = shape.batch, shape.steps, shape.heads, shape.width
    K, G = key_width or D, groups or H
    inputs = {
        "q": _normal(keys[0], B, T, G, K, scale=K**-0.5),
        "k": _normal(keys[1], B, T, G, K, scale=K**-0.5),
        "v": _normal(keys[2], B, T, H, D),
    }
    if beta:
        k = inputs["k"].astype(jnp.float32)
        inputs["k"] = (k / jnp.linalg.norm(k, axis=-1, keepdims=True)).astype(jnp.bfloat16)
        inputs["beta"] = jax.nn.sigmoid(_normal(keys[4], B, T, H))
    if decay:
        inputs["log_decay"] = jax.nn.log_sigmoid(_normal(keys[3], B, T, H, decay, dtype=jnp.float32) + 3.0)
    if bonus:
        inputs["bonus"] = _normal(keys[5], H, K, dtype=jnp.float32)
    return inputs


def _with(decay=None, **options):
    """``_heads`` with a decay that is as wide as a head (``channel``), 1, or not there."""

    def make(shape: Shape, key):
        return _heads(shape, key, decay={"channel": shape.width, "head": 1, None: 0}[decay], **options)

    return make


def _scan_inputs(states: int):
    def make(shape: Shape, key):
        keys = jax.random.split(key, 4)
        B, T, E = shape.batch, shape.steps, shape.channels
        return {
            "x": _normal(keys[0], B, T, E),
            "dt": jax.nn.softplus(_normal(keys[1], B, T, E, dtype=jnp.float32) - 4.0),
            "A": -jnp.broadcast_to(jnp.arange(1.0, states + 1.0), (E, states)),
            "B": _normal(keys[2], B, T, states),
            "C": _normal(keys[3], B, T, states),
        }

    return make


def _recurrence_inputs(shape: Shape, key):
    a, b = jax.random.split(key)
    size = shape.batch, shape.steps, shape.channels
    return {"a": jax.nn.sigmoid(_normal(a, *size, dtype=jnp.float32) + 3.0), "b": _normal(b, *size, dtype=jnp.float32)}


def _state_products(per_number: float, key_width: int | None = None):
    """FLOPs of a token: so many for each number of the heads' states."""
    return lambda shape: per_number * shape.heads * (key_width or shape.width) * shape.width


def _fla(name: str, **options) -> Callable:
    """A chunked op of flash-linear-attention, imported when it is called; nothing is scaled."""

    def call(**tensors):
        import importlib

        module = importlib.import_module(f"fla.ops.{name}")
        return getattr(module, f"chunk_{name}")(**tensors, scale=1.0, **options)[0]

    return call


def _renamed(**names: str) -> Callable[[dict], dict]:
    """Inputs by the peer's names for them; a decay per head has no last axis there."""

    def rename(inputs: dict) -> dict:
        inputs = {name: x[..., 0] if name == "log_decay" and x.shape[-1] == 1 else x for name, x in inputs.items()}
        return {names[name] if name in names else name: x for name, x in inputs.items()}

    return rename


def _fla_hgrn(x, g):
    from fla.ops.hgrn import chunk_hgrn

    return chunk_hgrn(x, g)[0]


def _mamba_scan(u, delta, A, B, C):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(u, delta, A, B, C).transpose(1, 2)


def _as_mamba_scans(inputs: dict) -> dict:
    """Time is last there, and dt in the dtype of x."""
    x, dt, B, C = (jnp.swapaxes(inputs[name], 1, 2) for name in ("x", "dt", "B", "C"))
    return {"u": x, "delta": dt.astype(x.dtype), "A": inputs["A"], "B": B, "C": C}


def _mamba_ssd(x, dt, A, B, C):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256)


def _as_mamba_ssds(inputs: dict) -> dict:
    """Its decay is exp(dt A) and its values dt x."""
    v, dt = inputs["v"], -inputs["log_decay"][..., 0]
    x = (v.astype(jnp.float32) / dt[..., None]).astype(v.dtype)
    return {"x": x, "dt": dt, "A": -jnp.ones(v.shape[2]), "B": inputs["k"], "C": inputs["q"]}


def _torch_attention(q, k, v):
    import torch

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0).transpose(1, 2)


_linear, _delta = ops.gated_linear_attention, ops.delta_rule
_is_large = lambda shape: not shape.small  # noqa: E731


def _state_space(shape: Shape) -> Shape:
    """The same channels in heads of 64, as Mamba-2 has them."""
    return dataclasses.replace(shape, heads=shape.channels // 64, width=64)


def _ssd(states: int) -> Case:
    return Case(
        _linear,
        lambda shape, key: _heads(_state_space(shape), key, decay=1, groups=1, key_width=states),
        lambda shape: 4.0 * shape.channels * states,
        _mamba_ssd,
        _as_mamba_ssds,
        has=_is_large,
    )


CASES = {
    "no decay": Case(_linear, _with(), _state_products(4.0), _fla("linear_attn", normalize=False)),
    "decay per head": Case(
        _linear, _with("head"), _state_products(4.0), _fla("simple_gla"), _renamed(log_decay="g")
    ),
    "decay per channel": Case(
        _linear, _with("channel"), _state_products(4.0), _fla("gla"), _renamed(log_decay="g")
    ),
    "bonus": Case(
        _linear, _with("channel", bonus=True), _state_products(4.0), _fla("rwkv6"),
        _renamed(q="r", log_decay="w", bonus="u"),
    ),
    "ssd (N 64)": _ssd(64),
    "ssd (N 128)": _ssd(128),
    "delta rule": Case(_delta, _with(beta=True), _state_products(6.0), _fla("delta_rule")),
    "gated delta rule": Case(
        _delta, _with("head", beta=True), _state_products(6.0), _fla("gated_delta_rule"), _renamed(log_decay="g")
    ),
    "kda": Case(_delta, _with("channel", beta=True), _state_products(6.0), _fla("kda"), _renamed(log_decay="g")),
    "selective scan (N 16)": Case(
        ops.selective_scan, _scan_inputs(16), lambda shape: 0.0, _mamba_scan, _as_mamba_scans, has=_is_large,
        exponentials_of_token=lambda shape: 16.0 * shape.channels,
    ),
    "linear recurrence": Case(
        ops.linear_recurrence, _recurrence_inputs, lambda shape: 0.0, _fla_hgrn,
        lambda inputs: {"x": inputs["b"], "g": jnp.log(inputs["a"])},
    ),
    "softmax attention": Case(
        functools.partial(ops.softmax_attention), _with(), lambda shape: 2.0 * shape.channels * shape.steps,
        _torch_attention, recurrence=False, backward=2.5,
    ),
}  # fmt: skip
