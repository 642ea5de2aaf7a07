"""The audit of the start says what the untrained model does, and where models differ."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from seqmodels import model
from seqmodels.comparison import audit
from seqmodels.config import model_config
from tests.programs import fast_jit

pytestmark = pytest.mark.tools

VOCAB_SIZE = 40
TOKENS = np.random.default_rng(0).integers(VOCAB_SIZE, size=(2, 12))


def config(**changes) -> model.ModelConfig:
    values = base.get_config().model.to_dict() | {"d_model": 32, "repeats": 2, "pattern": "linear_attention mlp"} | changes
    return model_config(values)


def test_figures_are_those_of_the_model():
    """Stream by stream, layer by layer, and the gradient of the plain loss."""
    of, key = config(tie_embeddings=False), jax.random.key(3)
    figures = audit.start_figures(of, VOCAB_SIZE, key, TOKENS)
    params = audit._programs()[0](of, VOCAB_SIZE, key)

    @fast_jit
    def streams(params):
        """The residual stream before each layer and after the last, by another way than the model's."""
        network = model.merge(model.graphdef(of, VOCAB_SIZE), params)
        found = [network.embed(TOKENS)]
        for repeat in range(of.repeats):
            for name in ("0_linear_attention", "1_mlp"):
                layer = jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], network.layers[name])
                found.append(found[-1] + layer.layer(layer.norm(found[-1]), None)[0])
        return found

    entering, *_ = every = jax.device_get(streams(params))
    rows = []
    for before, x in zip(every, every[1:]):
        centred = [(each - each.mean(axis=(0, 1))).ravel() for each in (entering, x)]
        rows.append((np.corrcoef(*centred)[0, 1] ** 2, np.sqrt(np.mean(x**2)), np.sqrt(np.mean((x - before) ** 2))))
    assert figures.layers == ("linear_attention", "mlp") * 2
    np.testing.assert_allclose(np.transpose([figures.token_share, figures.stream_rms, figures.branch_rms]), rows, rtol=2e-4)
    assert figures.token_rms == pytest.approx(float(np.sqrt(np.mean(entering**2))), rel=1e-5)

    def loss(params):
        logits, _ = model.merge(model.graphdef(of, VOCAB_SIZE), params)(TOKENS)
        log_p = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_p, jnp.asarray(TOKENS)[:, 1:, None], axis=-1))

    value, gradient = fast_jit(jax.value_and_grad(loss))(params)
    assert figures.loss == pytest.approx(float(value), rel=1e-5)
    squares = {name: sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(part)) for name, part in {
        "embedding": gradient["embedding"],
        "mixer": gradient["layers"]["0_linear_attention"]["layer"],
        "mlp": gradient["layers"]["1_mlp"]["layer"],
        "norm": [gradient["final_norm"], *(layer["norm"] for layer in gradient["layers"].values())],
        "head": gradient["output_kernel"],
    }.items()}  # fmt: skip
    assert {name: norm**2 for name, norm in figures.gradient_norms.items()} == pytest.approx(squares, rel=1e-3)


def test_a_constant_says_nothing_of_the_token():
    """Layers that add the same vector at every position leave the token its whole share; a larger branch leaves less."""
    entering = jax.random.normal(jax.random.key(0), (2, 6, 8))
    noise = jax.random.normal(jax.random.key(1), (2, 6, 8))
    branches = (100.0 * noise[:1, :1], noise, 9 * noise)
    share = [float(audit._of_layer(entering, entering, entering + y)["token_share"]) for y in branches]
    assert share[0] == pytest.approx(1.0, abs=1e-3) and 1.0 > share[1] > share[2] and share[2] < 0.1


def test_unlike_starts_are_said():
    figures = audit.StartFigures(("gla", "mlp"), 1.0, (0.9, 0.8), (1.0, 1.2), (0.3, 0.4), 4.0, {"embedding": 1.0, "mixer": 2.0})
    assert audit.group("layers/1_mlp/layer/gate_kernel") == "mlp" and audit.group("embedding_norm/scale") == "embedding"
    alike = {"gla": audit.summary(figures), "mamba": audit.summary(dataclasses.replace(figures, token_share=(0.6, 0.5)))}
    assert audit.differences(alike, {"gla": 5.0, "mamba": 5.2}) == []
    drowned = dataclasses.replace(figures, token_share=(0.1, 0.7), gradient_norms={"embedding": 1.0, "mixer": 30.0})
    found = audit.differences(alike | {"kda": audit.summary(drowned)}, {"gla": 5.0, "kda": 5.4})
    assert found == [
        "the token's share of the stream after the first layer goes from 0.1 (kda) to 0.9 (gla)",
        "the gradient norm of the mixer parameters goes from 2 (gla) to 30 (kda)",
        "the loss after one token of context, in nats goes from 5 (gla) to 5.4 (kda)",
    ]
