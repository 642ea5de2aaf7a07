"""The chunked cross-entropy equals the definition, in value and every gradient, and keeps its memory bound."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.training import loss
from tests.programs import fast_jit


def problem(batch_shape, d_model, vocabulary_size, dtype=jnp.float32):
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(*batch_shape, d_model)), dtype)
    kernel = jnp.asarray(random.normal(size=(d_model, vocabulary_size)), jnp.float32)
    targets = jnp.asarray(random.integers(0, vocabulary_size, size=batch_shape), jnp.int32)
    weights = jnp.asarray(random.uniform(size=batch_shape), jnp.float32)
    return hidden, kernel, targets, weights


def definition(hidden, kernel, targets):
    """-log softmax(h W)[y] for every token, from all logits at once."""
    logits = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def mean_loss(hidden, kernel, targets, weights, *, chunk_tokens=None):
    loss_sum, weight_sum = loss.cross_entropy(hidden, kernel, targets, weights, chunk_tokens=chunk_tokens)
    return loss_sum / weight_sum


def mean_of_definition(hidden, kernel, targets, weights):
    return jnp.sum(definition(hidden, kernel, targets) * weights) / jnp.sum(weights)


def value_and_gradients(function, hidden, kernel, targets, weights):
    return jax.jit(jax.value_and_grad(function, argnums=(0, 1, 3)))(hidden, kernel, targets, weights)


def assert_close(actual, expected, tolerance):
    """Within `tolerance` of the largest entry, leaf by leaf, in the same dtype."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max())


@pytest.mark.parametrize(
    ("batch_shape", "chunk_tokens"),
    [
        ((3, 16), 12),  # whole chunks
        ((3, 16), None),  # one chunk
        ((3, 7), 6),  # a remainder: 7 = 2 + 2 + 2 + 1
        ((5, 4), 1),  # fewer tokens asked for than there are sequences
        ((2, 3, 5), 12),  # microbatches
        ((11,), 4),  # tokens without a batch axis
        ((4, 1), 2),  # a single step
    ],
)
def test_equals_the_definition(batch_shape, chunk_tokens):
    arguments = problem(batch_shape, 8, 37)
    ours = value_and_gradients(functools.partial(mean_loss, chunk_tokens=chunk_tokens), *arguments)
    assert_close(ours, value_and_gradients(mean_of_definition, *arguments), 2e-6)


def test_without_weights_every_token_counts_once():
    hidden, kernel, targets, _ = problem((3, 7), 8, 37)
    loss_sum, weight_sum = loss.cross_entropy(hidden, kernel, targets, chunk_tokens=6)
    assert weight_sum == 21
    np.testing.assert_allclose(loss_sum, jnp.sum(definition(hidden, kernel, targets)), rtol=1e-6)


def test_padding_has_no_influence():
    hidden, kernel, targets, weights = problem((3, 7), 8, 37)
    weights = weights.at[1, 3:].set(0)
    ours = value_and_gradients(functools.partial(mean_loss, chunk_tokens=6), hidden, kernel, targets, weights)
    other = hidden.at[1, 3:].set(5.0), kernel, targets.at[1, 3:].set(0), weights
    loss_of_other, (hidden_gradient, kernel_gradient, _) = value_and_gradients(mean_loss, *other)
    assert_close((loss_of_other, kernel_gradient), (ours[0], ours[1][1]), 1e-6)
    assert not np.any(hidden_gradient[1, 3:])


def test_large_logits_stay_finite():
    hidden, kernel, targets, weights = problem((2, 8), 8, 37)
    ours = value_and_gradients(mean_loss, hidden * 1e3, kernel, targets, weights)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(ours))
    assert_close(ours, value_and_gradients(mean_of_definition, hidden * 1e3, kernel, targets, weights), 2e-6)


def test_bfloat16_hidden_float32_sums():
    arguments = problem((4, 16), 32, 101, jnp.bfloat16)
    ours = value_and_gradients(functools.partial(mean_loss, chunk_tokens=8), *arguments)
    exact = value_and_gradients(mean_of_definition, arguments[0].astype(jnp.float32), *arguments[1:])
    assert ours[1][0].dtype == jnp.bfloat16 and ours[1][1].dtype == jnp.float32
    # The kernel is rounded to 8 bits in use; logits of size sqrt(32) move by 2^-9 of that.
    np.testing.assert_allclose(ours[0], exact[0], rtol=2e-3)
    as_float32 = jax.tree.map(lambda x: x.astype(jnp.float32), ours[1])
    assert_close(as_float32, exact[1], 2e-2)
    # Adding many chunks up in bfloat16 would lose what one chunk keeps.
    whole = value_and_gradients(functools.partial(mean_loss, chunk_tokens=64), *arguments)
    assert_close(ours[1][1], whole[1][1], 1e-6)


def test_tied_embedding():
    """The head may be the transposed embedding, which has a second gradient from the lookup."""
    hidden, kernel, targets, weights = problem((3, 8), 8, 37)
    embedding = kernel.T

    def tied(function):
        return lambda embedding: function(embedding[targets], embedding.T, targets, weights)

    ours, expected = (fast_jit(jax.value_and_grad(tied(function)))(embedding) for function in (mean_loss, mean_of_definition))
    assert_close(ours, expected, 2e-6)


