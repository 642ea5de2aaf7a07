"""A number that is not finite ends a run before anything is saved, is recorded, found, and the run can go on."""

import dataclasses
import json
import math
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from scripts import replay
from seqmodels import config as config_lib
from seqmodels.errors import UserError
from seqmodels.training import checkpoint, divergence, loop
from seqmodels.training.first_nonfinite import first_finding
from tests.configs import tiny

pytestmark = pytest.mark.tools

SMALL = {
    "data.toy_documents": 50, "data.seq_len": 16, "data.batch_size": 4, "model.pattern": "mlp", "model.repeats": 2,
    "train.steps": 8, "train.checkpoint_every_steps": 2, "train.eval_every_steps": 100, "train.sample_every_steps": 0,
    "train.log_every_steps": 1, "train.eval_tokens": 64, "train.compilation_cache_dir": "",
}  # fmt: skip


@pytest.fixture
def small(tmp_path):
    return lambda **changes: tiny(**SMALL | {"data.cache_dir": str(tmp_path / "cache")} | changes)


def poison(monkeypatch, at, change):
    """Change the train state before the step of that number, wherever it is made."""
    from seqmodels.training import state

    build = state.Trainer.__init__

    def patched(self, *args, **kwargs):
        build(self, *args, **kwargs)
        step = self.train_step

        def changed_step(before, batch):
            return step(change(before) if int(before["step"]) == at else before, batch)

        self.train_step = changed_step

    monkeypatch.setattr(state.Trainer, "__init__", patched)


def huge_kernel(state):
    """A kernel of the second layer is so large that its products overflow."""
    layer = state["params"]["layers"]["0_mlp"]
    kernel = layer["layer"]["up_kernel"].at[1].set(3e38)
    layers = {"0_mlp": layer | {"layer": layer["layer"] | {"up_kernel": kernel}}}
    return state | {"params": state["params"] | {"layers": layers}}


@pytest.mark.parametrize(
    "about, batch",
    [
        ([1], {}), ({"versions": []}, {}), ({"what": 1}, {}),
        ({"step": "x"}, {}), ({"state_step": "x"}, {}), ({"evaluating": None}, {}), ({"step": True}, {}), ({"state_step": -1}, {}),
        ({"data_vocab_size": "x"}, {}), ({"evaluating": True}, {}),
        ({}, {"inputs": np.zeros((0, 4), np.int32), "targets": np.zeros((0, 4), np.int32)}),
        ({}, {"other": np.zeros(3)}), ({}, {"targets": np.zeros((2, 3), np.int32)}), ({}, {"inputs": np.zeros((2, 4), np.float32)}),
    ],
)  # fmt: skip
def test_a_record_that_no_run_wrote_is_one_line(tmp_path, about, batch):
    folder = tmp_path / "divergence"
    folder.mkdir()
    config_lib.save(tiny(), folder / "config.json")
    whole = {"step": 1, "what": "the loss", "evaluating": False, "versions": {}, "state_step": 0}
    (folder / "about.json").write_text(json.dumps(whole | about if isinstance(about, dict) else about))
    tokens = np.zeros((2, 4), np.int32)
    np.savez(folder / "batch.npz", **{"inputs": tokens, "targets": tokens} | batch)
    with pytest.raises(UserError, match="divergence cannot be read: ") as error:
        divergence.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_record_is_read_without_its_run_folder_and_its_ids_are_tokens(diverged, tmp_path):
    moved = shutil.copytree(diverged[1] / "divergence", tmp_path / "sent")
    recorded = divergence.load(moved)
    assert recorded.folder == moved and recorded.data_vocab_size == 257 and recorded.about["step"] == 6
    shutil.copytree(moved, tmp_path / "run" / "divergence")
    assert divergence.load(tmp_path / "run").data_vocab_size == 257, "the tokenizer is not needed"
    for name, by in (("inputs", 100_000), ("targets", 257), ("inputs", -300)):
        np.savez(moved / "batch.npz", **recorded.batch | {name: recorded.batch[name] + by})
        with pytest.raises(
            UserError, match=rf"batch.npz has {name} from -?\d+ to -?\d+, and the model 257 tokens: it is damaged"
        ):
            divergence.load(moved)


