"""The registry of sequence mixers is this folder: ``<name>.py`` holds ``Config`` and ``Mixer``.

Adding an architecture is adding one file. The file holds a header docstring (equation, paper, state
size, numerical trap), a frozen dataclass ``Config`` whose every field has a default, and
``Mixer(config, d_model, *, rngs)`` with ``init_state`` and ``__call__`` (DESIGN in the README). It may name the layers
that make one repeat of a model in its paper as ``PATTERN``, if those are not itself and an MLP.
"""

from seqmodels import channel_layers, registry

names, load = registry.of_package(__name__, __path__, "mixer")


def pattern(name: str, channel_layer: str = channel_layers.DEFAULT) -> str:
    """The layers that stand where a Transformer has attention and MLP, as the mixer's paper has them: its ``PATTERN``.

    Without one they are the mixer and ``channel_layer``.

    Raises UserError for an unknown name.
    """
    return getattr(load(name), "PATTERN", f"{name} {channel_layer}")
