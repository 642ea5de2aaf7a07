"""Other people's layers and checkpoints, loaded into our modules through a map of names.

Torch writes a linear layer's weight as [output, input], we write kernels as [input, output]; some keep in one
weight what are several kernels here.
"""

import collections
import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqmodels import mixers, model
from seqmodels.interop import checkpoint, kinds
from seqmodels.interop.safetensors import read as read_safetensors
from seqmodels.layers import weight_decay_of
from tests import programs
from tests.configs import tiny
from tests.goldens import Golden, load


def assert_close(actual, expected, bound: float, what: str = "values"):
    """The largest difference is within ``bound`` of the largest expected value."""
    expected = np.asarray(expected, np.float64)
    worst = np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max()
    assert worst <= bound, f"{what}: relative error {worst:.1e}, allowed {bound:.0e}"


# Where a parameter of ours is among theirs: a name, a name and the rows it has of a projection they keep in one, or the
# names of what we keep in one.
Place = str | tuple[str, slice] | list[str]


def _take(path: str, place: Place, tensors: dict[str, np.ndarray], used: collections.Counter) -> np.ndarray:
    """Our parameter ``path``: kernels are transposed (a depthwise [channels, 1, width] too), the rest is as it is."""
    if isinstance(place, list):
        return np.concatenate([_take(path, name, tensors, used) for name in place], axis=-1)
    name, rows = (place, slice(None)) if isinstance(place, str) else place
    tensor = tensors[name][rows]
    used[name] += tensor.size
    if tensor.ndim == 3 and tensor.shape[1] == 1:
        tensor = tensor[:, 0]
    return tensor.T if path.endswith("kernel") else tensor


def _unused(tensors: dict[str, np.ndarray], used: collections.Counter) -> dict[str, np.ndarray]:
    """The tensors that were not taken, or not whole, or more than once."""
    return {name: tensor for name, tensor in tensors.items() if used[name] != tensor.size}


def layer(module: nnx.Module, golden: Golden, names: dict[str, Place], prefix: str = "w.", missing: tuple[str, ...] = ()):
    """The pure dict of ``module``'s parameters with the weights of a layer golden: our name -> place among torch's.

    Args:
      prefix: ``"w."`` for the weights, ``"gw."`` for their gradients.
      missing: our names of those that the golden lacks.
    """
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    assert params.keys() == names.keys()
    names = {ours: name for ours, name in names.items() if ours not in missing}
    params = {ours: params[ours] for ours in names}
    theirs = {key.removeprefix(prefix): array for key, array in golden.arrays.items() if key.startswith(prefix)}
    used = collections.Counter()
    loaded = {ours: jnp.asarray(_take(ours, place, theirs, used)) for ours, place in names.items()}
    assert not _unused(theirs, used), "weights without a place"
    assert {name: leaf.shape for name, leaf in loaded.items()} == {name: leaf.shape for name, leaf in params.items()}
    return loaded


def assert_layer(module: nnx.Module, golden: Golden, names: dict[str, Place], bound: float, ungraded: tuple[str, ...] = ()):
    """Outputs and gradients (inputs and every weight) of a mixer are those of the reference layer.

    Args:
      module: may be of shapes alone (`nnx.eval_shape`).
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


def shapes(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Of a mixer's parameters, by name."""
    return jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def places(model_type: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Place]:
    """Our names of a mixer's parameters -> their places in a layer of a checkpoint kind, which is how many authors name them.

    Args:
      shapes: of our parameters, by name.
    """
    found = {}
    for tensor in kinds.load(model_type).inner:
        first = 0
        paths = [path.removeprefix("mixer/") for path in tensor.ours.split() if path.startswith("mixer/")]
        name = tensor.theirs.partition(".")[2]  # without the name of the layer within the block
        for ours in paths:
            end = first + shapes[ours][-1]
            found[ours] = name if len(paths) == 1 else (name, slice(first, end))
            first = end
    return found


def checkpoint_model(name: str, **options) -> tuple[model.LanguageModel, dict[str, np.ndarray]]:
    """The checkpoint of a golden like ``"hf/fla_gla"`` in our language model, and the golden's arrays.

    Args:
      options: of the mixer, that the checkpoint does not decide (implementation, chunk_size).
    """
    golden = load(name)
    found = checkpoint.read(golden.directory)
    ((mixer, config),) = found.config.mixers
    config = dataclasses.replace(found.config, mixers=((mixer, dataclasses.replace(config, **options)),))
    params = jax.tree.map(jnp.asarray, found.params)
    return model.merge(model.graphdef(config, config.vocab_size), params), golden.arrays


Checkpoint = tuple[model.LanguageModel, dict[str, np.ndarray], dict[str, np.ndarray]]


