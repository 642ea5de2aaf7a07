"""One file per ``--suite`` of ``scripts/benchmark.py``: ``add_flags(group)`` and ``run(options)``."""