@pytest.mark.parametrize(
    "wrong", [{"state_step": 4}, {"step": 7}, {"state_step": 2**30, "step": 2**30 + 1}, {"evaluating": True}]
)
def test_steps_of_a_record_that_are_not_the_state_s_are_said(diverged, tmp_path, wrong):
    folder, said = shutil.copytree(diverged[1] / "divergence", tmp_path / "sent"), []
    assert divergence.load(folder, said.append).about["state_step"] == 5 and said == []
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps(about | wrong))
    batch = divergence.load(diverged[1]).batch
    np.savez(folder / "batch.npz", **batch | {"weights": np.ones(batch["inputs"].shape, np.float32)})
    found = divergence.load(folder, said.append).about
    assert (found["state_step"], found["step"]) == (5, 5 if "evaluating" in wrong else 6)
    assert len(said) == 1 and "the state is after 5: it was edited, or is damaged" in said[0]


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    """(config, run folder, error) of a run that diverges in step 6."""
    folder = tmp_path_factory.mktemp("diverged")
    config = tiny(**SMALL | {"data.cache_dir": str(folder / "cache")})
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, 5, huge_kernel)
        with pytest.raises(loop.Diverged) as error:
            loop.train(config, folder / "run")
    return config, folder / "run", error.value


def test_a_diverged_run_is_recorded_and_found(diverged, tmp_path, monkeypatch, capsys):
    _, kept, error = diverged
    workdir = shutil.copytree(kept, tmp_path / "run")
    assert error.step == 6 and "--resume_learning_rate=0.001" in str(error)
    assert checkpoint.steps(workdir / "checkpoints") == [2, 4]
    about = json.loads((workdir / "divergence" / "about.json").read_text())
    assert (about["step"], about["state_step"], about["evaluating"]) == (6, 5, False)

    # The recorded state is before the poison; with it the layer and the operation are found.
    recorded = divergence.load(workdir)
    restored = divergence._open(recorded, recorded.config, print)[1]
    shutil.rmtree(recorded.folder / "state")
    writer = checkpoint.Writer(recorded.folder / "state", keep=1)
    writer.save(5, huge_kernel(restored), {}, validation_loss=None)
    writer.close()
    assert list(divergence.absurd_arrays(recorded)) == ["params/layers/0_mlp/layer/up_kernel"]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["replay.py", f"--workdir={workdir}", "--forms=recurrent"])
        replay.main()
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert result["finding"]["operation"] == "dot_general" and "transpose" not in result["finding"]["scope"]
    assert result["finding"]["layer"] == "layer 1 (mlp, repeat 1, position 0 of the pattern)"
    assert [(form["form"], form["finite"]) for form in result["forms"]] == [("as configured", False), ("recurrent", False)]
    assert "params/layers/0_mlp/layer/up_kernel" in result["forms"][0]["wrong"] and "not finite after the step: " in err
    assert "first: dot_general gives" in err and "layers" in result["finding"]["source"]


def test_the_layer_is_that_of_the_loop_over_layers():
    """There is a loop over micro-batches around it, and one over time in it."""

    def step(x):
        def layer(carry, scale):
            with jax.named_scope("0_mlp"):
                return jax.lax.scan(lambda c, y: (c + jnp.log(scale * y), None), carry, jnp.ones(5))[0], None

        return jax.lax.scan(lambda c, scales: (c + jax.lax.scan(layer, 1.0, scales)[0], None), 0.0, x)[0]

    good = jnp.ones((4, 3))
    found = first_finding(step, (good.at[1, 2].set(-1.0),), (good,))
    config = tiny(**SMALL | {"model.repeats": 3})
    assert found.loops == (1, 2, 0) and found.operation == "log"
    assert divergence.layer_of(found, config) == "layer 2 (mlp, repeat 2, position 0 of the pattern)"


def test_what_is_outside_the_layers_has_a_name(diverged):
    recorded = divergence.load(diverged[1])
    trainer, state, batch = divergence._open(recorded, recorded.config, print)
    step = divergence._step(trainer, recorded)
    jaxpr = jax.make_jaxpr(step)(state, batch).jaxpr
    scopes = {word for equation in jaxpr.eqns for word in re.split(r"[/()]", str(equation.source_info.name_stack))}
    assert set(divergence.OUTSIDE_LAYERS) <= scopes
    found = first_finding(jax.named_scope("optimizer")(jnp.sqrt), (-1.0,), (1.0,))
    assert divergence.layer_of(found, recorded.config) == "the optimizer"


def test_a_diverged_run_goes_on_with_a_lower_rate(diverged, tmp_path):
    """On from the newest checkpoint, with half the rate; a later start without the flag knows it."""
    config, kept, _ = diverged
    workdir = shutil.copytree(kept, tmp_path / "run")
    half = config.optim.learning_rate / 2
    with pytest.raises(UserError, match="must be positive and below"):
        loop.train(config, workdir, resume_learning_rate=1.0)
    loop.train(config, workdir, resume_learning_rate=half)
    saved = config_lib.load(workdir / "config.json")
    assert saved.optim.rate_changes == ((4, 0.5),)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["learning_rate"] for row in rows if row["split"] == "train"}
    from seqmodels.training.optimizer import learning_rate_schedule

    schedule = learning_rate_schedule(config.optim, 8)
    for step, rate in rates.items():
        assert math.isclose(rate, float(schedule(step - 1)) * (0.5 if step > 4 else 1.0), rel_tol=1e-6)
    assert loop.train(config, workdir, resume_learning_rate=half)["step"] == 8, "the same command again"
    assert loop.train(config, workdir)["step"] == 8
    assert config_lib.load(workdir / "config.json") == saved


