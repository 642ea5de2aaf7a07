"""Other people's layers and checkpoints, loaded into our modules through a map of names.

Torch writes a linear layer's weight as [output, input], we write kernels as [input, output].
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqmodels import mixers, model
from tests.goldens import Golden, load, read_safetensors


def assert_close(actual, expected, bound: float, what: str = "values"):
    """The largest difference is within ``bound`` of the largest expected value."""
    expected = np.asarray(expected, np.float64)
    worst = np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max()
    assert worst <= bound, f"{what}: relative error {worst:.1e}, allowed {bound:.0e}"


def layer(
    module: nnx.Module, golden: Golden, names: dict[str, str], prefix: str = "w.", missing: tuple[str, ...] = ()
):
    """The pure dict of ``module``'s parameters with the weights of a layer golden: our name -> torch's.

    Args:
      prefix: ``"w."`` for the weights, ``"gw."`` for their gradients.
      missing: our names of those that the golden lacks.
    """
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    assert params.keys() == names.keys()
    names = {ours: name for ours, name in names.items() if ours not in missing}
    params = {ours: params[ours] for ours in names}
    theirs = {key for key in golden.arrays if key.startswith(prefix)}
    assert theirs == {prefix + name for name in names.values()}, "weights without a place"
    loaded = {ours: jnp.asarray(golden.arrays[prefix + name].T) for ours, name in names.items()}
    assert jax.tree.map(jnp.shape, loaded) == jax.tree.map(jnp.shape, params)
    return loaded


def assert_layer(
    module: nnx.Module, golden: Golden, names: dict[str, str], bound: float, ungraded: tuple[str, ...] = ()
):
    """Outputs and gradients (inputs and every weight) of a mixer are those of the reference layer.

    Args:
      ungraded: our names of weights for which the golden has no gradient.
    """
    definition = nnx.graphdef(module)
    x, cotangent = golden.arrays["x"], golden.arrays["cot_o"]

    def run(params, x):
        output, _ = nnx.merge(definition, params)(x)
        return output

    def run_and_pull(params, x):
        output, pull = jax.vjp(run, params, x)
        return output, *pull(cotangent)

    output, weights, inputs = jax.jit(run_and_pull)(layer(module, golden, names), x)
    assert_close(output, golden.arrays["o"], bound)
    assert_close(inputs, golden.arrays["grad_x"], bound, "gradient of x")
    for name, expected in layer(module, golden, names, "gw.", missing=ungraded).items():
        assert_close(weights[name], expected, bound, f"gradient of {name}")


def fla_model(
    name: str, mixer: str, config, weights: dict[tuple[str, ...], str]
) -> tuple[model.LanguageModel, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A checkpoint of flash-linear-attention (mixer, gated MLP, two norms per layer) in our language model.

    Args:
      name: of the golden, like ``"hf/fla_gla"``.
      mixer: our name of the mixer.
      config: its Config.
      weights: path of a parameter within the mixer -> name of the weight after ``attn.``, transposed where it is a matrix.

    Returns:
      ``(network, the golden's arrays, checkpoint tensors without a place)``; the mixer's parameters that are not in
      ``weights`` keep their initial values.
    """
    golden = load(name)
    theirs = json.loads((golden.directory / "config.json").read_text())
    assert theirs["hidden_act"] == "swish" and theirs["attn"] is None and not theirs["use_short_conv"]
    network = model.ModelConfig(
        d_model=theirs["hidden_size"],
        pattern=f"{mixer} mlp",
        repeats=theirs["num_hidden_layers"],
        mixers=((mixer, config),),
        mlp_kind="gated",
        mlp_hidden=theirs["intermediate_size"],
        mlp_activation="silu",
        tie_embeddings=theirs["tie_word_embeddings"],
        norm_eps=theirs["norm_eps"],
        dropout=0.0,
        remat=False,
        compute_dtype="float32",
    )
    tensors = read_safetensors(golden.directory / "model.safetensors")

    def stacked(weight):
        return jnp.stack([tensors.pop(f"model.layers.{i}.{weight}").T for i in range(network.repeats)])

    params = jax.jit(model.init_params, static_argnums=(0, 1))(network, theirs["vocab_size"], jax.random.key(0))
    shapes = jax.tree.map(jnp.shape, params)
    params["embedding"] = jnp.asarray(tensors.pop("model.embeddings.weight"))
    params["final_norm"]["scale"] = jnp.asarray(tensors.pop("model.norm.weight"))
    params["output_kernel"] = jnp.asarray(tensors.pop("lm_head.weight").T)
    mixing, channels = params["layers"][f"0_{mixer}"], params["layers"]["1_mlp"]
    mixing["norm"]["scale"] = stacked("attn_norm.weight")
    channels["norm"]["scale"] = stacked("mlp_norm.weight")
    for kernel in ("gate", "up"):
        channels["layer"][f"{kernel}_kernel"] = stacked(f"mlp.{kernel}_proj.weight")
    channels["layer"]["output_kernel"] = stacked("mlp.down_proj.weight")
    for path, weight in weights.items():
        place = mixing["layer"]
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = stacked(f"attn.{weight}")
    assert jax.tree.map(jnp.shape, params) == shapes
    return model.merge(model.graphdef(network, theirs["vocab_size"]), params), golden.arrays, tensors


def assert_logits(network: model.LanguageModel, arrays: dict[str, np.ndarray], bound: float):
    """The reference's logits: of the whole text at once, and token by token from the empty state."""
    tokens = jnp.asarray(arrays["input_ids"], jnp.int32)
    logits, _ = jax.jit(network)(tokens)
    assert_close(logits, arrays["logits"], bound, "logits of the whole text")

    def step(state, token):
        logits, state = network(token[:, None], state)
        return state, logits[:, 0]

    _, steps = jax.jit(lambda state: jax.lax.scan(step, state, tokens.T))(network.init_state(*tokens.shape))
    assert_close(jnp.moveaxis(steps, 0, 1), arrays["logits_step"], bound, "logits token by token")


def initial(mixer: str, config, d_model: int, seed: int = 0, **options) -> dict[str, np.ndarray]:
    """A mixer's initial parameters as numpy arrays."""
    built = mixers.load(mixer).Mixer(config, d_model, rngs=nnx.Rngs(params=seed), **options)
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(built, nnx.Param)))


def assert_uniform(values: np.ndarray, bound: float):
    """Values fill (-bound, bound) evenly: none outside, and the deviation of a uniform distribution within 5 %."""
    assert np.abs(values).max() <= bound
    assert abs(values.std() / (bound / 3**0.5) - 1.0) < 0.05
    assert abs(values.mean()) < 0.05 * bound


def assert_normal(values: np.ndarray, deviation: float):
    """Deviation and mean within 5 %, and as many values beyond two deviations as a normal distribution has."""
    assert abs(values.std() / deviation - 1.0) < 0.05
    assert abs(values.mean()) < 0.05 * deviation
    assert 0.03 < (np.abs(values) > 2 * deviation).mean() < 0.06
