"""Softmax cross-entropy over the vocabulary, without ever holding the logits of the whole batch.

With p_n = softmax(h_n W) and the word y_n that came next, the loss is sum_n w_n * -log p_n[y_n]. Its gradients
need the logits only once more, d_n = w_n * (p_n - onehot(y_n)), dh_n = d_n W^T and dW = sum_n h_n^T d_n, so they
are computed while a chunk of logits is at hand: three matrix products in all, none done twice, and memory for
one chunk instead of [B, T, L] (the idea of Liger-Kernel, Hsu et al. 2024, arXiv:2410.10989, section 3.2, and of
Cut Cross-Entropy, Wijmans et al. 2024, arXiv:2411.09009, section 4).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from seqmodels.layers import matmul_precision, soft_cap
from seqmodels.ops.placement import Split, per_shard, split_of

# Bytes of one chunk's float32 logits, and the fewest tokens in it. On a CPU a chunk should stay in the last-level
# cache, but each chunk also reads and writes the whole kernel gradient, which few tokens do not pay for. Measured
# on 2 cores, forward and backward, B 16, T 256, D 128: at 4,096 tokens in the vocabulary chunks of 128, 256, 1,024 tokens take 75, 69,
# 78 ms (plain form 141); at 32,768 tokens in the vocabulary chunks of 64, 256, 512 take 961, 711, 669 ms (plain form 2,045). An
# accelerator wants products large enough to fill it.
CPU_CHUNK_BYTES = 4 * 2**20
ACCELERATOR_CHUNK_BYTES = 256 * 2**20
MIN_CHUNK_TOKENS = 256


def cross_entropy(
    hidden: Float[Array, "*batch D"],
    head_kernel: Float[Array, "D L"],
    targets: Int[Array, "*batch"],
    weights: Float[Array, "*batch"] | None = None,
    *,
    chunk_tokens: int | None = None,
    logit_cap: float | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sum of the losses in nats, and the sum of the weights; their ratio is the mean loss per token.

    The two are apart so that microbatches, devices and evaluation batches can be added before dividing.
    Logits and softmax are float32 whatever `hidden` is; the products take their operands in `hidden`'s dtype and
    add up in float32. Differentiable once, in reverse mode, in `hidden`, `head_kernel` and `weights`.

    Memory beyond the gradients: under three chunks of logits. A chunk holds `chunk_tokens` tokens (default: what
    fills the chunk bytes above, at least MIN_CHUNK_TOKENS), the same number from every sequence and so at least
    one from each. On a mesh every device does so with its own rows and its own part of the vocabulary: what the devices exchange
    are three numbers per token, and the gradients once (arXiv 1909.08053, section 3).

    With `logit_cap` the logits are those of `layers.soft_cap`.
    """
    loss_sum, _, weight_sum = cross_entropy_and_correct(
        hidden, head_kernel, targets, weights, chunk_tokens=chunk_tokens, logit_cap=logit_cap
    )
    return loss_sum, weight_sum


