"""How models start: what each layer of the untrained network does to the residual stream, and how large the gradients are.

A comparison is of architectures only if it is not of initialisations. With e[p, d] what the embedding gives the first layer
at position p and x_l[p, d] the residual stream after layer l, both of the untrained model and centred over the positions
(a vector that all positions share says nothing of the token), the token's share of the stream after layer l is

    r_l^2 = (sum_pd e x_l)^2 / (sum_pd e^2  sum_pd x_l^2)

the squared correlation over all positions and features: the fraction of the stream's variance that a multiple of the token's own
embedding explains. It is 1 where a layer adds nothing, and near 0 where what the layers add drowns the token. What a layer
adds is its branch, x_l - x_{l-1}; rms is sqrt(mean x^2) over positions and features, not centred.

Everything is computed in float32, whatever the model's compute dtype, without dropout.

Two models of a comparison start differently where, over the comparison's mixers,

- the smallest token share is below SHARE_RATIO of the largest, after the first layer or after the last. Over the mixers of a
  table whose order of losses it predicted (Spearman -0.9) it went from 0.07 to 0.86; what layers of one scale leave is within 2.
- the rms of the stream or of the mixers' branches goes over a factor of RMS_RATIO, or the gradient norm of a group of parameters
  over GRADIENT_RATIO: AdamW divides a gradient's scale out, but only once its averages are of such gradients, and a clipped
  global norm is that of the largest group.
- the trained models differ by more than POSITION_1_NATS in the loss after one token of context, where there is nothing to mix yet:
  what lies between them there is not the mixer's doing (between four mixers that started unequal lay 1.2 nats, 0.24 from an
  equal start).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from seqmodels import model, screen, xla_cpu
from seqmodels.config import RunConfig
from seqmodels.model import ModelConfig
from seqmodels.pattern import is_channel_layer, layer_name, parse_pattern
from seqmodels.training.loss import cross_entropy
from seqmodels.training.sharding import path_name

SHARE_RATIO, RMS_RATIO, GRADIENT_RATIO, POSITION_1_NATS = 0.5, 3.0, 10.0, 0.3
TOKENS = 2048  # of a training batch, that a comparison's starts are measured on
# of parameters; "mlp" are those of channel layers; a tied head's gradient is the embedding's
GROUPS = ("embedding", "mixer", "mlp", "norm", "head")


@dataclasses.dataclass(frozen=True)
class StartFigures:
    """Of an untrained model, by residual layer in order of depth."""

    layers: tuple[str, ...]  # as the pattern writes them
    token_rms: float  # of the stream as it enters the first layer
    token_share: tuple[float, ...]  # 0..1, after each layer
    stream_rms: tuple[float, ...]  # after each layer
    branch_rms: tuple[float, ...]  # of what each layer adds
    loss: float | None  # nats per target
    gradient_norms: dict[str, float]  # of the loss, for each of GROUPS that the model has; empty without gradients


def start_figures(
    config: ModelConfig,
    vocab_size: int,
    key: Array,
    tokens: Int[Array, "B T"],
    *,
    targets: Int[Array, "B T"] | None = None,
    weights: Float[Array, "B T"] | None = None,
    reset: Bool[Array, "B T"] | None = None,
    gradients: bool = True,
) -> StartFigures:
    """The figures of a model as `key` initialises it; compiles once for each config and shape.

    Args:
        config: the network; a compute dtype other than float32 and dropout are put aside.
        vocab_size: L, rows of the embedding.
        key: decides the parameters.
        tokens: ids to read, some hundred or more.
        targets: what the loss is of; None: the token after each one.
        weights: of the targets; None: 1.
        reset: True where a new document starts.
        gradients: False leaves the loss and its gradients out, for which a large model wants memory and time.

    Raises:
        UserError: the config's sizes do not fit together.
    """
    config = dataclasses.replace(config, compute_dtype="float32", dropout=0.0)
    tokens = jnp.asarray(tokens)
    if targets is None:
        targets = jnp.roll(tokens, -1, axis=1)
        weights = jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0.0)
    init, figures = _programs()
    by_layer, token_rms, loss, norms = jax.device_get(
        figures(config, vocab_size, gradients, init(config, vocab_size, key), tokens, targets, weights, reset)
    )
    by_layer = {name: tuple(map(float, values)) for name, values in by_layer.items()}
    return StartFigures(
        layers=parse_pattern(config.pattern) * config.repeats, token_rms=float(token_rms), **by_layer,
        loss=None if loss is None else float(loss), gradient_norms={name: float(norm) for name, norm in norms.items()},
    )  # fmt: skip


@functools.cache
def _programs() -> tuple[Callable, Callable]:
    """`model.init_params` and `_figures`, compiled for one call each, as a comparison has two such programs a candidate."""
    options = xla_cpu.quick_compiler_options() if jax.default_backend() == "cpu" else {}
    return (
        jax.jit(model.init_params, static_argnums=(0, 1), compiler_options=options),
        jax.jit(_figures, static_argnums=(0, 1, 2), compiler_options=options),
    )


def start_of_run(config: RunConfig, vocab_size: int, batch: Mapping[str, np.ndarray]) -> StartFigures:
    """The figures of a run's initial parameters, on the first rows of a training batch, about TOKENS tokens.

    Args:
        vocab_size: tokens of the tokenizer; None: there is no tokenizer.
        batch: inputs and targets [B, T], and reset or weights where training has them.

    Raises:
        UserError: the config's sizes do not fit together.
    """
    rows = max(1, TOKENS // batch["inputs"].shape[1])
    part = {name: jnp.asarray(array[:rows]) for name, array in batch.items()}
    return start_figures(
        config.model, model.vocabulary_size(config.model, vocab_size), jax.random.key(config.seed), part["inputs"],
        targets=part["targets"], weights=part.get("weights"), reset=part.get("reset"),
    )  # fmt: skip


def _figures(config, vocab_size, gradients, params, tokens, targets, weights, reset):
    graphdef = model.graphdef(config, vocab_size)

    def loss(params):
        network = model.merge(graphdef, params)
        hidden, by_layer = network.observe(tokens, _of_layer, reset=reset)
        observed = by_layer, _rms(network.embed(tokens))
        if not gradients:
            return jnp.zeros(()), observed
        total, weight = cross_entropy(hidden, network.head_kernel(), targets, weights, logit_cap=network.config.logit_cap)
        return total / weight, observed

    if not gradients:
        return *loss(params)[1], None, {}
    (value, observed), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    squares = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        squares.setdefault(group(path_name(path)), []).append(jnp.sum(jnp.square(leaf)))
    return *observed, value, {name: jnp.sqrt(sum(squares[name])) for name in GROUPS if name in squares}


def group(path: str) -> str:
    """Which of GROUPS a parameter belongs to: `layers/0_attention/layer/query_kernel` is a mixer's."""
    first, *rest = path.split("/")
    if first == "layers" and rest[1] in ("layer", "short_conv"):
        return "mlp" if is_channel_layer(rest[0].partition("_")[2]) else "mixer"
    if first in ("layers", "final_norm"):
        return "norm"
    return "embedding" if first.startswith("embedding") else "head"


def _of_layer(entering, before, after):
    e, x = (each - jnp.mean(each, axis=(0, 1)) for each in (entering, after))
    return {
        "token_share": jnp.square(jnp.sum(e * x)) / (jnp.sum(e * e) * jnp.sum(x * x)),
        "stream_rms": _rms(after),
        "branch_rms": _rms(after - before),
    }


def _rms(x):
    return jnp.sqrt(jnp.mean(jnp.square(x)))


# -- of several models


def summary(figures: StartFigures) -> dict[str, float]:
    """The few numbers by which starts of models with unlike layers are compared."""
    branches = [rms for name, rms in zip(figures.layers, figures.branch_rms) if not is_channel_layer(layer_name(name))]
    return {
        "token_share_first": figures.token_share[0],
        "token_share_last": figures.token_share[-1],
        "stream_rms_last": figures.stream_rms[-1],
        **({"mixer_branch_rms": math.sqrt(sum(rms * rms for rms in branches) / len(branches))} if branches else {}),
        **{f"gradient_norm_{name}": norm for name, norm in figures.gradient_norms.items()},
    }


MEANINGS = {
    "token_share_first": "token's share of the stream after the first layer",
    "token_share_last": "token's share of the stream after the last layer",
    "stream_rms_last": "rms of the stream after the last layer",
    "mixer_branch_rms": "rms of what the mixers add",
    **{f"gradient_norm_{name}": f"gradient norm of the {name} parameters" for name in GROUPS},
    "position_1_loss": "loss after one token of context, in nats",
}


def differences(starts: Mapping[str, Mapping[str, float]], position_1: Mapping[str, float]) -> list[str]:
    """A sentence for each figure in which mixers start more unlike than the module's thresholds allow.

    Args:
        starts: the `summary` of each mixer, by its label.
        position_1: the trained loss after one token of context, nats, of those that are known.
    """
    found = []
    for name, meaning in MEANINGS.items():
        values = {label: each[name] for label, each in starts.items() if name in each}
        if name == "position_1_loss":
            values = dict(position_1)
        if len(values) < 2:
            continue
        low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
        if _is_unlike(name, values[low], values[high]):
            found.append(f"the {meaning} goes from {values[low]:.3g} ({low}) to {values[high]:.3g} ({high})")
    return found


def _is_unlike(name: str, low: float, high: float) -> bool:
    if not (math.isfinite(low) and math.isfinite(high)):
        return True
    if name == "position_1_loss":
        return high - low > POSITION_1_NATS
    ratio = 1 / SHARE_RATIO if "share" in name else GRADIENT_RATIO if "gradient" in name else RMS_RATIO
    return high > ratio * low


def table(starts: Mapping[str, Mapping[str, float]], room: int | None = None) -> str:
    """The `summary` of each mixer as an aligned table of plain text.

    Args:
        room: columns of the terminal.
    """
    names = [name for name in MEANINGS if any(name in summary for summary in starts.values())]
    heads = ["start", *(name.replace("gradient_norm_", "grad_") for name in names)]
    rows = [[label, *(f"{summary[name]:.3g}" if name in summary else "" for name in names)] for label, summary in starts.items()]
    return screen.table(heads, rows, left=heads, room=room)
