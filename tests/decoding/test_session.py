"""What a model has read is a value: going on from it is going on with the text, however it was cut, forked or saved."""

import dataclasses
import pickle

import jax
import numpy as np
import pytest

from seqmodels import device_memory, model
from seqmodels.decoding import generate, session
from seqmodels.errors import UserError
from seqmodels.evaluation import decode
from tests.decoding.test_generate import VOCABULARY, sampler, small_network
from tests.eight_devices import on_eight_devices

pytestmark = pytest.mark.tools

TEXT = [int(n) for n in np.random.default_rng(3).integers(0, VOCABULARY, 21)]
NAME = "these parameters"


@pytest.fixture(scope="module")
def network():
    """One layer whose state has one size, and one whose state does not."""
    return small_network("linear_attention attention mlp")


@pytest.fixture(scope="module")
def state(network):
    return session.read(*network, TEXT, params_fingerprint=NAME, extra_capacity=64)


def go_on(network, state, max_tokens=8, seed=0, **options):
    return session.continue_from(*network, state, sampler(seed, **options), max_tokens=max_tokens)


def copy(state):
    return dataclasses.replace(state, logits=np.array(state.logits), state=jax.tree.map(np.array, state.state))


def assert_same(left, right, atol=0.0):
    assert dataclasses.replace(left, logits=None, state=None) == dataclasses.replace(right, logits=None, state=None)
    np.testing.assert_allclose(left.logits, right.logits, rtol=0, atol=atol)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), left.state, right.state)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_going_on_is_generating(network, state, temperature):
    draw = sampler(temperature=temperature)
    expected = generate.generate(*network, [TEXT], draw, max_tokens=8)[0]
    assert go_on(network, state, temperature=temperature)[0] == expected
    assert list(session.stream(*network, state, draw, max_tokens=8)) == expected


def test_in_two_parts_it_is_the_same_text(network, state):
    whole, end = go_on(network, state, 16)
    first, middle = go_on(network, state, 8)
    second, end_of_parts = go_on(network, middle, 8)
    assert first + second == whole
    assert_same(end, end_of_parts, atol=1e-5)
    assert end.tokens == (*TEXT, *whole) and end.sampled == 16
    assert list(session.stream(*network, middle, sampler(), max_tokens=8)) == second


def test_a_fork_leaves_the_state_as_it_is(network, state):
    before = copy(state)
    one, other = (go_on(network, state, seed=seed)[0] for seed in (1, 2))
    assert one != other
    list(session.stream(*network, state, sampler(), max_tokens=4))
    session.read(*network, [1, 2], params_fingerprint=NAME, after=state)
    assert_same(state, before)
    assert go_on(network, state, seed=1)[0] == one


def test_reading_on_is_reading_all_of_it(network, state):
    """In pieces of 8, 4 and 1 tokens, with room and without it."""
    more = [int(n) for n in np.random.default_rng(4).integers(0, VOCABULARY, 13)]
    expected, _ = model.merge(*network)(np.asarray([TEXT + more], np.int32))
    roomy = session.read(*network, more, params_fingerprint=NAME, after=state)
    full = session.read(*network, TEXT, params_fingerprint=NAME)
    remade = session.read(*network, more, params_fingerprint=NAME, after=full)
    assert (roomy.capacity, full.capacity, remade.capacity) == (96, 32, 64)
    for after in (roomy, remade):
        assert after.tokens == (*TEXT, *more)
        np.testing.assert_allclose(after.logits, expected[:, -1], rtol=0, atol=1e-4)


def test_a_state_of_one_size_has_room_without_end():
    network = small_network("linear_attention mlp")
    state = session.read(*network, TEXT, params_fingerprint=NAME)
    new, after = go_on(network, state, 40, temperature=0.0)
    assert after.capacity == state.capacity == 32 and len(after.tokens) == 61
    tokens = np.asarray([TEXT + new], np.int32)
    expected = np.argmax(model.merge(*network)(tokens)[0][0, len(TEXT) - 1 : -1], axis=-1)
    assert new == expected.tolist()


