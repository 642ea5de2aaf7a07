"""The walk of docs/checkpoints.md: a checkpoint with its tokenizer is imported, writes, is trained on, and goes back.

tests/goldens/text/llama is what transformers saved; written.json beside it is what transformers wrote with it.
"""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import seqmodels
import train
from seqmodels.training import loop

pytestmark = pytest.mark.tools

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "goldens" / "text" / "llama"
WRITTEN = json.loads((GOLDEN / "written.json").read_text())
ENDS = (2, 3)


def command(script: str, *arguments: str) -> None:
    """Run a command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stopped.value.code == 0, stopped.value.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the walk goes: imported, tuned, exported."""
    return tmp_path_factory.mktemp("walk")


@pytest.fixture(scope="module")
def imported(folder):
    command("scripts/import_hf.py", str(GOLDEN), f"--workdir={folder / 'imported'}")
    return seqmodels.load_run(folder / "imported")


@pytest.fixture(scope="module")
def tuned(folder, imported):
    documents = [f"the cat sat on the mat and the dog ran. café {number}" for number in range(40)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    flags = [
        "train.py", f"--config={ROOT / 'configs' / 'from_run.py'}:{imported.workdir}", f"--workdir={folder / 'tuned'}",
        f"--config.data.source={folder / 'texts.jsonl'}", f"--config.data.cache_dir={folder / 'cache'}",
        "--config.data.seq_len=16", "--config.data.batch_size=2", "--config.train.steps=2", "--config.train.sample_every_steps=0",
        "--config.train.compilation_cache_dir=",
    ]  # fmt: skip
    loop.train(*train.parse(flags))
    command("scripts/export_hf.py", f"--workdir={folder / 'tuned'}", f"--out={folder / 'exported'}")
    return seqmodels.load_run(folder / "tuned")


def test_what_is_imported_writes_what_transformers_writes(imported, capsys):
    assert imported.tokenizer.ends == ENDS and imported.tokenizer.beginning == (1,)
    first, second = WRITTEN
    np.testing.assert_allclose(imported.logits([first["tokens"]])[0, -1], first["next"], rtol=0, atol=1e-4)
    texts = imported.generate_batch([golden["prompt"] for golden in WRITTEN], max_tokens=12, temperature=0)
    for golden, text in zip(WRITTEN, texts):
        assert imported.prompt_tokens(golden["prompt"]) == golden["tokens"]
        assert golden["prompt"] + text == imported.tokenizer.decode([*golden["tokens"], *golden["new"]])
    new = []
    assert "".join(imported.stream(second["prompt"], max_tokens=12, temperature=0, on_token=new.append)) == text
    assert new == second["new"]
    capsys.readouterr()
    arguments = (f"--prompt={second['prompt']}", "--max_tokens=12", "--temperature=0")
    command("scripts/generate.py", f"--workdir={imported.workdir}", *arguments)
    assert capsys.readouterr().out == f"{second['prompt']}{text}\n"


def test_rows_that_are_no_token_s_are_not_drawn(imported):
    run = imported
    assert run.trainer.vocab_size > run.tokenizer.vocab_size
    drawn = []
    for seed in range(6):
        list(run.stream(WRITTEN[1]["prompt"], max_tokens=12, temperature=1e6, seed=seed, on_token=drawn.append))
    assert len(drawn) > 1 and set(drawn) <= set(run.tokenizer.ids.tolist())


def test_a_state_may_stop_inside_a_character(imported):
    run = imported
    tokens = run.prompt_tokens("the 好")
    for broken in (1, 2):
        state = run.read(tokens[:-broken])
        first, state = run.continue_from(state, max_tokens=2, temperature=0)
        second, state = run.continue_from(state, max_tokens=2, temperature=0)
        whole = run.tokenizer.decode(state.tokens)
        assert run.tokenizer.decode(tokens[:-broken])[:-1] + first + second in (whole, whole.replace("\ufffd", "\ufffd\ufffd", 1))


def test_training_on_keeps_tokenizer_and_end_of_text(imported, tuned):
    assert tuned.step == 2 and tuned.tokenizer.ends == ENDS
    assert tuned.tokenizer.to_json() == imported.tokenizer.to_json()
    validation = tuned.validation()
    assert validation.end_of_text == 2 and 2 in validation.tokens
    assert np.isfinite(tuned.evaluate().loss)
    assert any(np.any(a != b) for a, b in zip(*(np.asarray(run.params["embedding"]) for run in (imported, tuned))))


def test_the_export_says_what_it_is(folder, tuned):
    out = folder / "exported"
    read = {name: json.loads((out / f"{name}.json").read_text()) for name in ("config", "generation_config", "tokenizer_config")}
    assert (read["config"]["bos_token_id"], read["config"]["eos_token_id"]) == (1, 2)
    assert read["generation_config"]["eos_token_id"] == [2, 3] and read["tokenizer_config"]["eos_token"] == "<end>"
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "# LlamaForCausalLM" in card
    assert "texts.jsonl" in card and "| Steps | 2 |" in card and "&lt;end> (id 2)" in card
    command("scripts/import_hf.py", str(out), f"--workdir={folder / 'again'}")
    again = seqmodels.load_run(folder / "again")
    tokens = [WRITTEN[0]["tokens"]]
    np.testing.assert_array_equal(again.logits(tokens), tuned.logits(tokens))


def test_transformers_loads_the_export(folder, tuned):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reader = transformers.AutoTokenizer.from_pretrained(folder / "exported")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "exported")
    for golden in WRITTEN:
        tokens = reader(golden["prompt"], return_tensors="pt")["input_ids"]
        assert tokens[0].tolist() == golden["tokens"]
        with torch.no_grad():
            logits = model(tokens).logits[0, -1].numpy()
            new = model.generate(tokens, do_sample=False, max_new_tokens=8)[0, tokens.shape[1] :].tolist()
        np.testing.assert_allclose(tuned.logits([golden["tokens"]])[0, -1], logits, rtol=0, atol=1e-4)
        drawn = []
        list(tuned.stream(golden["prompt"], max_tokens=8, temperature=0, on_token=drawn.append))
        assert drawn == new
    assert (reader.eos_token_id, model.generation_config.eos_token_id) == (2, [2, 3])
