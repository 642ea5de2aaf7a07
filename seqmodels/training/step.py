"""The pure step functions: one optimizer step, and the loss of one validation batch."""

import functools

import jax
import jax.numpy as jnp
import optax

from seqmodels import model
from seqmodels.training.loss import cross_entropy_and_correct, token_losses_and_correct


def loss_sum(graphdef, params, batch, dropout_key):
    """The sum of the weighted targets' losses in nats, and ``(correct, weight)``: targets hit, and their weight."""
    network = model.merge(graphdef, params)
    hidden, _ = network.features(batch["inputs"], reset=batch.get("reset"), dropout_key=dropout_key)
    with jax.named_scope("loss"):  # scopes are for profiles, and training.divergence
        total, correct, weight = cross_entropy_and_correct(
            hidden, network.head_kernel(), batch["targets"], batch.get("weights"), logit_cap=network.config.logit_cap
        )
    return total, (correct, weight)


def train_step(
    graphdef, optimizer, schedule, state, batch, *,
    accumulation_steps: int, dropout_seed: int | None, labelled: bool, skip_nonfinite: bool = False,
):  # fmt: skip
    """One optimizer step on the mean loss of the batch's weighted targets.

    Args:
      graphdef: the model's structure.
      optimizer: an optax transformation.
      schedule: step -> learning rate, reported with the metrics.
      state: ``{"params", "optimizer", "step"}``.
      batch: inputs, targets [B, T] int32; optionally reset [B, T] bool, weights [B, T] float32.
      accumulation_steps: micro-batches, each B / accumulation_steps rows.
      dropout_seed: None means no dropout.
      labelled: whether the targets are labels, and accuracy is wanted.
      skip_nonfinite: leave parameters and optimizer as they are where the loss, the gradient or what the step makes of
        the parameters is not finite.

    Returns:
      the next state, and loss (nats per token), gradient_norm (before clipping), learning_rate and, if labelled,
      accuracy (the share of targets hit); with skip_nonfinite, skipped (whether the step was, 0 or 1).
    """
    params = state["params"]
    value_and_grad = jax.value_and_grad(functools.partial(loss_sum, graphdef), has_aux=True)
    key = None if dropout_seed is None else jax.random.fold_in(jax.random.key(dropout_seed), state["step"])

    if accumulation_steps == 1:
        (total, (correct, weight)), gradients = value_and_grad(params, batch, key)
    else:
        # Rows are dealt out in turn, so that each micro-batch stays spread over the devices as the batch was.
        micro_batches = jax.tree.map(lambda leaf: leaf.reshape(-1, accumulation_steps, *leaf.shape[1:]).swapaxes(0, 1), batch)

        def accumulate(sums, inputs):
            index, micro_batch = inputs
            micro_key = None if key is None else jax.random.fold_in(key, index)
            (total, (correct, weight)), gradients = value_and_grad(params, micro_batch, micro_key)
            return jax.tree.map(jnp.add, sums, (total, correct, weight, gradients)), None

        zeros = (jnp.zeros(()), jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        indices = jnp.arange(accumulation_steps)
        (total, correct, weight, gradients), _ = jax.lax.scan(accumulate, zeros, (indices, micro_batches))

    weight = jnp.maximum(weight, 1.0)  # a batch of padding alone moves nothing
    gradients = jax.tree.map(lambda leaf: leaf / weight, gradients)
    with jax.named_scope("optimizer"):
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], params)
    metrics = {
        "loss": total / weight,
        "gradient_norm": optax.tree.norm(gradients),
        "learning_rate": schedule(state["step"]),
    }
    if labelled:
        metrics["accuracy"] = correct / weight
    with jax.named_scope("optimizer"):
        moved = {"params": optax.apply_updates(params, updates), "optimizer": optimizer_state}
    if skip_nonfinite:
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        for leaf in jax.tree.leaves(moved["params"]):
            finite &= jnp.isfinite(leaf).all()

        def chosen(new, old):  # the optimizer's counts go on: the schedule is one of steps
            return jnp.where(finite, new, old) if jnp.issubdtype(new.dtype, jnp.inexact) else new

        moved = jax.tree.map(chosen, moved, {name: state[name] for name in moved})
        metrics["skipped"] = 1 - finite
    return {**moved, "step": state["step"] + 1}, metrics


def eval_step(graphdef, params, batch, *, labelled: bool):
    """Weighted sums over the batch, by position: ``{"loss": [T] nats, "weight": [T]}`` and, if labelled, ``"correct"`` [T]."""
    network = model.merge(graphdef, params)
    hidden, _ = network.features(batch["inputs"], reset=batch.get("reset"))
    with jax.named_scope("loss"):
        losses, correct = token_losses_and_correct(
            hidden, network.head_kernel(), batch["targets"], logit_cap=network.config.logit_cap
        )
    sums = {
        "loss": jnp.sum(jnp.where(batch["weights"] > 0, losses * batch["weights"], 0.0), axis=0),
        "weight": jnp.sum(batch["weights"], axis=0),
    }
    if labelled:
        sums["correct"] = jnp.sum(correct * batch["weights"], axis=0)
    return sums