def fla_model(name: str, mixer: str, config, weights: dict[tuple[str, ...], Place], short_conv: bool = False) -> Checkpoint:
    """A checkpoint of flash-linear-attention (mixer, gated MLP, two norms per layer) in our language model.

    Args:
      name: of the golden, like ``"hf/fla_gla"``.
      mixer: our name of the mixer.
      config: its Config.
      weights: path of a parameter within the mixer -> its place, the name without ``attn.``.
      short_conv: whether queries, keys and values are convolved, which ``config`` must agree with.

    Returns:
      ``(network, the golden's arrays, checkpoint tensors without a place)``; the mixer's parameters that are not in
      ``weights`` keep their initial values.
    """
    theirs = json.loads((load(name).directory / "config.json").read_text())
    assert theirs["hidden_act"] == "swish" and theirs["attn"] is None and theirs["use_short_conv"] == short_conv
    changes = {
        "pattern": f"{mixer} mlp",
        "channel_layers.mlp.hidden": theirs["intermediate_size"],
        "norm_eps": theirs["norm_eps"],
    }
    outer = {
        ("embedding",): "model.embeddings.weight",
        ("final_norm", "scale"): "model.norm.weight",
        ("output_kernel",): "lm_head.weight",
    }
    inner = {
        (f"0_{mixer}", "norm", "scale"): "attn_norm.weight",
        ("1_mlp", "norm", "scale"): "mlp_norm.weight",
        ("1_mlp", "layer", "gate_kernel"): "mlp.gate_proj.weight",
        ("1_mlp", "layer", "up_kernel"): "mlp.up_proj.weight",
        ("1_mlp", "layer", "output_kernel"): "mlp.down_proj.weight",
    }
    inner |= {(f"0_{mixer}", "layer", *path): _within("attn.", place) for path, place in weights.items()}
    return _checkpoint(name, theirs, mixer, config, changes, outer, "model.layers.", inner)


def _within(prefix: str, place: Place) -> Place:
    if isinstance(place, list):
        return [prefix + name for name in place]
    return prefix + place if isinstance(place, str) else (prefix + place[0], place[1])


def _checkpoint(
    name: str,
    theirs: dict,
    mixer: str,
    config,
    changes: dict,
    outer: dict[tuple[str, ...], Place],
    layers: str,
    inner: dict[tuple[str, ...], Place],
) -> Checkpoint:
    """A checkpoint in our language model.

    Args:
      theirs: its config.json, of which the widely used names are read.
      changes: fields of ModelConfig that differ between libraries.
      outer: path of a parameter -> its place.
      layers: what the names of layer 0 have before their ``0.``.
      inner: path of a stacked parameter within ``params["layers"]`` -> its place within a layer.
    """
    settings = {
        "d_model": theirs["hidden_size"],
        "repeats": theirs["num_hidden_layers"],
        "tie_embeddings": theirs["tie_word_embeddings"],
        "embedding_norm": False,
        "branch_rms": None,
    } | changes
    network = tiny(**{f"model.{field}": value for field, value in settings.items()}).model
    network = dataclasses.replace(network, mixers=((mixer, config),))
    golden = load(name)
    tensors, used = read_safetensors(golden.directory / "model.safetensors"), collections.Counter()
    params = jax.jit(model.init_params, static_argnums=(0, 1))(network, theirs["vocab_size"], jax.random.key(0))
    shapes = jax.tree.map(jnp.shape, params)

    def put(path, value):
        branch = params
        for part in path[:-1]:
            branch = branch[part]
        assert path[-1] in branch, f"there is no parameter {path}"
        branch[path[-1]] = jnp.asarray(value)

    for path, place in outer.items():
        put(path, _take(path[-1], place, tensors, used))
    for path, place in inner.items():
        places = [_within(f"{layers}{i}.", place) for i in range(network.repeats)]
        put(("layers", *path), np.stack([_take(path[-1], one, tensors, used) for one in places]))
    assert jax.tree.map(jnp.shape, params) == shapes
    network = model.merge(model.graphdef(network, theirs["vocab_size"]), params)
    return network, golden.arrays, _unused(tensors, used)


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
    return jax.tree.map(np.asarray, _initialiser(mixer, config, d_model, tuple(options.items()))(seed))


def num_parameters(mixer: str, config, d_model: int) -> int:
    """Of a mixer's parameters."""
    make = mixers.load(mixer).Mixer
    module = nnx.eval_shape(lambda: make(config, d_model, rngs=nnx.Rngs(params=0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(module, nnx.Param))))


def weight_decay(mixer: str, config, d_model: int) -> dict:
    """True for those of a mixer's parameters that weight decay applies to."""
    make = mixers.load(mixer).Mixer
    return weight_decay_of(nnx.eval_shape(lambda: make(config, d_model, rngs=nnx.Rngs(params=0))))


@functools.cache
def _initialiser(mixer: str, config, d_model: int, options: tuple[tuple[str, Any], ...]):
    make = mixers.load(mixer).Mixer
    return programs.initialiser(lambda rngs: make(config, d_model, rngs=rngs, **dict(options)))


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
