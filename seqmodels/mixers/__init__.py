"""The registry of sequence mixers is this folder: ``<name>.py`` holds ``Config`` and ``Mixer``.

Adding an architecture is adding one file. It holds a header docstring (equation, paper, state size, numerical trap) and

    Config      a frozen dataclass whose every field has a default
    Mixer(config, d_model, *, rngs)
                config: these options; d_model: D, width of the residual stream; rngs: initialisation keys, of which ``rngs.params`` is
                used. Raises UserError for sizes that do not fit together. Of layer_index, num_layers and compute_dtype the model
                passes what the signature names
    .init_state(batch_size, max_len) -> state
                "nothing read yet", with room for max_len live tokens
    .__call__(x, state=None, *, reset=None) -> (y, state)
                mixes T steps that follow those of ``state``: x, y [B, T, D]; ``reset`` [B, T] marks where new documents start

It may name the layers that make one repeat of a model in its paper as ``PATTERN``, if those are not itself and an MLP.
"""

from seqmodels import channel_layers, registry

names, load = registry.of_package(__name__, __path__, "mixer")


def pattern(name: str, channel_layer: str = channel_layers.DEFAULT) -> str:
    """The layers that stand where a Transformer has attention and MLP, as the mixer's paper has them: its ``PATTERN``.

    Without one they are the mixer and ``channel_layer``.

    Raises UserError for an unknown name.
    """
    return getattr(load(name), "PATTERN", f"{name} {channel_layer}")
