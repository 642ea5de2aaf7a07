"""The legend of dimension letters. Annotations, docstrings and einsum strings all use these.

| letter | meaning |
|---|---|
| B | batch |
| T | time (tokens) |
| D | model width, ``d_model`` |
| H | heads |
| G | key/value heads (a divisor of H) |
| K | key and query width per head |
| V | value width per head |
| S | capacity of a key/value cache, in tokens |
| N | state size of an SSM channel |
| M | complex modes of an SSM channel, N = 2 M |
| P | width of an SSM's head (Mamba-2, H3) |
| E | expanded inner width |
| F | hidden width of a channel MLP |
| C | chunk length |
| W | convolution width, or attention window |
| R | repeats: of the layer pattern, or heads that share a key/value head, R = H / G |
| L | vocabulary size |
| X | another width, said where it is used |

Other sizes have names of several letters, or small ones. Einsum strings write all in lower case.
``tests/contract/test_annotations.py`` holds annotations to this legend, and arrays to the annotations.
"""
