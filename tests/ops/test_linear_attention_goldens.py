"""Gated linear attention against other people's reference code: values, final states and gradients in every form.

MANIFEST.json says what each golden is. Most are the op itself up to names and the scale of q; Mamba-2 and GateLoop reach it
through their own parameterisation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.ops import complex_gated_linear_attention, gated_linear_attention
from tests import goldens
from tests.ops.forms import FORMS, options, traced_for
from tests.ops.judge import relative_error
from tests.programs import fast_jit

# float32 against float64, relative to the largest value. Measured: values and states 1e-6; gradients 4e-6.
TOLERANCE = 1e-5


def gla(form, x, scale=None, state="h0", log_decay="g"):
    q = x["q"] * (x["q"].shape[-1] ** -0.5 if scale is None else scale)
    decay = None if log_decay is None else x[log_decay]
    o, final = gated_linear_attention(q, x["k"], x["v"], decay, state=x[state], **options(form))
    return {"o": o, "ht": final}


def simple_gla(form, x):
    return gla(form, x | {"g": x["g"][..., None]})


def retention(form, x):
    decay = jnp.broadcast_to(jnp.log(x["gamma"].astype(np.float32))[:, None], (*x["q"].shape[:3], 1))
    return gla(form, x | {"g": decay})


def plain(form, x):
    return gla(form, x, log_decay=None)


def normalised(form, x):
    q, k = jax.nn.elu(x["q"]) + 1, jax.nn.elu(x["k"]) + 1
    v = jnp.concatenate([x["v"], jnp.ones_like(x["v"][..., :1])], axis=-1)
    state = jnp.concatenate([x["s0"], x["z0"][..., None]], axis=-1)
    o, final = gated_linear_attention(q, k, v, state=state, **options(form))
    return {"o": o[..., :-1] / (o[..., -1:] + 1e-6), "sT": final[..., :-1], "zT": final[..., -1]}


def dfw(form, x):
    o, final = gated_linear_attention(x["q"], x["k"], x["v"], x["gk"], value_log_decay=x["gv"], state=x["h0"], **options(form))
    return {"o": o, "ht": final}


def rwkv6(form, x):
    o, final = gated_linear_attention(x["r"], x["k"], x["v"], x["w"], bonus=x["u"], state=x["h0"], **options(form))
    return {"o": o, "ht": final}


def mamba2(form, x):
    dt = jax.nn.softplus(x["dt"] + x["dt_bias"])
    log_decay = -jnp.exp(x["A_log"]) * dt
    o, final = gated_linear_attention(
        x["C"],
        x["Bm"],
        dt[..., None] * x["x"],
        log_decay[..., None],
        state=jnp.swapaxes(x["h0"], -1, -2),
        **options(form),
    )
    return {"o": o + x["D"][:, None] * x["x"], "ht": jnp.swapaxes(final, -1, -2)}


def gateloop(form, x):
    state = jnp.concatenate([x["h0_re"], x["h0_im"]], axis=2)
    o, final = complex_gated_linear_attention(x["q"], x["k"], x["v"], x["log_a"], x["theta"], state=state, **options(form))
    real, imaginary = jnp.split(final, 2, axis=2)
    return {"o": o, "ht_re": real, "ht_im": imaginary}


OPERATIONS = {
    "linear_attn_plain": plain,
    "linear_attn_elu": normalised,
    "retention": retention,
    "simple_gla": simple_gla,
    "simple_gla_strong": simple_gla,
    "simple_gla_extreme": simple_gla,
    "gla": gla,
    "gla_strong": gla,
    "gla_extreme": gla,
    "dfw": dfw,
    "dfw_strong": dfw,
    "gateloop": gateloop,
    "gateloop_strong": gateloop,
    "rwkv6": rwkv6,
    "rwkv6_strong": rwkv6,
    "rwkv6_extreme": rwkv6,
    "mamba2": mamba2,
    "mamba2_strong": mamba2,
}


@pytest.mark.parametrize("form", goldens.golden_forms(*FORMS))
@pytest.mark.parametrize("name", OPERATIONS)
def test_golden(name, form):
    golden = goldens.load(name)
    arrays, initial = golden.arrays, [state for state in golden.entry["states"] if state.startswith(("h0", "s0", "z0"))]
    moving = {key.removeprefix("grad_") for key in arrays if key.startswith("grad_")}
    fixed = {key: x for key, x in arrays.items() if key == "gamma"}
    operation = OPERATIONS[name]

    @fast_jit
    def both(inputs, cotangents):
        outputs, pull = jax.vjp(lambda inputs: operation(form, inputs | fixed), inputs)
        return outputs, pull({key: cotangents[f"cot_{key}"] for key in outputs})[0]

    inputs = {key: arrays[key] for key in moving}
    cotangents = {key: x for key, x in arrays.items() if key.startswith("cot_")}
    with traced_for(form):
        outputs, gradients = both(inputs, cotangents)
        empty, _ = both(inputs | {key: np.zeros_like(arrays[key]) for key in initial}, cotangents)
    found = {key: relative_error(x, arrays[key]) for key, x in outputs.items()}
    found |= {f"{key}_zero": relative_error(x, arrays[f"{key}_zero"]) for key, x in empty.items()}
    found |= {f"grad_{key}": relative_error(gradients[key], arrays[f"grad_{key}"]) for key in moving}
    assert max(found.values()) < TOLERANCE, found
