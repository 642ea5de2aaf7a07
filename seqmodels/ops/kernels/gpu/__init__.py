"""Kernels for NVIDIA GPUs (Mosaic GPU, Hopper); ``common.py`` is what they share."""
