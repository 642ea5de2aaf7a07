"""The memory of a run is estimated from shapes, and refused with the number where there is not as much."""

import jax
import pytest

from seqmodels.errors import UserError
from seqmodels.training import memory
from seqmodels.training.state import Trainer
from tests.configs import tiny


def test_the_parts_that_are_exact():
    trainer = Trainer(tiny(**{"model.pattern": "mlp", "model.repeats": 1}), 257)
    state = trainer.init()
    needed = trainer.check_memory()
    assert needed.parameters == needed.gradients == sum(leaf.nbytes for leaf in jax.tree.leaves(state["params"]))
    assert needed.optimizer == sum(leaf.nbytes for leaf in jax.tree.leaves(state["optimizer"]))


def test_what_is_kept_for_the_backward_pass_grows_with_the_rows_and_falls_with_remat():
    def kept(rows, **changes):
        trainer = Trainer(tiny(**{"model.pattern": "mlp", "model.repeats": 9} | changes), 257)
        return memory.kept_for_backward(trainer.config, trainer.graphdef, trainer._shapes["params"], rows)

    stream = 9 * 32 * 32 * 4  # of one row: repeats, tokens, width, bytes
    assert 4 * stream < kept(4) < 4 * stream * 100
    assert kept(8) - kept(4) == pytest.approx(kept(12) - kept(8), rel=0.01)
    assert 4 * stream <= kept(4, **{"model.remat": True}) < kept(4) / 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_does_not_depend_on_which_parameters_are(dtype):
    """An embedding that is not the head is not kept; some parameters are kept in the compute dtype."""

    def kept(tied):
        changes = {"model.pattern": "mlp", "model.tie_embeddings": tied, "model.compute_dtype": dtype, "model.remat": True}
        trainer = Trainer(tiny(**changes), 50_257)
        return memory.kept_for_backward(trainer.config, trainer.graphdef, trainer._shapes["params"], 1)

    assert kept(tied=False) == kept(tied=True) > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"model.d_model": 2**20},
        {"model.channel_layers.mlp.hidden": 2**20, "model.repeats": 2**16},
        {"data.batch_size": 2**31 - 1},
        {"data.seq_len": 2**31 - 1},
        {"model.vocab_size": 2**24, "model.d_model": 2**12},
    ],
)
def test_too_much_is_refused_with_the_number(changes):
    with pytest.raises(UserError, match=r"a training step needs .* GiB \(parameters .* which has .* GiB") as error:
        Trainer(tiny(**{"model.pattern": "mlp", "model.branch_rms": None} | changes), 257).check_memory()
    assert "\n" not in str(error.value)
