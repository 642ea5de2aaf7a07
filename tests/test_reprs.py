"""What a notebook shows: a line or a small table, and never pages of arrays."""

import jax
import numpy as np
import pytest

import seqmodels
from seqmodels.config import OptimConfig
from seqmodels.evaluation import plots
from seqmodels.mixers import gla
from seqmodels.training import loop
from tests.configs import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    loop.train(tiny(**{
        "data.cache_dir": str(folder / "cache"), "data.toy_documents": 20, "data.seq_len": 16, "data.batch_size": 2,
        "model.repeats": 1, "train.steps": 1, "train.eval_tokens": 64, "train.sample_every_steps": 0,
    }), folder / "<b>run")  # fmt: skip
    return seqmodels.load_run(folder / "<b>run")


def test_a_config_shows_what_differs_from_the_defaults():
    assert repr(OptimConfig()) == "OptimConfig()"
    assert repr(OptimConfig(beta2=0.99, decay_steps=5)) == "OptimConfig(decay_steps=5, beta2=0.99)"
    assert eval(repr(gla.Config(num_heads=2)), {"Config": gla.Config}) == gla.Config(num_heads=2)
    config = tiny(**{"model.pattern": "gla mlp"})
    assert "d_model=32" in repr(config) and "beta1" not in repr(config) and len(repr(config)) < 1000
    page = config._repr_html_()
    assert "optim.beta1</th>" in page and "model.mixers.gla.num_heads</th>" in page and page.count("<table>") == 1


def test_a_run_is_a_line_or_a_table(run):
    assert repr(run) == f"Run({str(run.workdir)!r}, step 1, 1 x 'attention mlp', {run.trainer.num_parameters:,} parameters)"
    page = run._repr_html_()
    assert "&lt;b&gt;run" in page and "<b>run" not in page and f"{run.trainer.num_parameters:,}" in page


def test_a_state_is_a_line_or_a_table(run):
    state = run.read("Once", extra_capacity=4)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.state))
    assert repr(state).startswith(f"DecodingState(tokens {len(state.tokens)}, sampled 0, capacity ")
    assert f"bytes {size:,}" in repr(state)
    assert "capacity</th>" in state._repr_html_()


def test_the_plot_takes_what_attention_weights_gives(run, tmp_path):
    weights = run.attention_weights("Once upon")
    assert weights.shape[:2] == (1, 1) and weights.shape[-1] == len(run.prompt_tokens("Once upon"))
    plots.attention_weights(weights, tmp_path / "whole.png")
    plots.attention_weights(np.asarray(weights)[:, 0], tmp_path / "part.png")
    assert (tmp_path / "whole.png").read_bytes() == (tmp_path / "part.png").read_bytes()
    with pytest.raises(ValueError, match="weights of 2 texts"):
        plots.attention_weights(np.concatenate([weights, weights], axis=1), tmp_path / "two.png")
