"""A state that is on other devices than the parameters: ``python -m tests.decoding.moved_states``, JSON lines."""

import dataclasses
import json

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seqmodels.decoding import session
from tests.decoding.test_generate import sampler, small_network

NAME = "these parameters"


def put(state: session.DecodingState, device: jax.Device) -> session.DecodingState:
    """The state on one device."""
    return dataclasses.replace(state, logits=jax.device_put(state.logits, device), state=jax.device_put(state.state, device))


def main() -> None:
    graphdef, params = small_network("linear_attention attention mlp", repeats=1)
    first, second, *_ = jax.devices()
    here, on_both = (
        (graphdef, jax.device_put(params, NamedSharding(Mesh(devices, ("data",)), PartitionSpec())))
        for devices in ([first], [first, second])
    )
    state = session.read(*here, [1, 2, 3], params_fingerprint=NAME, extra_capacity=8)
    expected, _ = session.continue_from(*here, state, sampler(), max_tokens=4)
    for network, place in ((here, second), (on_both, first)):
        moved = put(state, place)
        told = session.continue_from(*network, moved, sampler(), max_tokens=4)[0]
        print(json.dumps([place.id, moved == state, told == expected]), flush=True)


if __name__ == "__main__":
    main()