def test_a_text_that_ends_has_read_its_end(network, state):
    whole, _ = go_on(network, state)
    stop = whole[3]
    new, after = go_on(network, state, ends=(stop,))
    assert new == whole[: whole.index(stop)] and after.tokens == (*TEXT, *new, stop)
    assert after.sampled == len(new) + 1
    assert go_on(network, state, max_tokens=0) == ([], state)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_saved_and_loaded_it_is_the_same_bits(compute_dtype, tmp_path):
    network = small_network("attention linear_attention", compute_dtype)
    state = session.read(*network, TEXT, params_fingerprint=NAME)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.state)} >= {compute_dtype, "int32"}
    state.save(tmp_path / "state.npz")
    again = session.load(tmp_path / "state.npz", *network, params_fingerprint=NAME)
    assert jax.tree.map(lambda leaf: leaf.dtype, again.state) == jax.tree.map(lambda leaf: leaf.dtype, state.state)
    assert_same(again, state)
    assert not [path for path in tmp_path.iterdir() if path.name != "state.npz"]


def test_files_that_do_not_fit_are_refused(network, state, tmp_path):
    path = tmp_path / "state.npz"

    def load(network=network, params_fingerprint=NAME):
        return session.load(path, *network, params_fingerprint=params_fingerprint)

    with pytest.raises(UserError, match="no file"):
        load()
    state.save(path)
    with pytest.raises(UserError, match="other parameters"):
        load(params_fingerprint="others")
    with pytest.raises(UserError, match="other names or shapes"):
        load(small_network("linear_attention mlp"))
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    for damage in (b"", content[:-200], flipped, b"no state"):
        path.write_bytes(damage)
        with pytest.raises(UserError, match="no saved state, or is damaged"):
            load()
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(UserError, match="no saved state, or is damaged"):
        load()


def test_there_must_be_something_to_read(network):
    with pytest.raises(UserError, match="at least one"):
        session.read(*network, [], params_fingerprint=NAME)


def test_more_tokens_than_the_device_has_room_for_are_refused_with_the_numbers(network, monkeypatch):
    monkeypatch.setattr(device_memory, "available", lambda devices: 10**7)
    for tokens, message in (
        (10**6, "1 texts of 1,000,0.. tokens.* need a state of .* GiB on a device that has"),
        (2**31 - 1, "more than a state"),
    ):
        with pytest.raises(UserError, match=message):
            session.read(*network, TEXT, params_fingerprint=NAME, extra_capacity=tokens)
        with pytest.raises(UserError, match=message):
            generate.generate(*network, [TEXT], sampler(0), max_tokens=tokens)
        with pytest.raises(UserError, match=message):
            decode.read(*network, 50, context=tokens, extra_capacity=1, key=jax.random.key(0))


def test_room_for_the_tokens_is_looked_for_where_a_state_needs_none(monkeypatch):
    """A recurrent state holds any number of tokens; what is written has to be kept all the same."""
    network = small_network("linear_attention mlp")
    state = session.read(*network, TEXT, params_fingerprint=NAME)
    monkeypatch.setattr(device_memory, "available", lambda devices: 10**5)
    with pytest.raises(UserError, match="1 texts of 100,0.. tokens.* on a device that has"):
        session.continue_from(*network, state, sampler(0), max_tokens=10**5)


def test_states_are_equal_where_their_numbers_are(network, state):
    twin = pickle.loads(pickle.dumps(state))
    assert state == twin == copy(state) and hash(state) == hash(twin) and len({state, twin}) == 1
    assert go_on(network, twin) == go_on(network, state)
    assert state != go_on(network, state)[1] and state != "a state"
    assert state != dataclasses.replace(state, logits=state.logits + 1)


def test_a_state_goes_on_where_the_parameters_are():
    rows = on_eight_devices("tests.decoding.moved_states")
    assert rows == [[1, True, True], [0, True, True]]
