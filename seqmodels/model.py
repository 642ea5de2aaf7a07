"""The language model: embedding -> a repeated pattern of residual layers -> norm -> head.

A pattern (``seqmodels/pattern.py``) is a line of layers, each a mixer (``seqmodels/mixers``) or a channel layer (``channel_layers``):
``"attention mlp"`` is a Transformer, ``"mamba"`` a pure Mamba, ``"gla mlp gla mlp attention mlp"`` a hybrid; layers may have options
of their own, ``"attention(window=64) mlp attention mlp"``, and mixers may stand side by side, ``"attention+mamba2 mlp"``.
The pattern is repeated ``repeats`` times; parameters of one pattern position are stacked over the repeats
and the stack is run by one ``jax.lax.scan``, so compile time does not grow with depth.

What crosses layers of one kind (HGRN's lower bounds) is passed beside the residual stream: a mixer class that has
``init_shared(layers)`` makes it from all of the model's layers of its kind, and its ``__call__`` takes it as ``shared`` and
returns it third.

One call serves training, prefill, chunked prefill and decoding: ``model(tokens, state)`` returns the logits
and the state after the last token.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from seqmodels.errors import UserError
from seqmodels.layers import (
    NORMS,
    SHORT_CONVS,
    ParallelMixers,
    ShortConv,
    Weight,
    call_mixer,
    dense,
    dropout,
    has_short_conv,
    normal_init,
    scale_output,
    sinusoids,
    soft_cap,
    weight_decay_of,
    without_short_conv,
)
from seqmodels.ops import dispatch
from seqmodels.ops.embedding import embedding
from seqmodels.ops.placement import constrain_activations
from seqmodels.pattern import is_channel_layer, layer_class, layer_name, names_in_pattern, parse_pattern, parts_of, with_options
from seqmodels.ranges import AtLeast, AtMost, Below, Checked, Count, Epsilon, NonNegative, OneOf, Positive, Size

READOUTS = ("each", "last")
COMPUTE_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}

UNROLL_UP_TO = 8  # repeats

EMBEDDING_STDDEV = 0.02
TIED_HEAD_WIDTH = 128  # from this width on a tied head starts with a smaller final norm (LanguageModel)
START_BATCH, START_LENGTH = 4, 64  # random tokens on which the branches are scaled at the start

State = Any


@dataclasses.dataclass(frozen=True)
class ModelConfig(Checked, where="model"):
    """What the network is."""

    # rows of the embedding; None: as many as the tokenizer has tokens
    vocab_size: Annotated[int | None, AtLeast(1), AtMost(2**24)] = None
    d_model: Size = 128  # D, width of the residual stream
    pattern: str = "attention mlp"  # layers in order, of config.model.mixers and channel_layers
    repeats: Annotated[Count, AtMost(2**16)] = 4  # R, how often the pattern is repeated
    # short convolutions: mixers' "own", "none", or "all": x + conv(x) before mixers without one
    short_conv: Annotated[str, OneOf(SHORT_CONVS)] = "own"
    tie_embeddings: bool = True  # the head is the embedding's transpose
    embedding_norm: bool = True  # a norm on the embedding: each token enters the residual stream with rms 1
    # each of n layers starts by adding rms branch_rms / sqrt(n); None: as initialised
    branch_rms: NonNegative | None = 0.3
    norm: Annotated[str, OneOf(NORMS)] = "rms"  # between layers: "rms" (RMSNorm) or "layer" (LayerNorm with a bias)
    norm_eps: Epsilon = 1e-5  # epsilon of the norms between layers
    logit_cap: Positive | None = None  # logits go through cap tanh(. / cap); None: as they are
    # logits at "each" position; "last": all from the last one's vector, for the task "compression"
    readout: Annotated[str, OneOf(READOUTS)] = "each"
    dropout: Annotated[float, AtLeast(0), Below(1)] = 0.0  # on what a layer adds to the residual stream
    remat: bool = False  # recompute each repeat (of one: each layer) in the backward pass: less memory, more time
    # of activations (float32, bfloat16, float16); parameters stay float32
    compute_dtype: Annotated[str, OneOf(COMPUTE_DTYPES)] = "float32"
    channel_layers: tuple[tuple[str, Any], ...] = ()  # (name, its Config) for every channel layer in the pattern
    mixers: tuple[tuple[str, Any], ...] = ()  # (name, its Config) for every mixer in the pattern

    def __post_init__(self):
        super().__post_init__()
        configs_of = {}
        for spec in parse_pattern(self.pattern):
            for name, options in parts_of(spec):
                configs_of.setdefault(name, set()).add(self.layer_config(name, options))
        for name, configs in configs_of.items():
            if len(configs) > 1 and hasattr(layer_class(name), "init_shared"):
                raise UserError(f"model.pattern: the layers of {name} share parameters, so all must have the same options")

    def layer_config(self, name: str, options: tuple[tuple[str, Any], ...]) -> Any:
        """The Config of a layer of the pattern: the options of its kind, and over them those of its own.

        Raises:
          UserError: there are no options of its kind, or one of its own cannot be.
        """
        kind = "channel_layers" if is_channel_layer(name) else "mixers"
        configured = dict(getattr(self, kind))
        if name not in configured:
            raise UserError(f"model.pattern uses {name!r}, but model.{kind} has no options for it")
        chosen = with_options(configured[name], name, options)
        if self.short_conv != "none":
            return chosen
        if "conv_width" in dict(options):
            raise UserError(f"model.pattern gives {name} a conv_width, and model.short_conv=none takes it away: leave one out")
        return without_short_conv(chosen)


class ShortConvState(NamedTuple):
    """Of a layer with a ``ShortConv``: its last inputs, and the state of the layer behind it."""

    tail: Float[Array, "B tail D"]
    layer: State


class UnstackedState(NamedTuple):
    """A state for one-token steps: ``layers[r][p]`` is the state of pattern position p in repeat r.

    Scanning a step over stacked states copies every KV cache once a token; unstacked, a step writes in place.
    """

    layers: tuple[tuple[State, ...], ...]


class ResidualLayer(nnx.Module):
    """x + dropout(layer(norm(x))): one position of the pattern.

    With ``short_conv`` "all" a layer whose mixers have no convolution of their own reads norm(x) + conv(norm(x)); its state is
    then a pair, of the convolution and of the layer.
    """

    def __init__(self, spec: str, config: ModelConfig, layer_index: Array, *, rngs: nnx.Rngs):
        num_layers = config.repeats * len(parse_pattern(config.pattern))
        self.name = layer_name(spec)
        self.norm = NORMS[config.norm](config.d_model, eps=config.norm_eps, rngs=rngs)
        parts = [(name, _layer(name, options, config, layer_index, num_layers, rngs=rngs)) for name, options in parts_of(spec)]
        if len(parts) == 1:
            self.layer = parts[0][1]
        else:
            self.layer = ParallelMixers(parts, config.d_model, eps=config.norm_eps, rngs=rngs)
        # Scaled so, the residual stream keeps its variance whatever the depth (GPT-2's initialisation), for every
        # architecture alike.
        scale_output(self.layer, num_layers**-0.5)
        self.dropout_rate = config.dropout
        if _has_short_conv_before(spec, config):
            self.short_conv = ShortConv(config.d_model, rngs=rngs)

    def init_state(self, batch_size: int, max_len: int) -> State:
        """The state of "nothing read yet" with room for ``max_len`` tokens."""
        state = self.layer.init_state(batch_size, max_len)
        return ShortConvState(self.short_conv.init_state(batch_size), state) if hasattr(self, "short_conv") else state

    def read(self, x, tail=None, *, reset=None):
        """(what the layer's mixers or channel layer read of the residual stream x, the convolution's state or None)."""
        return self.short_conv(self.norm(x), tail, reset=reset) if hasattr(self, "short_conv") else (self.norm(x), None)

    def parts(self) -> list[tuple[str, nnx.Module]]:
        """The layers that stand side by side here, by name; mostly one."""
        return self.layer.parts() if isinstance(self.layer, ParallelMixers) else [(self.name, self.layer)]

    def __call__(self, x, state, shared, *, reset, dropout_key):
        """``shared``: what layers of one kind pass on to the next, by the name of the kind; returned as this one leaves it."""
        tail, state = state if isinstance(state, ShortConvState) else (None, state)
        read, tail = self.read(x, tail, reset=reset)
        if isinstance(self.layer, ParallelMixers):
            y, state, shared = self.layer(read, state, shared, reset=reset)
        else:
            y, state, shared = call_mixer(self.name, self.layer, read, state, shared, reset=reset)
        state = state if tail is None else ShortConvState(tail, state)
        return constrain_activations(x + dropout(y, self.dropout_rate, dropout_key)), state, shared


def _has_short_conv_before(spec, config):
    """Whether a layer of the pattern has a ShortConv: with "all", one with a mixer that has no convolution of its own."""
    return config.short_conv == "all" and not all(
        is_channel_layer(name) or has_short_conv(config.layer_config(name, options)) for name, options in parts_of(spec)
    )


def _layer(name, options, config, layer_index, num_layers, *, rngs):
    """One mixer or channel layer, with those of the optional arguments that it takes."""
    layer = layer_class(name)
    offered = {
        "layer_index": layer_index,
        "num_layers": num_layers,
        "compute_dtype": COMPUTE_DTYPES[config.compute_dtype],
    }
    wanted = inspect.signature(layer.__init__).parameters
    optional = {key: value for key, value in offered.items() if key in wanted}
    return layer(config.layer_config(name, options), config.d_model, rngs=rngs, **optional)


def _stacked_layers(config: ModelConfig, rngs: nnx.Rngs) -> nnx.Dict:
    """The residual layers by ``<position>_<name>``, the parameters of each stacked over the repeats, [R, ...]."""
    specs = parse_pattern(config.pattern)
    keys = [jax.random.split(rngs.params(), config.repeats) for _ in specs]
    indices = jnp.arange(config.repeats * len(specs), dtype=jnp.int32).reshape(config.repeats, len(specs)).T
    by_position = {}
    # All layers of a kind at once: a pattern of 56 layers of three kinds compiles three initialisations.
    for spec in dict.fromkeys(specs):
        positions = [position for position, other in enumerate(specs) if other == spec]

        def build(key, index, spec=spec):
            return ResidualLayer(spec, config, index, rngs=nnx.Rngs(params=key))

        built = jax.vmap(jax.vmap(build))(jnp.stack([keys[at] for at in positions]), indices[jnp.array(positions)])
        for place, position in enumerate(positions):
            by_position[position] = jax.tree.map(lambda leaf, place=place: leaf[place], built)
    # Named, not listed: list entries become integer keys, which checkpoints and JSON do not keep.
    return nnx.Dict({f"{position}_{layer_name(spec)}": by_position[position] for position, spec in enumerate(specs)})


class LanguageModel(nnx.Module):
    """tokens -> logits, with state in and state out.

    The start is the same for all layer types. With ``embedding_norm`` each token enters the residual stream with rms 1.
    With ``branch_rms`` = c each of the n layers adds a vector of rms c / sqrt(n), measured on random tokens and set by
    scaling the layer's output kernel (layer-sequential scaling as in LSUV, arXiv:1511.06422, applied to branch outputs).
    What a mixer's paper prescribes inside the mixer is left as it is. A tied head sees the token's own embedding in the
    stream: its logit is about 0.02 D at first, and the loss at width 1,024 would begin at 19.7 nats instead of ln L.
    The final norm therefore starts at 128 / D for widths above 128, if the embedding is normed and the head tied.

    Args:
      config: the network.
      vocab_size: L, rows of the embedding (see ``vocabulary_size``).
      rngs: initialisation keys; ``rngs.params`` is used.
      scale_branches: False leaves the branches unscaled: shapes need no forward pass.

    Raises:
      UserError: sizes that do not fit together.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs, scale_branches: bool = True):
        self.config = config
        self.vocab_size = vocab_size
        self.embedding = Weight(normal_init(rngs.params(), (vocab_size, config.d_model), stddev=EMBEDDING_STDDEV))
        if config.embedding_norm:
            self.embedding_norm = NORMS[config.norm](config.d_model, eps=config.norm_eps, rngs=rngs)
        self.layers = _stacked_layers(config, rngs)
        self.final_norm = NORMS[config.norm](config.d_model, eps=config.norm_eps, rngs=rngs)
        if config.embedding_norm and config.tie_embeddings:
            self.final_norm.scale[...] = self.final_norm.scale[...] * min(1.0, TIED_HEAD_WIDTH / config.d_model)
        if config.readout == "last":
            self.readout_kernel = Weight(
                normal_init(rngs.params(), (config.d_model, config.d_model), stddev=config.d_model**-0.5)
            )
            self.readout_bias = nnx.Param(jnp.zeros(config.d_model))
        if not config.tie_embeddings:
            self.output_kernel = Weight(normal_init(rngs.params(), (config.d_model, vocab_size), stddev=EMBEDDING_STDDEV))
        if config.branch_rms is not None and scale_branches:
            tokens = jax.random.randint(rngs.params(), (START_BATCH, START_LENGTH), 0, vocab_size)
            for layer, scale in zip(self._layers(), self._branch_scales(tokens)):
                scale_output(layer.layer, scale)

    def _branch_scales(self, tokens: Int[Array, "B T"]) -> tuple[Float[Array, " R"], ...]:
        """Factors for what the layers put out, one array per pattern position: with them each adds the wanted rms.

        A layer is measured on the stream that the scaled layers before it leave. Float32, whatever the compute dtype.
        """
        layers = self._layers()
        wanted = self.config.branch_rms * (self.config.repeats * len(layers)) ** -0.5

        def repeat(x_and_shared, layers):
            x, shared = x_and_shared
            scales = []
            for layer in layers:
                total, _, shared = layer(x, None, shared, reset=None, dropout_key=None)
                branch = total - x
                rms = jnp.sqrt(jnp.mean(jnp.square(branch)))
                scales.append(jnp.where(rms > 0, wanted / jnp.where(rms > 0, rms, 1.0), 1.0))
                x = x + scales[-1] * branch
            return (x, shared), tuple(scales)

        with dispatch.unrecorded():
            return jax.lax.scan(repeat, (self._embed(tokens, jnp.float32), self._shared()), layers)[1]

    def init_state(self, batch_size: int, max_len: int) -> tuple[State, ...]:
        """The state of "nothing read yet": one entry per pattern position, leaves stacked [R, B, ...].

        Args:
          batch_size: B.
          max_len: how many live tokens the state must hold (a reset frees the older ones).
        """

        def stacked(layer):
            single = layer.init_state(batch_size, max_len)
            return jax.tree.map(lambda leaf: jnp.repeat(leaf[None], self.config.repeats, axis=0), single)

        return tuple(stacked(layer) for layer in self._layers())

    def unstack_state(self, state: tuple[State, ...]) -> UnstackedState:
        """The same state for one-token steps (see UnstackedState)."""
        return UnstackedState(tuple(jax.tree.map(lambda leaf, r=r: leaf[r], state) for r in range(self.config.repeats)))

    def stack_state(self, state: UnstackedState) -> tuple[State, ...]:
        """The inverse of ``unstack_state``."""
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *state.layers)

    def _layers(self) -> tuple[ResidualLayer, ...]:
        specs = parse_pattern(self.config.pattern)
        return tuple(self.layers[f"{position}_{layer_name(spec)}"] for position, spec in enumerate(specs))

    def _shared(self) -> dict[str, Any]:
        """What the first layer of each kind starts from; kinds whose layers pass nothing on have no entry."""
        by_name = {}
        for layer in self._layers():
            for name, part in layer.parts():
                by_name.setdefault(name, []).append(part)
        return {
            name: type(layers[0]).init_shared(
                # leaves [R, ...] of the positions, interleaved to [layers, ...] in order of depth
                jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:]), *layers)
            )
            for name, layers in by_name.items()
            if hasattr(type(layers[0]), "init_shared")
        }

    def head_kernel(self) -> Float[Array, "D L"]:
        """The output projection: the embedding's transpose when tied."""
        return self.embedding[...].T if self.config.tie_embeddings else self.output_kernel[...]

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What the first layer reads."""
        return self._embed(tokens, COMPUTE_DTYPES[self.config.compute_dtype])

    def _embed(self, tokens, dtype):
        with jax.named_scope("embedding"):
            x = embedding(self.embedding[...], tokens).astype(dtype)
            return constrain_activations(self.embedding_norm(x) if self.config.embedding_norm else x)

    def features(
        self,
        tokens: Int[Array, "B T"],
        state: tuple[State, ...] | UnstackedState | None = None,
        *,
        reset: Bool[Array, "B T"] | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[State, ...] | UnstackedState]:
        """All layers but the head: the normalised hidden states, and the state after the last token.

        With the readout "last", all T positions of this call read the hidden state after the last token and their own number
        (MAD's compression, arXiv:2403.17844): gelu(W (h_T + sinusoid_t) + b), to which the head is the second layer.
        """
        x = self.embed(tokens)
        if isinstance(state, UnstackedState):
            x, state = self._run_unrolled(x, state, reset)
        else:
            x, state = self._run_scanned(x, state, reset, dropout_key)
        return self._read_out(x), state

    @jax.named_scope("read_out")
    def _read_out(self, x):
        x = self.final_norm(x)
        if self.config.readout == "last":
            queries = x[:, -1:] + sinusoids(x.shape[1], self.config.d_model).astype(x.dtype)
            x = jax.nn.gelu(dense(queries, self.readout_kernel[...]) + self.readout_bias[...].astype(x.dtype))
        return x

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        state: tuple[State, ...] | UnstackedState | None = None,
        *,
        reset: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T L"], tuple[State, ...] | UnstackedState]:
        """Next-token logits in float32 for each position, and the state after the last token.

        Args:
          tokens: ids; any T >= 1.
          state: from ``init_state`` or an earlier call; None means "nothing read yet" with room for T tokens.
          reset: True where a new document starts.
        """
        hidden, state = self.features(tokens, state, reset=reset)
        return self.logits(hidden), state

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... L"]:
        """The head alone, in float32: next-token logits of hidden states from ``features``."""
        return soft_cap(dense(hidden, self.head_kernel()).astype(jnp.float32), self.config.logit_cap)

    def attention_weights(self, tokens: Int[Array, "B T"]) -> Float[Array, "layers B H T T"]:
        """What every layer of softmax attention looks at, in the order of depth, each text read from an empty state.

        Rows are queries, columns keys; float32. To look at, not to train with: it holds every pair of tokens.

        Raises:
          UserError: the pattern has no mixer that weighs tokens.
        """
        check_attention(self.config.pattern)
        x, shared, found = self.embed(tokens), self._shared(), []
        for repeat in range(self.config.repeats):
            for layer in jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], self._layers()):
                read, _ = layer.read(x)
                found += [part.weights(read) for _, part in layer.parts() if hasattr(part, "weights")]
                x, _, shared = layer(x, None, shared, reset=None, dropout_key=None)
        return jnp.stack(found)

    def observe(
        self,
        tokens: Int[Array, "B T"],
        function: Callable[[Float[Array, "B T D"], Float[Array, "B T D"], Float[Array, "B T D"]], Any],
        *,
        reset: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """``features`` from an empty state, and what ``function`` says of every residual layer, stacked [layers, ...] by depth.

        Args:
          tokens: ids; any T >= 1.
          function: of the residual stream as it enters the first layer, before this layer, and after this layer.
          reset: True where a new document starts.
        """
        entering = self.embed(tokens)

        def repeat(carry, layers):
            x, shared = carry
            found = []
            for layer in layers:
                before = x
                x, _, shared = layer(x, None, shared, reset=reset, dropout_key=None)
                found.append(function(entering, before, x))
            return (x, shared), jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

        (x, _), found = jax.lax.scan(repeat, (entering, self._shared()), self._layers())
        return self._read_out(x), jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)

    def _run_scanned(self, x, state, reset, dropout_key):
        def run_layer(layer, x, state, shared, key):
            return layer(x, state, shared, reset=reset, dropout_key=key)

        # Of one repeat, a long hybrid, the layers are what there is to recompute. (A CPU's compiler has no loop to keep
        # it from finding the recomputation and undoing it: measured, 8 % less memory there.)
        if self.config.remat and self.config.repeats == 1:
            run_layer = jax.checkpoint(run_layer)

        def repeat(x_and_shared, inputs):
            x, shared = x_and_shared
            layers, states, index = inputs
            new_states = []
            for position, layer in enumerate(layers):
                key = None
                if dropout_key is not None:
                    key = jax.random.fold_in(jax.random.fold_in(dropout_key, index), position)
                with jax.named_scope(f"{position}_{layer.name}"):  # for profiles, and training.divergence
                    x, new_state, shared = run_layer(layer, x, None if states is None else states[position], shared, key)
                new_states.append(new_state)
            return (x, shared), tuple(new_states)

        if self.config.remat and self.config.repeats > 1:
            repeat = jax.checkpoint(repeat, prevent_cse=False)
        indices = jnp.arange(self.config.repeats, dtype=jnp.int32)
        # A loop stacks what the backward pass needs: on a CPU, copies worth a tenth of the step. Few repeats are
        # cheaper written out and compile as fast (4 repeats: 3.3 s of CPU time written out, 3.6 as a loop). With
        # remat a loop it stays: inlined, XLA would find and undo the recomputation.
        unroll = self.config.repeats if self.config.repeats <= UNROLL_UP_TO and not self.config.remat else 1
        inputs = (self._layers(), state, indices)
        (x, _), state = jax.lax.scan(repeat, (x, self._shared()), inputs, unroll=unroll)
        return x, state

    def _run_unrolled(self, x, state, reset):
        new_layers, shared = [], self._shared()
        for repeat in range(self.config.repeats):
            layers = jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], self._layers())
            new_states = []
            for layer, old in zip(layers, state.layers[repeat]):
                x, new, shared = layer(x, old, shared, reset=reset, dropout_key=None)
                new_states.append(new)
            new_layers.append(tuple(new_states))
        return x, UnstackedState(tuple(new_layers))


def check_attention(pattern: str) -> None:
    """Raises UserError where a pattern has no mixer that weighs tokens, and so no ``LanguageModel.attention_weights``."""
    if not any(hasattr(layer_class(name), "weights") for name in names_in_pattern(pattern)):
        raise UserError(f"model.pattern={pattern!r} has no attention, and so no attention weights")


def vocabulary_size(config: ModelConfig, data_vocab_size: int | None) -> int:
    """L: the config's, or else one row for each of the data's tokens (None: not known).

    Raises:
      UserError: neither says it, or the config has fewer rows than the data have tokens.
    """
    if config.vocab_size is None and data_vocab_size is None:
        raise UserError("model.vocab_size must be given where there is no tokenizer")
    if config.vocab_size is None:
        return data_vocab_size
    if data_vocab_size is not None and data_vocab_size > config.vocab_size:
        raise UserError(f"model.vocab_size={config.vocab_size} is less than the tokenizer's {data_vocab_size} tokens")
    return config.vocab_size


def graphdef(config: ModelConfig, vocab_size: int) -> nnx.GraphDef:
    """The model's structure without its arrays; ``nnx.merge(graphdef, params)`` gives the model back.

    Raises:
      UserError: the config's sizes do not fit together.
    """
    model = _shapes(config, vocab_size)
    definition, params, rest = nnx.split(model, nnx.Param, ...)
    if jax.tree.leaves(rest):
        raise ValueError(f"a module holds arrays that are not nnx.Param: {nnx.to_pure_dict(rest)}")
    del params
    return definition


def init_params(config: ModelConfig, vocab_size: int, key: Array) -> dict:
    """Freshly initialised parameters, a nested dict of float32 arrays (jit me)."""
    return _pure_params(LanguageModel(config, vocab_size, rngs=nnx.Rngs(params=key)))


def param_shapes(config: ModelConfig, vocab_size: int) -> dict:
    """The shapes and dtypes of ``init_params``, without a forward pass: a nested dict of jax.ShapeDtypeStruct."""
    return _pure_params(_shapes(config, vocab_size))


def weight_decay_mask(config: ModelConfig, vocab_size: int) -> dict:
    """True for the parameters that weight decay applies to: a nested dict like ``init_params``.

    Raises:
      ValueError: a matrix does not say whether it does (``layers/parameters.py``).
    """
    return weight_decay_of(_shapes(config, vocab_size), stacked="layers")


def merge(definition: nnx.GraphDef, params: dict) -> LanguageModel:
    """The model of a structure and its parameters (inside a jitted function)."""
    return nnx.merge(definition, params)


@functools.lru_cache(maxsize=16)  # a run asks three times, and builds its Trainer once or twice
def _shapes(config: ModelConfig, vocab_size: int) -> LanguageModel:
    """The model with shapes for arrays, to be read alone."""

    def build():
        return LanguageModel(config, vocab_size, rngs=nnx.Rngs(params=jax.random.key(0)), scale_branches=False)

    return nnx.eval_shape(build)


def _pure_params(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))
