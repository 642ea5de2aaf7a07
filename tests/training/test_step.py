"""One optimizer step: accumulation, weights, decay mask, schedule, FLOP counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import config, model, ops
from seqmodels.errors import UserError
from seqmodels.layers import weight_decay_of
from seqmodels.training import flops, optimizer
from seqmodels.training.state import Trainer
from tests.configs import tiny
from tests.programs import fast_jit

VOCAB = 50


def batch(seed=0, rows=8, time=32, **extra):
    random = np.random.default_rng(seed)
    inputs = random.integers(0, VOCAB, (rows, time)).astype(np.int32)
    return {"inputs": inputs, "targets": (inputs * 7 + 1) % VOCAB, **extra}


def run(setup, batches):
    state, losses = setup.init(), []
    for numbers in batches:
        state, metrics = setup.train_step(state, setup.put(numbers))
        losses.append(float(metrics["loss"]))
    return state, losses


def test_learns():
    setup = Trainer(tiny(**{"optim.learning_rate": 1e-2, "train.steps": 60}), VOCAB)
    _, losses = run(setup, [batch(seed) for seed in range(40)])
    assert losses[0] == pytest.approx(np.log(VOCAB), abs=0.2)
    assert losses[-1] < 0.5 * losses[0]


def test_accumulation_is_the_same_step():
    weights = np.random.default_rng(5).integers(0, 2, (8, 32)).astype(np.float32)
    numbers = [batch(seed, weights=weights) for seed in range(3)]
    whole, losses = run(Trainer(tiny(), VOCAB), numbers)
    parts, part_losses = run(Trainer(tiny(**{"optim.accumulation_steps": 4}), VOCAB), numbers)
    np.testing.assert_allclose(losses, part_losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), whole["params"], parts["params"])


def test_targets_of_weight_zero_move_nothing():
    weights = np.ones((8, 32), np.float32)
    weights[:, 16:] = 0
    one, two = batch(weights=weights), batch(weights=weights)
    two["targets"][:, 16:] = 3
    for a, b in zip(*(jax.tree.leaves(run(Trainer(tiny(), VOCAB), [numbers])[0]) for numbers in (one, two))):
        np.testing.assert_array_equal(a, b)


def test_dropout_repeats_exactly_and_differs_by_step():
    setup = Trainer(tiny(**{"model.dropout": 0.3, "optim.learning_rate": 1e-9}), VOCAB)
    _, losses = run(setup, [batch(), batch()])
    _, again = run(setup, [batch(), batch()])
    assert losses == again
    assert losses[0] != losses[1]


def test_eval_step_sums_by_position():
    setup = Trainer(tiny(), VOCAB)
    state, _ = run(setup, [batch()])
    weights = np.ones((8, 32), np.float32)
    weights[3:, 20:] = 0
    sums = setup.eval_step(state["params"], setup.put(batch(1, weights=weights)))
    np.testing.assert_array_equal(sums["weight"], weights.sum(0))
    whole = setup.eval_step(state["params"], setup.put(batch(1, weights=np.ones((8, 32), np.float32))))
    np.testing.assert_allclose(sums["loss"][:20], whole["loss"][:20], rtol=1e-6)
    assert np.all(sums["loss"][20:] < whole["loss"][20:])


def test_weight_decay_only_on_what_says_so():
    """Zero gradients: what moves is decayed, and shrinks by the learning rate times the weight decay."""
    config = tiny(**{"model.pattern": "mamba2 attention+gla", "optim.weight_decay": 0.5, "optim.schedule": "constant"})
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), model.param_shapes(config.model, 257))
    decayed = model.weight_decay_mask(config.model, 257)
    schedule = optimizer.learning_rate_schedule(config.optim, 10)
    update = optimizer.make_optimizer(config.optim, schedule, decayed)
    no_gradient = jax.tree.map(np.zeros_like, params)
    updates = fast_jit(lambda params: update.update(no_gradient, update.init(params), params)[0])(params)
    rate = schedule(0)
    for (path, change), applies in zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(decayed), strict=True):
        np.testing.assert_allclose(change, -0.5 * rate if applies else 0.0, rtol=1e-6, err_msg=str(path))
    layer = decayed["layers"]["1_attention+gla"]["layer"]
    assert layer["mixers"]["1_gla"]["query_kernel"] and not layer["mixers"]["1_gla"]["decay_in_kernel"]
    assert decayed["embedding"] and not decayed["final_norm"]["scale"] and not decayed["layers"]["0_mamba2"]["layer"]["dt_kernel"]


def test_a_trainer_builds_its_model_once():
    model._shapes.cache_clear()
    Trainer(tiny(), VOCAB)
    assert model._shapes.cache_info().misses == 1


def test_a_matrix_says_whether_it_is_decayed():
    class Silent(nnx.Module):
        def __init__(self):
            self.forget_kernel = nnx.Param(jnp.zeros((2, 3)))

    with pytest.raises(ValueError, match="forget_kernel is a matrix"):
        weight_decay_of(Silent())


@pytest.mark.parametrize("schedule", config.SCHEDULES)
def test_schedule(schedule):
    config = tiny(**{"optim.schedule": schedule, "optim.warmup_steps": 10, "optim.learning_rate": 1.0}).optim
    rate = optimizer.learning_rate_schedule(config, 110)
    np.testing.assert_allclose([rate(0), rate(4), rate(9), rate(10)], [0.1, 0.5, 1.0, 1.0], rtol=1e-6)
    assert float(rate(110)) == pytest.approx({"constant": 1.0}.get(schedule, 0.1), rel=1e-5)
    assert float(rate(60)) == pytest.approx({"constant": 1.0, "linear": 0.55, "cosine": 0.55}[schedule], rel=1e-5)


def test_one_program_serves_every_rate():
    """What `jax_compilation_cache_dir` keeps for one rate of a search is found for the others."""
    slow, fast = (Trainer(tiny(**{"model.pattern": "mlp", "optim.learning_rate": rate}), VOCAB) for rate in (1e-3, 1e-2))
    text, moved = [], []
    for setup in (slow, fast):
        text.append(setup.trace(setup.put(batch())).lower().as_text())
        state, metrics = setup.train_step(setup.init(), setup.put(batch()))
        moved.append(state["params"]["embedding"] - setup.init()["params"]["embedding"])
        np.testing.assert_allclose(metrics["learning_rate"], setup.schedule(0), rtol=1e-6)
    assert text[0] == text[1]
    np.testing.assert_allclose(10 * moved[0], moved[1], rtol=1e-3, atol=1e-7)


def test_flops_of_loops_are_multiplied_out():
    def function(x, kernel):
        body = jax.checkpoint(lambda carry, _: (jnp.tanh(carry @ kernel), None))
        return jax.lax.scan(body, x, None, length=5)[0]

    x, kernel = jnp.zeros((3, 4)), jnp.zeros((4, 4))
    assert flops.count_matmul_flops(jax.jit(function), x, kernel) == 5 * 2 * 3 * 4 * 4


def test_flops_of_a_kernel_are_those_of_its_grid():
    x = jax.ShapeDtypeStruct((2, 1024, 3, 16), jnp.bfloat16)

    def gradient(q, k, v):
        def loss(*x):
            return jnp.sum(ops.softmax_attention(*x, implementation="pallas")[0].astype(jnp.float32))

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    with ops.compile_for("tpu"):
        jaxpr = jax.make_jaxpr(gradient)(x, x, x).jaxpr
    one_product = 2 * 2 * 3 * 1024 * 1024 * 16
    found = {kernel.name.split("_")[2]: (kernel.backward, kernel.flops / one_product) for kernel in flops.kernels(jaxpr)}
    # Backwards the scores are made twice, once for the queries' gradient and once for the keys'.
    assert found == {"fwd": (False, 2), "dq": (True, 3), "dkv": (True, 4)}


def test_flops_per_token_of_a_transformer():
    """6 x parameters of the products, and 12 x T x D for each attention layer's two full products."""
    setup = Trainer(tiny(**{"model.mixers.attention.implementation": "parallel", "model.repeats": 3}), VOCAB)
    layer = 4 * 32 * 32 + 3 * 32 * 96
    assert setup.flops_per_token == 6 * (3 * layer + VOCAB * 32) + 3 * 12 * 32 * 32


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"mesh.data": 3}, "does not make use of exactly"),
        ({"mesh.fsdp": 0}, "at least 1"),
        ({"optim.accumulation_steps": 3}, "not a multiple of optim.accumulation_steps"),
    ],
)
def test_meshes_and_batches_that_do_not_fit(overrides, message):
    with pytest.raises(UserError, match=message):
        Trainer(tiny(**overrides), VOCAB)