@per_shard({"hidden": "b t", "head_kernel": "_ v", "targets": "b t", "weights": "b t"}, results=("", "", ""))
def cross_entropy_and_correct(
    hidden: Float[Array, "*batch D"],
    head_kernel: Float[Array, "D L"],
    targets: Int[Array, "*batch"],
    weights: Float[Array, "*batch"] | None = None,
    *,
    chunk_tokens: int | None = None,
    logit_cap: float | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """`cross_entropy` with, between its two, the weighted number of correct predictions: targets whose logit is above every other one.

    That number has no gradient. Not used, it costs nothing in a jitted function.
    """
    if weights is None:
        weights = jnp.ones(targets.shape, jnp.float32)
    weights = weights.astype(jnp.float32)
    chunks = _in_chunks((hidden, targets, weights), targets.shape, head_kernel.shape[1], chunk_tokens)
    sums = (*_sums(logit_cap, split_of("v"), chunks[0], head_kernel, *chunks[1:]), jnp.sum(weights))
    rows = split_of("b").axes + split_of("t").axes
    return lax.psum(sums, rows) if rows else sums


def token_losses(
    hidden: Float[Array, "*batch D"],
    head_kernel: Float[Array, "D L"],
    targets: Int[Array, "*batch"],
    *,
    chunk_tokens: int | None = None,
    logit_cap: float | None = None,
) -> Float[Array, "*batch"]:
    """The loss of every token in nats, for evaluation; same chunks and precision as `cross_entropy`.

    Not meant to be differentiated (it would keep all logits).
    """
    return token_losses_and_correct(hidden, head_kernel, targets, chunk_tokens=chunk_tokens, logit_cap=logit_cap)[0]


@per_shard({"hidden": "b t", "head_kernel": "_ v", "targets": "b t"}, results=("b t", "b t"))
def token_losses_and_correct(
    hidden: Float[Array, "*batch D"],
    head_kernel: Float[Array, "D L"],
    targets: Int[Array, "*batch"],
    *,
    chunk_tokens: int | None = None,
    logit_cap: float | None = None,
) -> tuple[Float[Array, "*batch"], Bool[Array, "*batch"]]:
    """`token_losses`, and where the target's logit is above every other one; not used, that costs nothing when jitted."""
    chunked = _in_chunks((hidden, targets), targets.shape, head_kernel.shape[1], chunk_tokens)
    kernel, vocabulary = head_kernel.astype(hidden.dtype), split_of("v")

    def score(chunk):
        hidden, targets = chunk
        softmax = _softmax(hidden, kernel, targets, logit_cap, vocabulary)
        return softmax.losses, _correct(softmax, vocabulary)

    rows, time = _rows_and_time(targets.shape)

    def whole(x):  # [chunks, rows * time]
        return jnp.moveaxis(x.reshape(len(x), rows, -1), 0, 1).reshape(rows, -1)[:, :time].reshape(targets.shape)

    return jax.tree.map(whole, lax.map(score, chunked))


def _rows_and_time(shape):
    *rows, time = shape
    return math.prod(rows), time


def _in_chunks(arrays, shape, vocabulary_size, chunk_tokens):
    """[*rows, time, ..] -> [chunks, rows * time per chunk, ..]; zeros fill the last chunk."""
    rows, time = _rows_and_time(shape)
    if chunk_tokens is None:
        chunk_bytes = CPU_CHUNK_BYTES if jax.default_backend() == "cpu" else ACCELERATOR_CHUNK_BYTES
        chunk_tokens = max(MIN_CHUNK_TOKENS, chunk_bytes // (4 * vocabulary_size))
    chunks = math.ceil(time / max(1, chunk_tokens // rows))
    chunk_time = math.ceil(time / chunks)

    def split(x):
        x = x.reshape(rows, time, *x.shape[len(shape) :])
        x = jnp.pad(x, [(0, 0), (0, chunks * chunk_time - time)] + [(0, 0)] * (x.ndim - 2))
        x = jnp.moveaxis(x.reshape(rows, chunks, chunk_time, *x.shape[2:]), 1, 0)
        return x.reshape(chunks, rows * chunk_time, *x.shape[3:])

    return tuple(split(x) for x in arrays)


class _Softmax(NamedTuple):
    """Of one chunk; of a vocabulary that is split, logits and exponentials are this device's part."""

    logits: Float[Array, "tokens L"]
    target_logits: Float[Array, " tokens"]
    losses: Float[Array, " tokens"]
    exponentials: Float[Array, "tokens L"]  # exp(logits - the largest); 0 in the padding
    total: Float[Array, " tokens"]  # of the exponentials
    is_target: Bool[Array, "tokens L"] | None  # None: the vocabulary is whole


def _softmax(hidden, kernel, targets, cap, vocabulary: Split) -> _Softmax:
    logits = soft_cap(_product(hidden, kernel), cap)
    if not vocabulary.axes:
        largest = jnp.max(logits, axis=-1)
        exponentials = jnp.exp(logits - largest[:, None])
        total = jnp.sum(exponentials, axis=-1)
        target_logits = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return _Softmax(logits, target_logits, jnp.log(total) + largest - target_logits, exponentials, total, None)
    tokens = lax.axis_index(vocabulary.axes) * kernel.shape[1] + jnp.arange(kernel.shape[1])
    logits = jnp.where(tokens < vocabulary.size, logits, -jnp.inf)
    is_target = targets[:, None] == tokens
    largest = lax.pmax(jnp.max(logits, axis=-1), vocabulary.axes)
    exponentials = jnp.exp(logits - largest[:, None])
    local = jnp.sum(exponentials, axis=-1), jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    total, target_logits = lax.psum(local, vocabulary.axes)
    return _Softmax(logits, target_logits, jnp.log(total) + largest - target_logits, exponentials, total, is_target)


def _correct(softmax: _Softmax, vocabulary: Split):
    """For one chunk: where the target's logit is above every other one, [tokens]. Ties and NaNs are not correct."""
    as_large = jnp.sum(softmax.logits >= softmax.target_logits[:, None], axis=-1)
    return (lax.psum(as_large, vocabulary.axes) if vocabulary.axes else as_large) == 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(cap, vocabulary: Split, hidden, kernel, targets, weights):
    """hidden [chunks, tokens, D], targets and weights [chunks, tokens] -> the sums of losses and of correct predictions."""
    kernel = kernel.astype(hidden.dtype)

    def add_chunk(sums, chunk):
        hidden, targets, weights = chunk
        softmax = _softmax(hidden, kernel, targets, cap, vocabulary)
        loss_sum, correct_sum = sums
        return (
            loss_sum + jnp.sum(softmax.losses * weights),
            correct_sum + jnp.sum(_correct(softmax, vocabulary) * weights),
        ), None

    return lax.scan(add_chunk, (jnp.float32(0), jnp.float32(0)), (hidden, targets, weights))[0]


def _sums_forward(cap, vocabulary, hidden, kernel, targets, weights):
    kernel_in_use = kernel.astype(hidden.dtype)

    def add_chunk(carry, chunk):
        loss_sum, correct_sum, kernel_gradient = carry
        hidden, targets, weights = chunk
        softmax = _softmax(hidden, kernel_in_use, targets, cap, vocabulary)
        is_target = targets[:, None] == jnp.arange(kernel.shape[1]) if softmax.is_target is None else softmax.is_target
        logits_gradient = softmax.exponentials * (weights / softmax.total)[:, None] - jnp.where(is_target, weights[:, None], 0)
        if cap is not None:
            slope = 1 - jnp.square(softmax.logits / cap)  # d/dz cap tanh(z / cap)
            # In the padding of a split vocabulary the logits are minus infinity.
            logits_gradient *= slope if softmax.is_target is None else jnp.where(jnp.isfinite(slope), slope, 0.0)
        logits_gradient = logits_gradient.astype(hidden.dtype)
        # Of a split vocabulary this is one part of a sum, which the gradient of the splitting makes.
        hidden_gradient = _product(logits_gradient, kernel_in_use.T).astype(hidden.dtype)
        kernel_gradient += _transposed_product(hidden, logits_gradient)
        loss_sum += jnp.sum(softmax.losses * weights)
        correct_sum += jnp.sum(_correct(softmax, vocabulary) * weights)
        return (loss_sum, correct_sum, kernel_gradient), (hidden_gradient, softmax.losses)

    start = jnp.float32(0), jnp.float32(0), jnp.zeros(kernel.shape, jnp.float32)
    (loss_sum, correct_sum, kernel_gradient), (hidden_gradient, losses) = lax.scan(add_chunk, start, (hidden, targets, weights))
    return (loss_sum, correct_sum), (hidden_gradient, kernel_gradient.astype(kernel.dtype), losses)


def _sums_backward(cap, vocabulary, gradients, cotangents):
    share = loss = cotangents[0]
    if vocabulary.axes:  # all devices have the sum, and each a share of its cotangent
        loss = lax.psum(share, vocabulary.axes)
    hidden_gradient, kernel_gradient, weights_gradient = (
        (g.astype(jnp.float32) * cotangent).astype(g.dtype) for g, cotangent in zip(gradients, (loss, loss, share))
    )
    return hidden_gradient, kernel_gradient, None, weights_gradient


_sums.defvjp(_sums_forward, _sums_backward)


def _product(x, y):
    """x y, added up in float32."""
    return jnp.matmul(x, y, precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32)


def _transposed_product(x, y):
    """x^T y, added up in float32. XLA multiplies faster on a CPU when x^T is laid out first: a tenth of the loss."""
    return lax.platform_dependent(
        x,
        y,
        cpu=lambda x, y: _product(lax.optimization_barrier(x.T), y),
        default=lambda x, y: _product(x.T, y),
    )
