"""How fast this is: suites of measurements (``scripts/benchmark.py`` runs them) and their results."""