@pytest.mark.parametrize("kept", [True, False])
def test_a_run_that_began_with_another_s_parameters_is_recorded(tmp_path, small, monkeypatch, diverged, capsys, kept):
    theirs = shutil.copytree(diverged[1], tmp_path / "theirs")

    def change(state):
        if not kept:  # their run has gone on, or they have removed it
            shutil.rmtree(theirs / "checkpoints" / "4", ignore_errors=True)
        return huge_kernel(state)

    config = small(**{"train.init_from": str(theirs), "data.tokenizer": "bytes"})
    poison(monkeypatch, 1, change)
    with pytest.raises(loop.Diverged):
        loop.train(config, tmp_path / "run")
    said = capsys.readouterr().err
    assert "not deterministic" not in said
    if not kept:
        assert re.search(r"could not be recorded in .*: UserError: no checkpoint of step 4 in .*theirs/checkpoints", said)
        return
    recorded = divergence.load(tmp_path / "run")
    assert (recorded.about["step"], recorded.about["state_step"]) == (2, 1)
    began = checkpoint.restore(theirs / "checkpoints", _abstract(theirs, config), step=4).state["params"]
    ours = divergence._open(recorded, config, print)[1]["params"]
    apart = [float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(began), strict=True)]
    assert max(apart) <= 2 * config.optim.learning_rate, "one step from theirs; fresh parameters are far from them"


def test_parameters_that_are_not_finite_are_not_saved(tmp_path, small, monkeypatch):
    def overflow(state):  # the loss of this step is finite: the embedding of a byte that does not occur
        embedding = state["params"]["embedding"].at[0].set(jnp.inf)
        return state | {"params": state["params"] | {"embedding": embedding}}

    config = small(**{"train.steps": 2, "model.tie_embeddings": False})
    poison(monkeypatch, 1, overflow)
    with pytest.raises(loop.Diverged, match="not all numbers are finite in .*params/embedding") as error:
        loop.train(config, tmp_path / "run")
    assert error.value.step == 2 and checkpoint.steps(tmp_path / "run" / "checkpoints") == []


def test_a_validation_loss_that_is_not_finite_is_a_divergence(tmp_path, small, monkeypatch):
    from seqmodels.training import state

    def evaluate(self, *args, **kwargs):
        return dataclasses.make_dataclass("Result", ["loss"])(math.nan)

    monkeypatch.setattr(state.Trainer, "evaluate", evaluate)
    with pytest.raises(loop.Diverged, match="the validation loss is nan"):
        loop.train(small(**{"train.steps": 2}), tmp_path / "run")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == []


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, small, monkeypatch):
    from seqmodels.data.dataset import Dataset

    batch = Dataset.train_batch
    bad = {2, 5}

    def train_batch(self, step, rows=slice(None)):
        made = dict(batch(self, step, rows))
        made["weights"] = np.full(made["inputs"].shape, np.nan if step in bad else 1.0, np.float32)
        return made

    monkeypatch.setattr(Dataset, "train_batch", train_batch)
    config = small(**{"train.steps": 6, "train.skip_nonfinite": True})
    summary = loop.train(config, tmp_path / "run")
    assert summary["skipped_steps"] == 2
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    train_rows = {row["step"]: row for row in rows if row["split"] == "train"}
    assert [train_rows[step]["skipped_steps"] for step in range(1, 7)] == [0, 0, 1, 1, 1, 2]
    assert train_rows[3]["loss"] is None and train_rows[4]["loss"] is not None
    restored = checkpoint.restore(tmp_path / "run" / "checkpoints", _abstract(tmp_path / "run", config))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(restored.state))
    assert restored.record["skipped"] == [2, 1]


def _abstract(workdir, config):
    from seqmodels.training.run_folder import known_vocab_size, read_tokenizer
    from seqmodels.training.state import Trainer

    return Trainer(config, known_vocab_size(config, read_tokenizer(workdir, config))).abstract_state()


def test_the_flag_is_a_number(tmp_path):
    argv = ["train.py", "--config=configs/tinystories.py:attention", f"--workdir={tmp_path}"]
    assert train._parse([*argv, "--resume_learning_rate=1e-3"])[2]["resume_learning_rate"] == 1e-3
    for text in ("nan", "0", "fast"):
        with pytest.raises(UserError, match="--resume_learning_rate="):
            train._parse([*argv, f"--resume_learning_rate={text}"])