def test_under_checkpoint_scan_and_accumulation():
    """Rematerialised, or summed over microbatches and divided at the end, it is the same loss."""
    hidden, kernel, targets, weights = problem((4, 16), 8, 37)
    plain = value_and_gradients(functools.partial(mean_loss, chunk_tokens=16), hidden, kernel, targets, weights)
    rematerialised = jax.checkpoint(functools.partial(mean_loss, chunk_tokens=16))
    assert_close(value_and_gradients(rematerialised, hidden, kernel, targets, weights), plain, 1e-6)

    @jax.jit
    def accumulated(kernel):
        def add(total, microbatch):
            hidden, targets, weights = microbatch
            sums = lambda kernel: loss.cross_entropy(hidden, kernel, targets, weights, chunk_tokens=8)  # noqa: E731
            (loss_sum, weight_sum), gradient = jax.value_and_grad(sums, has_aux=True)(kernel)
            return jax.tree.map(jnp.add, total, (loss_sum, weight_sum, gradient)), None

        microbatches = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), (hidden, targets, weights))
        start = jnp.float32(0), jnp.float32(0), jnp.zeros_like(kernel)
        (loss_sum, weight_sum, gradient), _ = jax.lax.scan(add, start, microbatches)
        return loss_sum / weight_sum, gradient / weight_sum

    assert_close(accumulated(kernel), (plain[0], plain[1][1]), 2e-6)


@pytest.mark.parametrize("chunk_tokens", [None, 1, 6])
@pytest.mark.parametrize("batch_shape", [(3, 7), (2, 3, 5), (11,)])
def test_token_losses(batch_shape, chunk_tokens):
    hidden, kernel, targets, _ = problem(batch_shape, 8, 37)
    ours = fast_jit(functools.partial(loss.token_losses, chunk_tokens=chunk_tokens))(hidden, kernel, targets)
    assert_close(ours, fast_jit(definition)(hidden, kernel, targets), 2e-6)


def temporary_bytes(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def test_memory_bound_at_32k_words():
    """Three chunks of logits and one kernel gradient at most; the definition holds all logits."""
    tokens, d_model, words = (16, 256), 64, 32_768
    shapes = (
        jax.ShapeDtypeStruct((*tokens, d_model), jnp.float32),
        jax.ShapeDtypeStruct((d_model, words), jnp.float32),
        jax.ShapeDtypeStruct(tokens, jnp.int32),
        jax.ShapeDtypeStruct(tokens, jnp.float32),
    )
    chunk_bytes = 4 * words * max(loss.MIN_CHUNK_TOKENS, loss.CPU_CHUNK_BYTES // (4 * words))
    bound = 3 * chunk_bytes + 4 * d_model * words
    assert temporary_bytes(jax.value_and_grad(mean_loss, argnums=(0, 1)), *shapes) < bound
    assert temporary_bytes(loss.token_losses, *shapes[:3]) < bound
    # The bound means something: it is a quarter of the logits alone, which the definition does hold.
    assert bound < 4 * words * 4096 / 4
    assert temporary_bytes(jax.value_and_grad(mean_of_definition, argnums=(0, 1)), *shapes) > 4 * words * 4096


def test_batch_sharded_over_devices_stays_there():
    """Each device computes its own sequences: the only thing that travels is the kernel gradient and the sums."""
    if jax.device_count() < 2:
        pytest.skip("one device")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    by_batch = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = problem((4, 16), 8, 37)
    expected = value_and_gradients(mean_of_definition, *arguments)
    step = jax.jit(
        jax.value_and_grad(functools.partial(mean_loss, chunk_tokens=16), argnums=(0, 1, 3)),
        in_shardings=(by_batch, replicated, by_batch, by_batch),
        out_shardings=(replicated, (by_batch, replicated, by_batch)),
    )
    assert_close(step(*arguments), expected, 2e-6)
    assert "all-gather" not in step.lower(*arguments).compile().as_text()


def test_capped_logits():
    """cap tanh(logits / cap), in the loss, in its gradients and in the losses of tokens."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, kernel = jax.random.normal(keys[0], (2, 7, 8)), jax.random.normal(keys[1], (8, 11))
    targets = jax.random.randint(keys[2], (2, 7), 0, 11)

    def plain(hidden, kernel):
        logits = 2.0 * jnp.tanh(hidden @ kernel / 2.0)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]

    def ours(hidden, kernel):
        return loss.cross_entropy(hidden, kernel, targets, chunk_tokens=4, logit_cap=2.0)[0]

    expected, gradients = fast_jit(jax.value_and_grad(lambda *args: plain(*args).sum(), argnums=(0, 1)))(hidden, kernel)
    total, found = fast_jit(jax.value_and_grad(ours, argnums=(0, 1)))(hidden, kernel)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for ours_of, theirs in zip(found, gradients):
        np.testing.assert_allclose(ours_of, theirs, atol=1e-5)
    losses = fast_jit(functools.partial(loss.token_losses, chunk_tokens=4, logit_cap=2.0))(hidden, kernel, targets)
    np.testing.assert_allclose(losses, fast_jit(plain)(hidden, kernel), rtol=1e-4, atol=1e-5)
