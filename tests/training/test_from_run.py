"""A run may begin with what another one, or an imported checkpoint, has learnt: its parameters, its tokenizer, its model."""

import dataclasses

import jax
import numpy as np
import pytest

import seqmodels
from configs import base, from_run
from seqmodels.config import from_config_dict
from seqmodels.data.text.tokenizer import LibraryTokenizer
from seqmodels.errors import UserError
from seqmodels.interop import checkpoint
from seqmodels.training import loop, run_folder
from seqmodels.training.state import Trainer
from tests.commands.test_errors import CONFIG, error_of
from tests.goldens import load
from tests.interop.test_import_hf import copy_of, word_tokenizer

pytestmark = pytest.mark.tools

# Nothing is learnt: what comes out is what went in.
STANDSTILL = {
    "optim.learning_rate": 1e-30, "optim.weight_decay": 0.0, "train.steps": 1, "train.sample_every_steps": 0,
    "train.eval_tokens": 64, "data.seq_len": 8, "data.batch_size": 2, "train.compilation_cache_dir": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A run folder of the Llama golden: 97 rows, a tokenizer of 90 pieces; and text in its words."""
    folder = tmp_path_factory.mktemp("import")
    word_tokenizer(90).save(str(copy_of("llama", folder / "llama") / "tokenizer.json"))
    checkpoint.import_folder(folder / "llama", folder / "run", defaults=from_config_dict(base.get_config()))
    (folder / "text.txt").write_text("w1 w2 w3 w4<|endoftext|>w4 w5<|endoftext|>" * 20)
    return folder / "run"


def config_of(imported, tmp_path, **changes):
    config = from_run.get_config(str(imported))
    config.lock()
    paths = {"data.source": str(imported.parent / "text.txt"), "data.cache_dir": str(tmp_path / "cache")}
    config.update_from_flattened_dict(STANDSTILL | paths | changes)
    return from_config_dict(config)


def test_training_on_from_an_imported_checkpoint(imported, tmp_path, capsys):
    config = config_of(imported, tmp_path)
    source = seqmodels.load_run(imported)
    assert config.model == source.config.model
    loop.train(config, tmp_path / "run")
    assert f"beginning with the parameters of {imported}, step 0\n" in capsys.readouterr().err
    run = seqmodels.load_run(tmp_path / "run")
    jax.tree.map(lambda new, old: np.testing.assert_allclose(new, old, rtol=0, atol=1e-20), run.params, source.params)
    assert run.tokenizer.to_json() == source.tokenizer.to_json() and run.step == 1
    golden = load("hf/llama").arrays
    np.testing.assert_allclose(run.logits(golden["input_ids"]), golden["logits"], atol=5e-5 * np.abs(golden["logits"]).max())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.d_model": 32}, r"does not fit config.model: \S+ is \[97, 64\] there and \[97, 32\] here; --config=configs/from"),
        ({"model.repeats": 1}, r"is \[2, .*\] there and \[1, .*\] here"),
        ({"model.tie_embeddings": True}, r"output_kernel is \[64, 97\] there and absent here"),
        (
            {"data.tokenizer": "bytes", "model.vocab_size": 257},
            r"another tokenizer .* set --config.data.tokenizer=\S+tokenizer.json",
        ),
        ({"train.init_from": "no/such/run"}, "no/such/run is not a run folder"),
    ],
)
def test_what_does_not_fit_is_one_line(imported, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        loop.train(config_of(imported, tmp_path, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_options_that_change_the_mathematics_are_told(imported, tmp_path):
    config = config_of(imported, tmp_path, **{"model.mixers.attention.window": 4})
    source = seqmodels.load_run(imported)
    lines = []
    setup = Trainer(config, source.tokenizer.vocab_size)
    run_folder.initial_params(config, source.tokenizer, setup.abstract_state()["params"], lines.append)
    assert lines[-1].endswith("step 0; model.mixers.attention.window None -> 4")


def test_a_run_without_a_tokenizer_takes_any_that_fits(tmp_path):
    """Nothing says which pieces the rows of its embedding stand for."""
    checkpoint.import_folder(load("hf/mamba").directory, tmp_path / "run", defaults=from_config_dict(base.get_config()))
    theirs = run_folder.read_config(tmp_path / "run")
    setup = Trainer(theirs, None)
    config = dataclasses.replace(theirs, train=dataclasses.replace(theirs.train, init_from=str(tmp_path / "run")))
    abstract = setup.abstract_state()["params"]
    params = run_folder.initial_params(config, LibraryTokenizer(word_tokenizer(90)), abstract, lambda line: None)
    assert jax.tree.map(np.shape, params.state["params"]) == jax.tree.map(lambda leaf: leaf.shape, abstract)


def test_the_config_needs_a_run(tmp_path):
    assert "configs/from_run.py:RUN_FOLDER" in error_of("--config=configs/from_run.py", f"--workdir={tmp_path / 'run'}")
    message = error_of(f"--config=configs/from_run.py:{tmp_path}", f"--workdir={tmp_path / 'run'}")
    assert "is not a run folder" in message
    flags = (f"--config.train.init_from={tmp_path}", "--config.data.source=toy", "--config.data.tokenizer=bytes")
    assert "is not a run folder" in error_of(CONFIG, f"--workdir={tmp_path / 'run'}", *flags)
