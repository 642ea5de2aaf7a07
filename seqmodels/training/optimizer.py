"""AdamW with warm-up, a schedule, clipping, and a decay mask by parameter name."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import optax

from seqmodels.errors import UserError
from seqmodels.training.sharding import path_name

SCHEDULES = ("cosine", "linear", "constant")

# Weight decay pulls matrices towards zero. It never touches norms, biases, gates' parameters (names with
# decay, gate_logit or dt) and SSM parameters (A, D, ...): for those zero is a choice of memory, not "small".
DECAYED = re.compile(r"(^|/)(?!\w*(decay|gate_logit|dt_))\w*(kernel|embedding)$")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """How parameters move. Defaults live in configs/base.py."""

    learning_rate: float
    schedule: str
    warmup_steps: int
    decay_steps: int | None
    final_fraction: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    clip_norm: float
    accumulation_steps: int
    rate_changes: tuple[tuple[int, float], ...]  # (step, factor): from that step on the rate is the schedule's times it

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise UserError(f"optim.schedule={self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        if self.learning_rate <= 0 or self.clip_norm <= 0 or self.eps <= 0:
            raise UserError("optim.learning_rate, optim.clip_norm and optim.eps must be positive")
        if self.accumulation_steps < 1 or self.warmup_steps < 0:
            raise UserError("optim.accumulation_steps must be at least 1 and optim.warmup_steps at least 0")
        if self.weight_decay < 0 or not 0 <= self.final_fraction <= 1:
            raise UserError("optim.weight_decay must not be negative and optim.final_fraction lies in 0..1")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise UserError("optim.beta1 and optim.beta2 lie in 0..1 (1 excluded)")


def depends_on_total_steps(config: OptimConfig) -> bool:
    """True when another ``train.steps`` would change the learning rate of steps already done."""
    return config.schedule != "constant" and config.decay_steps is None


def learning_rate_schedule(config: OptimConfig, train_steps: int) -> optax.Schedule:
    """Step (int32, from 0) -> learning rate: linear warm-up, then the schedule down to final_fraction of the peak."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
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


def decay_mask(params):
    """True for the leaves that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: bool(DECAYED.search(path_name(path))), params)


def make_optimizer(config: OptimConfig, train_steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (arXiv 1711.05101)."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, train_steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )
