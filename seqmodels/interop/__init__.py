"""Checkpoints of other libraries, in and out: transformers' and flash-linear-attention's.

A kind of checkpoint is a table in ``kinds/`` (their fields and tensors, our fields and parameters), read in both directions by
``table.py``. ``checkpoint.py`` goes between a folder as those libraries save it and a run folder of ours.
"""
