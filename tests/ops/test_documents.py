"""The shared mechanism of packed documents: numbering, and containment of non-finite values."""

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.ops import documents

RESET = jnp.array([[0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 0, 1]], bool)


def test_segment_zero_continues_the_incoming_state():
    np.testing.assert_array_equal(documents.segment_ids(RESET), [[0, 0, 1, 1, 2, 2], [1, 1, 1, 1, 1, 2]])


def test_same_document_is_equality_of_numbers():
    ids = documents.segment_ids(RESET)
    seen = np.asarray(documents.same_document(ids, ids))
    for row in range(2):
        for t in range(6):
            for s in range(6):
                assert seen[row, t, s] == (int(ids[row, t]) == int(ids[row, s]))


def test_quarantine_removes_whole_vectors_and_marks_them():
    x = jnp.array([[1.0, 2.0], [jnp.nan, 3.0], [4.0, jnp.inf], [-jnp.inf, 5.0]])
    clean, bad = documents.quarantine(x)
    np.testing.assert_array_equal(bad, [False, True, True, True])
    np.testing.assert_array_equal(clean, [[1, 2], [0, 0], [0, 0], [0, 0]])
    clean, bad = documents.quarantine(x, allow_negative_infinity=True)
    np.testing.assert_array_equal(bad, [False, True, True, False])
    np.testing.assert_array_equal(clean[3], [-np.inf, 5])


def test_gradients_of_clean_vectors_pass_unchanged_and_stay_finite():
    x = jnp.array([[1.0, 2.0], [jnp.nan, 3.0]])
    gradient = jax.grad(lambda x: (documents.quarantine(x)[0] ** 2).sum())(x)
    np.testing.assert_array_equal(gradient, [[2, 4], [0, 0]])


def test_bad_values_spread_forward_to_the_end_of_their_document_and_head_only():
    bad = jnp.zeros((2, 6, 3), bool).at[0, 3, 1].set(True).at[1, 2, 0].set(True)
    expected = np.zeros((2, 6, 3), bool)
    expected[0, 3, 1] = True
    expected[1, 2:5, 0] = True
    np.testing.assert_array_equal(documents.nan_reach(bad, RESET), expected)


def test_a_bad_incoming_state_concerns_document_zero_alone():
    carried = jnp.array([[False, True], [True, True]])
    tainted = documents.nan_reach(jnp.zeros((2, 6, 2), bool), RESET, carried=carried)
    expected = np.zeros((2, 6, 2), bool)
    expected[0, :2, 1] = True
    np.testing.assert_array_equal(tainted, expected)


def test_poison_marks_outputs_and_blocks_their_gradient():
    tainted = jnp.array([True, False])
    x = jnp.ones((2, 3), jnp.bfloat16)
    marked = documents.set_nan(x, tainted)
    assert marked.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.isnan(np.asarray(marked, np.float32)), [[True] * 3, [False] * 3])
    gradient = jax.grad(lambda x: jnp.nansum(documents.set_nan(x, tainted) * 2.0))(jnp.ones((2, 3)))
    np.testing.assert_array_equal(gradient, [[0] * 3, [2] * 3])
