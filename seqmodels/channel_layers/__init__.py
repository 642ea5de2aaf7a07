"""The registry of channel layers is this folder: ``<name>.py`` holds ``Config``, ``Layer`` and ``default_hidden``.

A channel layer mixes the features of one token, and with a state those of the token before. It has the interface of a mixer:
``Layer(config, d_model, *, rngs)`` with ``init_state`` and ``__call__``, and a last projection ``output_kernel``. ``Config`` is a
frozen dataclass whose every field has a default, ``hidden`` among them: F, or None for ``default_hidden(d_model)``.
"""

from seqmodels import registry

DEFAULT = "mlp"  # what follows a mixer where nothing else is said

names, load = registry.of_package(__name__, __path__, "channel layer")
