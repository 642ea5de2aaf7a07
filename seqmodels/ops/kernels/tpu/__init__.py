"""Kernels for TPUs (Mosaic TPU); ``common.py`` is what they share."""
