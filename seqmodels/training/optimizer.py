"""AdamW with warm-up, a schedule, clipping, and a mask of what weight decay applies to."""

import math
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from seqmodels.config import OptimConfig


def depends_on_total_steps(config: OptimConfig) -> bool:
    """True when another ``train.steps`` would change the learning rate of steps already done."""
    return config.schedule != "constant" and config.decay_steps is None


def learning_rate_schedule(config: OptimConfig, train_steps: int, peak: Float[Array, ""] | None = None) -> optax.Schedule:
    """Step (int32, from 0) -> learning rate: linear warm-up, then the schedule down to final_fraction of the peak.

    Args:
      peak: the highest rate, by default ``config.learning_rate``. As an argument of a compiled step it is not part of the
        program, which then serves every rate of a search.
    """
    peak = config.learning_rate if peak is None else peak
    final = peak * config.final_fraction
    end = train_steps if config.decay_steps is None else config.decay_steps
    length = max(1, end - config.warmup_steps)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, length, alpha=config.final_fraction),
        "linear": optax.linear_schedule(peak, final, length),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    # Step 0 already moves: the first rate is peak / warmup_steps, not 0.
    warmup = optax.linear_schedule(peak / max(1, config.warmup_steps), peak, max(1, config.warmup_steps - 1))
    schedule = optax.join_schedules([warmup, after], [config.warmup_steps])
    if not config.rate_changes:
        return schedule

    def changed(step):
        rate = schedule(step)
        for first, factor in config.rate_changes:
            rate = rate * jnp.where(step >= first, factor, 1.0)
        return rate

    return changed


def rate_factor(config: OptimConfig, step: int) -> float:
    """What the schedule's rate is multiplied by after ``step`` steps, for the changes made on the way."""
    return math.prod(factor for first, factor in config.rate_changes if step >= first)


def make_optimizer(config: OptimConfig, schedule: optax.Schedule, decayed: Any) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (arXiv 1711.05101).

    Args:
      schedule: step -> learning rate.
      decayed: True for each parameter that weight decay applies to, a tree like theirs (``model.weight_decay_mask``).
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )
