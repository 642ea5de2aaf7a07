"""The one exception that means "a person asked for something that cannot be done"."""


class UserError(ValueError):
    """A mistake in a config, a flag, a file or a checkpoint.

    The message is one line: what is wrong, and what to do about it. Entry points print it as
    ``error: <message>`` and exit with status 1, without a traceback.
    """
