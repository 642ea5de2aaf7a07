"""Traces every mixer and a model with all shapes and types checked: what annotations say, arrays have.

    python -m tests.contract.annotations MIXER... [--all]

prints each disagreement, of the default form of each mixer (none: of a model) or, with --all, of every form in float32 and bfloat16.
jaxtyping's import hook puts a check by beartype around every function of PACKAGES, and must come before they are imported: so this
is a program of its own. The checks are made when a function is traced: nothing is compiled or computed.
"""

import sys

import jaxtyping

PACKAGES = ("seqmodels.mixers", "seqmodels.channel_layers", "seqmodels.model", "seqmodels.ops", "seqmodels.layers")

jaxtyping.install_import_hook(PACKAGES, "beartype.beartype")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from seqmodels import model  # noqa: E402
from tests.configs import START, tiny  # noqa: E402
from tests.contract.cases import D_MODEL, all_cases, context  # noqa: E402

BATCH, STEPS, CAPACITY = 2, 12, 20
VOCAB_SIZE = 50
UNMET = (jaxtyping.TypeCheckError, jaxtyping.AnnotationError)  # an array is not as annotated; an annotation cannot be read
PATTERN = "attention(window=4) mlp attention+mamba2 rwkv_channel_mix hgrn2 mlp"


def trace_mixer(case, dtype) -> None:
    """Training on documents, and reading on from a state, of one form of a mixer.

    Raises:
      UNMET: an annotation does not hold.
      NotImplementedError: there is no such form.
    """
    network = nnx.eval_shape(lambda: case.build.make(nnx.Rngs(params=0), case.implementation, jnp.dtype(dtype)))
    definition, params = nnx.split(network)
    x = jax.ShapeDtypeStruct((BATCH, STEPS, D_MODEL), dtype)
    reset = jax.ShapeDtypeStruct((BATCH, STEPS), jnp.bool_)

    def training(params, x, reset):
        return jnp.sum(nnx.merge(definition, params)(x, reset=reset)[0].astype(jnp.float32))

    def decoding(params, x):
        mixer = nnx.merge(definition, params)
        return mixer(x, mixer.init_state(BATCH, CAPACITY))

    with context(case.implementation)():
        jax.eval_shape(jax.grad(training), params, x, reset)
        for steps in (1, STEPS):
            jax.eval_shape(decoding, params, jax.ShapeDtypeStruct((BATCH, steps, D_MODEL), dtype))


def trace_model() -> None:
    """Everything that a language model does, with layers of every kind. Raises UNMET."""
    config = tiny(**START | {"model.pattern": PATTERN, "model.dropout": 0.1}).model
    graphdef, params = model.graphdef(config, VOCAB_SIZE), model.param_shapes(config, VOCAB_SIZE)
    tokens, reset = (jax.ShapeDtypeStruct((BATCH, STEPS), dtype) for dtype in (jnp.int32, jnp.bool_))

    def everything(params, tokens, reset):
        network = model.merge(graphdef, params)
        logits, state = network(tokens, network.init_state(BATCH, CAPACITY), reset=reset)
        step = network(tokens[:, :1], network.unstack_state(state))
        observed = network.observe(tokens, lambda *streams: streams[0].sum())
        return logits, step, observed, network.features(tokens, dropout_key=jax.random.key(0)), network.attention_weights(tokens)

    jax.eval_shape(everything, params, tokens, reset)
    jax.eval_shape(lambda: model.init_params(config, VOCAB_SIZE, jax.random.key(0)))


def disagreements(names: list[str], everything: bool) -> list[str]:
    """What does not hold in mixers and, where ``names`` is empty, in a model; with what showed it."""
    found = []
    for case in all_cases():
        is_main = case.implementation is None and case.name.endswith("-default")
        if case.build.mixer not in names or not (is_main or everything):
            continue
        for dtype in (jnp.float32, jnp.bfloat16) if everything else (jnp.float32,):
            try:
                trace_mixer(case, dtype)
            except NotImplementedError:
                continue
            except UNMET as error:
                found.append(f"{case.name} {case.implementation} {jnp.dtype(dtype).name}: {error}")
    try:
        if not names:
            trace_model()
    except UNMET as error:
        found.append(f"{PATTERN}: {error}")
    return found


if __name__ == "__main__":
    names = [argument for argument in sys.argv[1:] if argument != "--all"]
    print("\n\n".join(lines := disagreements(names, everything=len(names) + 1 < len(sys.argv))))
    raise SystemExit(bool(lines))
