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
| E | expanded inner width |
| F | hidden width of a channel MLP |
| C | chunk length |
| W | convolution width, or attention window |
| R | repeats of the layer pattern |
| L | vocabulary size |

Einsum strings write them in lower case.
"""
