"""Gated linear attention in float64 numpy, one step after another, forward and backward: the judge of every form."""

import numpy as np

OPTIONAL = ("log_decay", "value_log_decay", "bonus")


def run(inputs, reset=None):
    """Outputs, final state, and what the backward pass needs.

    `inputs`: q, k [B,T,G,K], v [B,T,H,V], state [B,H,K,V], and any of OPTIONAL, of any float dtype.
    """
    x = {name: np.asarray(value, np.float64) for name, value in inputs.items()}
    batch, steps, heads, width = x["v"].shape
    repeats = heads // x["q"].shape[2]
    q, k = np.repeat(x["q"], repeats, 2), np.repeat(x["k"], repeats, 2)
    channels = q.shape[3]
    decay = np.ones((batch, steps, heads, channels, width))
    if "log_decay" in x:
        decay = decay * np.exp(x["log_decay"])[..., :, None]
    if "value_log_decay" in x:
        decay = decay * np.exp(x["value_log_decay"])[..., None, :]
    reset = np.zeros((batch, steps), bool) if reset is None else np.asarray(reset)

    state = x["state"]
    befores, afters = [], []
    output = np.zeros((batch, steps, heads, width))
    for t in range(steps):
        before = np.where(reset[:, t, None, None, None], 0.0, state)
        update = k[:, t, :, :, None] * v_at(x, t)
        state = decay[:, t] * before + update
        read = before + x["bonus"][:, :, None] * update if "bonus" in x else state
        output[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], read)
        befores.append(before)
        afters.append(state)
    return output, state, (x, q, k, decay, reset, befores, afters)


def v_at(x, t):
    return x["v"][:, t, :, None, :]


def gradients(tape, d_output, d_state):
    """Gradients of <output, d_output> + <final state, d_state> for every input, by name."""
    x, q, k, decay, reset, befores, afters = tape
    d_output, d_state = np.asarray(d_output, np.float64), np.asarray(d_state, np.float64)
    batch, steps, heads, _ = x["v"].shape
    d_q, d_k, d_v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(x["v"])
    d_log = np.zeros(decay.shape)
    d_bonus = np.zeros((heads, q.shape[3]))
    for t in reversed(range(steps)):
        qt, kt, vt, dot = q[:, t], k[:, t], x["v"][:, t], d_output[:, t]
        written = np.einsum("bhk,bhv->bhkv", qt, dot)
        if "bonus" in x:
            u = x["bonus"]
            pair = np.einsum("bhv,bhv->bh", vt, dot)[..., None]
            d_q[:, t] = np.einsum("bhkv,bhv->bhk", befores[t], dot) + u * kt * pair
            d_bonus += (qt * kt * pair).sum(0)
            d_k[:, t] = qt * u * pair
            d_v[:, t] = (qt * u * kt).sum(-1, keepdims=True) * dot
            d_before = written
        else:
            d_q[:, t] = np.einsum("bhkv,bhv->bhk", afters[t], dot)
            d_state = d_state + written
            d_before = 0.0
        d_k[:, t] += np.einsum("bhkv,bhv->bhk", d_state, vt)
        d_v[:, t] += np.einsum("bhkv,bhk->bhv", d_state, kt)
        d_log[:, t] = d_state * decay[:, t] * befores[t]
        d_before = d_before + d_state * decay[:, t]
        d_state = np.where(reset[:, t, None, None, None], 0.0, d_before)

    def by_group(d):
        groups = x["q"].shape[2]
        return d.reshape(batch, steps, groups, heads // groups, -1).sum(3)

    found = {"q": by_group(d_q), "k": by_group(d_k), "v": d_v, "state": d_state, "bonus": d_bonus}
    if "log_decay" in x:
        per_channel = d_log.sum(-1)
        scalar = x["log_decay"].shape[-1] == 1
        found["log_decay"] = per_channel.sum(-1, keepdims=True) if scalar else per_channel
    found["value_log_decay"] = d_log.sum(-2)
    return {name: found[name] for name in x}


def relative_error(actual, expected):
    """Largest error relative to the largest expected value; infinite if anything is not finite."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not np.isfinite(actual).all():
        return np.inf
    return np.abs(actual - expected).max(initial=0.0) / max(np.abs(expected).max(initial=0.0), 1e-30)


def distance(actual, expected):
    """`relative_error`, for complex values too."""
    return relative_error(*(np.stack([np.real(x), np.imag(x)]) for x in (np.asarray(actual), np.asarray(expected))))
