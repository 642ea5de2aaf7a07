"""Two small correct mixers, and what each looks like broken: the laws are tested on these.

`DecayMixer` is a gated elementwise recurrence behind a short convolution (state of fixed size); `HistoryMixer`
averages the values it has in a cache (state of size `max_len`). Both are written the plainest way, token by token.
`fault` names the one thing that is wrong.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

WIDTH = 3  # of DecayMixer's convolution


@dataclasses.dataclass(frozen=True)
class Config:
    implementation: str | None = None
    fault: str | None = None


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...]) -> nnx.Param:
    return nnx.Param(shape[0] ** -0.5 * jax.random.normal(rngs.params(), shape))


def _marks(x: jax.Array, reset: jax.Array | None) -> jax.Array:
    return jnp.zeros(x.shape[:2], bool) if reset is None else reset


class DecayMixer(nnx.Module):
    """u = conv(x); h_t = a_t h_{t-1} + (1 - a_t) u_t W_v, a = sigmoid(u W_a + b); y = h W_o."""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs):
        self.config = config
        self.d_model = d_model
        self.conv_weight = nnx.Param(jax.random.normal(rngs.params(), (WIDTH, d_model)))
        self.gate_kernel = _normal(rngs, (d_model, d_model))
        self.gate_bias = nnx.Param(jnp.full((d_model,), 5.0))
        self.value_kernel = _normal(rngs, (d_model, d_model))
        self.output_kernel = _normal(rngs, (d_model, d_model))

    def init_state(self, batch_size, max_len):
        fault = self.config.fault
        dtype = jnp.bfloat16 if fault == "the state is bfloat16" else jnp.float32
        state = {
            "tail": jnp.zeros((batch_size, WIDTH - 1, self.d_model)),
            "h": jnp.zeros((batch_size, self.d_model), dtype),
        }
        if fault == "a scalar in the state":
            state["count"] = jnp.zeros((), jnp.int32)
        return state

    def __call__(self, x, state=None, *, reset=None):
        fault = self.config.fault
        if self.config.implementation not in (None, "recurrent", "chunked"):
            raise NotImplementedError("" if fault == "refuses without a word" else f"no {self.config.implementation} form")
        chunked = self.config.implementation == "chunked"
        reset = _marks(x, reset)
        dtype, length = x.dtype, x.shape[1]
        if state is None:
            state = self.init_state(x.shape[0], length)
            if fault == "no state is not the empty state":
                state["h"] += 1.0
        if fault == "swallows NaN":
            x = jnp.nan_to_num(x)
        if fault == "a gradient path is cut in one form" and chunked:
            state = jax.lax.stop_gradient(state)
        if fault == "mixes rows":
            x = x + (1e-3 * jnp.roll(x, 1, axis=0)).astype(dtype)
        if fault == "reads the future, a little":
            x = x + 1e-6 * jnp.roll(x, -1, axis=1).at[:, -1].set(0).astype(dtype)

        def convolve(tail, token):
            value, mark = token
            cleared = mark & (fault != "the convolution ignores reset")
            tail = jnp.where(cleared[:, None, None], 0.0, tail)
            window = jnp.concatenate([tail, value[:, None].astype(tail.dtype)], axis=1)
            return window[:, 1:], jnp.einsum("bwd,wd->bd", window, self.conv_weight[...])

        def recur(h, token):
            decay, value, mark = token
            if fault == "reset multiplies instead of selecting":
                h = h * (1.0 - mark[:, None].astype(h.dtype))
            elif fault == "one form forgets the reset" and chunked:
                pass
            elif fault != "the recurrence ignores reset":
                h = jnp.where(mark[:, None], jnp.zeros((), h.dtype), h)
            h = decay * h + (1.0 - decay) * value
            return h, h

        time_first = lambda *arrays: tuple(jnp.moveaxis(array, 1, 0) for array in arrays)  # noqa: E731
        tail, u = jax.lax.scan(convolve, state["tail"], time_first(x, reset))
        u = jnp.moveaxis(u, 0, 1).astype(dtype)
        gate_logit = u @ self.gate_kernel[...].astype(dtype) + self.gate_bias[...].astype(dtype)[None, None]
        accumulator = dtype if fault == "accumulates in bfloat16" else jnp.float32
        decay = jax.nn.sigmoid(gate_logit.astype(jnp.float32)).astype(accumulator)
        value = (u @ self.value_kernel[...].astype(dtype)).astype(accumulator)
        if fault == "one form is a little off" and chunked:
            decay = decay.at[:, -1].multiply(0.999)
        if fault == "overflows when gates close":
            total = jnp.cumsum(jax.nn.log_sigmoid(gate_logit.astype(jnp.float32)), axis=1)
            value = value * (jnp.exp(-total) * jnp.exp(total)).astype(accumulator)
        h, history = jax.lax.scan(recur, state["h"].astype(accumulator), time_first(decay, value, reset))
        y = jnp.moveaxis(history, 0, 1).astype(dtype) @ self.output_kernel[...].astype(dtype)
        if fault == "a gradient is wrong in one form" and chunked:
            y = y + 1e-3 * (y - jax.lax.stop_gradient(y))

        if fault == "the final state is one step old" and length > 1:
            h = history[-2]
        if fault == "the convolution's tail is not carried":
            tail = jnp.zeros_like(tail)
        if fault == "outputs are float32":
            y = y.astype(jnp.float32)
        after = dict(state, tail=tail, h=h.astype(state["h"].dtype))
        if fault == "the state changes its dtype":
            after["h"] = after["h"].astype(jnp.float16)
        return y, after


class HistoryMixer(nnx.Module):
    """y_t = mean over the document's tokens up to t of x W_v, from a cache of values."""

    def __init__(self, config: Config, d_model: int, *, rngs: nnx.Rngs, compute_dtype=jnp.float32):
        self.config = config
        self.d_model = d_model
        self.compute_dtype = compute_dtype
        self.value_kernel = _normal(rngs, (d_model, d_model))

    def init_state(self, batch_size, max_len):
        return {
            "values": jnp.zeros((batch_size, max_len, self.d_model), self.compute_dtype),
            "live": jnp.zeros((batch_size,), jnp.int32),
        }

    def __call__(self, x, state=None, *, reset=None):
        fault = self.config.fault
        if self.config.implementation not in (None, "recurrent"):
            raise NotImplementedError(f"no {self.config.implementation} form")
        reset = _marks(x, reset)
        state = self.init_state(*x.shape[:2]) if state is None else state
        values = x @ self.value_kernel[...].astype(x.dtype)
        capacity = state["values"].shape[1]

        def step(carry, token):
            cache, live = carry
            value, mark = token
            if fault != "the cache ignores reset":
                live = jnp.where(mark, 0, live)
            written = jax.nn.one_hot(live, capacity, dtype=jnp.bool_)
            cache = jnp.where(written[:, :, None], value[:, None].astype(cache.dtype), cache)
            live = live + 1
            readable = jnp.arange(capacity)[None] < live[:, None]
            total = jnp.where(readable[:, :, None], cache, jnp.zeros((), cache.dtype)).astype(jnp.float32).sum(axis=1)
            return (cache, live), total / live[:, None].astype(jnp.float32)

        tokens = (jnp.moveaxis(values, 1, 0), jnp.moveaxis(reset, 1, 0))
        (cache, live), means = jax.lax.scan(step, (state["values"], state["live"]), tokens)
        if fault == "the last value is not kept":
            cache = jnp.where(jax.nn.one_hot(live - 1, capacity, dtype=jnp.bool_)[:, :, None], 0, cache)
        return jnp.moveaxis(means, 0, 1).astype(x.dtype), {"values": cache, "live": live}
