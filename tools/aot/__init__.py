"""Compiles kernels and training steps for chips that need not be there: ``python -m tools.aot``."""
