"""A run folder alone is enough: load_run, eval.py and scripts/generate.py on a run of a few steps."""

import json
import math
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import seqmodels
from seqmodels import device_memory
from seqmodels.data.text import toy
from seqmodels.errors import UserError
from seqmodels.escape import escape
from seqmodels.evaluation.perplexity import by_context_length
from seqmodels.training import loop
from tests.configs import tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(workdir, summary of the training loop) of a hybrid trained for 6 steps, checkpoints at 3 and 6, on few stories."""
    folder = tmp_path_factory.mktemp("run")
    for split, count in (("train", 200), ("validation", 30)):
        lines = (json.dumps({"text": story}) + "\n" for story in toy.stories(split, count))
        (folder / f"{split}.jsonl").write_text("".join(lines))
    config = tiny(**{
        "data.source": str(folder / "train.jsonl"), "data.validation_source": str(folder / "validation.jsonl"),
        "model.pattern": "linear_attention attention mlp", "model.repeats": 1, "data.cache_dir": str(folder / "cache"),
        "train.steps": 6, "train.checkpoint_every_steps": 3, "train.eval_every_steps": 3, "train.eval_tokens": 10**9,
        "train.compilation_cache_dir": "",
    })  # fmt: skip
    summary = loop.train(config, folder / "workdir")
    shutil.rmtree(folder / "cache")  # nothing but the run folder may be needed from here on
    return folder / "workdir", summary


@pytest.fixture(scope="module")
def run(trained):
    return seqmodels.load_run(trained[0])


def command(script, *arguments, cwd=ROOT):
    return subprocess.run([sys.executable, ROOT / script, *arguments], capture_output=True, text=True, cwd=cwd)


def in_process(monkeypatch, script, *arguments):
    """What the script gives to sys.exit."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return exit.value.code


def naive_evaluation(run):
    """Losses in float64 from all the logits: (nats [windows, T], bytes of text)."""
    losses, num_bytes = [], 0.0
    for batch in run.validation().batches(64, run.config.data.seq_len):
        logits = np.asarray(run.logits(batch["inputs"]), np.float64)
        log_total = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        nats = log_total - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        losses.append(np.where(batch["weights"] > 0, nats, np.nan))
        num_bytes += batch["bytes"][batch["weights"] > 0].sum()
    return np.concatenate(losses), num_bytes


def test_evaluate_is_a_naive_float64_loop_over_the_logits(run):
    nats, num_bytes = naive_evaluation(run)
    got = run.evaluate()
    assert got.tokens == np.isfinite(nats).sum()
    assert got.loss == pytest.approx(np.nanmean(nats), rel=1e-5)
    assert got.perplexity == pytest.approx(np.exp(np.nanmean(nats)), rel=1e-5)
    assert got.bits_per_byte == pytest.approx(np.nansum(nats) / math.log(2) / num_bytes, rel=1e-5)
    np.testing.assert_allclose(got.loss_by_position, np.nanmean(nats, axis=0), rtol=1e-5)


def test_bits_per_byte_count_the_bytes_of_the_stories(run):
    """With bytes as tokens the targets spell the text, so that its size can be read off them."""
    size, counted = 0, 0.0
    for batch in run.validation().batches(4, 32):
        scored = batch["weights"] > 0
        size += int((batch["targets"][scored] != run.tokenizer.end_of_text).sum())
        counted += batch["bytes"][scored].sum()
    assert size > 10_000
    assert counted == pytest.approx(size, rel=1e-12)


def test_the_loop_and_load_run_agree(trained, run):
    summary = trained[1]
    got = run.evaluate()
    assert run.step == summary["step"] == 6
    assert got.loss == pytest.approx(summary["validation_loss"], rel=1e-6)
    assert got.bits_per_byte == pytest.approx(summary["bits_per_byte"], rel=1e-6)
    assert run.trainer.num_parameters == summary["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(run.params))
    assert run.state_bytes() == summary["state_bytes"]


def test_state_bytes_are_those_of_a_real_state(run):
    state = jax.tree.leaves(run.model().init_state(1, 40))
    assert run.state_bytes(40) == sum(leaf.nbytes for leaf in state) > run.state_bytes(20)


def test_an_earlier_step_can_be_loaded(trained, run):
    earlier = seqmodels.load_run(trained[0], step=3)
    assert earlier.step == 3
    assert earlier.evaluate(max_tokens=2000).loss > run.evaluate(max_tokens=2000).loss


def test_another_source_is_scored_with_the_runs_tokenizer(run, tmp_path):
    text = "Anna had a cat.<|endoftext|>Ben had a dog.<|endoftext|>" * 50
    (tmp_path / "stories.txt").write_text(text)
    got = run.evaluate(run.validation(str(tmp_path / "stories.txt")))
    assert got.tokens == 50 * len("Anna had a cat.*Ben had a dog.*")
    assert got.bits_per_byte == pytest.approx(got.loss / math.log(2) * got.tokens / (got.tokens - 100))


def test_logits_are_float32_and_row_by_row(run):
    tokens = np.random.default_rng(0).integers(0, run.tokenizer.vocab_size, (3, 20))
    logits = run.logits(tokens)
    assert logits.shape == (3, 20, run.tokenizer.vocab_size) and logits.dtype == np.float32
    np.testing.assert_allclose(run.logits(tokens[1:2, :9])[0], logits[1, :9], atol=1e-4)


@pytest.mark.parametrize("tokens", [np.zeros(4, np.int32), np.zeros((1, 4)), np.full((1, 4), 10**6), np.full((1, 4), -1)])
def test_tokens_that_are_none_are_refused(run, tokens):
    with pytest.raises(ValueError, match="tokens must be"):
        run.logits(tokens)


def test_greedy_text_is_the_argmax_of_the_logits(run):
    prompt = "Once upon"
    tokens = run.tokenizer.encode(prompt) + [0] * 10  # what comes later changes nothing before it
    for position in range(len(prompt), len(tokens)):
        tokens[position] = int(np.argmax(run.logits([tokens])[0, position - 1]))
    expected = run.tokenizer.decode(tokens[len(prompt) :])
    assert run.generate(prompt, max_tokens=10, temperature=0) == expected
    assert run.generate_batch([prompt, "A"], max_tokens=10, temperature=0)[0] == expected


def test_an_empty_prompt_begins_a_new_text(run):
    assert run.prompt_tokens("") == [run.tokenizer.end_of_text]


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda run: run.generate_batch("Once"), "prompts are a list of texts"),
        (lambda run: run.generate(b"Once"), "a prompt is a text .str., not bytes"),
        (lambda run: run.generate("Once", seed=2**32), "seed=4294967296 must be at most"),
        (lambda run: run.generate("Once", seed=-1), "seed=-1 must be at least 0"),
        (lambda run: run.stream("Once", max_tokens=1.5), "max_tokens=1.5 must be int, not float"),
        (lambda run: run.generate("Once", max_tokens=-1), "max_tokens=-1 must be at least 0"),
        (lambda run: run.generate_batch(["Once"], first_row=-1), "first_row=-1 must be at least 0"),
        (lambda run: run.generate_batch(["Once"], first_row=2**31), "first_row=2147483648 must be at most"),
        (lambda run: run.read("Once", extra_capacity=-1), "extra_capacity=-1 must be at least 0"),
        (lambda run: run.read("Once", extra_capacity=None), "extra_capacity=None must be int"),
        (lambda run: run.evaluate(max_tokens=0), "max_tokens=0 must be at least 1"),
        (lambda run: run.evaluate_lengths([]), "lengths are none"),
        (lambda run: run.evaluate_lengths([16, 0]), "length=0 must be at least 1"),
        (lambda run: run.evaluate_lengths([16], max_tokens=-3), "max_tokens=-3 must be at least 1"),
        (lambda run: run.read([1.7]), "tokens must be integers"),
        (lambda run: run.read(b"12"), "tokens must be"),
        (lambda run: run.logits(np.zeros((0, 4), int)), "at least one row of at least one token"),
        (lambda run: run.logits(np.zeros((2, 0), int)), "at least one row of at least one token"),
        (lambda run: run.validation("/nowhere"), "^data '/nowhere' does not exist"),
        (lambda run: seqmodels.load_run(run.workdir, devices=0), "no devices are asked for"),
        (lambda run: seqmodels.load_run(run.workdir, devices=-1), "-1 devices are asked for"),
        (lambda run: seqmodels.load_run(run.workdir, devices=[]), "no devices are asked for"),
        (lambda run: seqmodels.load_run(run.workdir, step="6"), "no checkpoint of step '6'"),
    ],
)
def test_what_is_no_argument_is_said_before_anything_is_computed(run, ask, said):
    """In a notebook nobody reads flags: floats that would be cut, one text that would be a list of letters, a seed of more bits."""
    with pytest.raises((UserError, ValueError), match=said):
        ask(run)


def test_a_folder_that_is_no_run_is_named(tmp_path, trained):
    with pytest.raises(UserError, match="no such folder"):
        seqmodels.load_run(tmp_path / "nothing")
    with pytest.raises(UserError, match="no config.json"):
        seqmodels.load_run(tmp_path)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(trained[0] / name, tmp_path / name)
    with pytest.raises(UserError, match="no checkpoint"):
        seqmodels.load_run(tmp_path)


def test_a_step_that_is_not_there_lists_those_that_are(trained):
    with pytest.raises(UserError, match=r"step 5 .*3, 6"):
        seqmodels.load_run(trained[0], step=5)


def test_eval_ends_with_one_json_line(trained, run, tmp_path):
    shutil.copytree(trained[0], tmp_path / "moved")  # a run folder may be copied anywhere
    done = command("eval.py", "--workdir=moved", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    expected = run.evaluate()
    assert row["step"] == 6 and row["tokenizer"] == "bytes"
    kept = json.loads((tmp_path / "moved" / "data.json").read_text())
    assert kept["said"].startswith("data: training on ") and row["validation_documents"] == kept["validation"]["documents"]
    assert row["validation_loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert row["perplexity"] == pytest.approx(math.exp(row["validation_loss"]))
    assert row["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
    means = by_context_length(expected.loss_by_position)
    assert list(row["loss_by_position"]) == ["1", "2", "3-4", "5-8", "9-16", "17-32"]
    assert list(row["loss_by_position"].values()) == pytest.approx(list(means.values()), rel=1e-5)
    assert row["parameters"] == run.trainer.num_parameters and row["state_bytes"] == run.state_bytes()
    assert row["tokens_per_second"] > 0
    assert (tmp_path / "moved" / "loss_by_position.png").read_bytes().startswith(b"\x89PNG")


def generate_here(monkeypatch, capsys, *arguments, cwd):
    monkeypatch.chdir(cwd)
    assert in_process(monkeypatch, "scripts/generate.py", *arguments) == 0
    return capsys.readouterr()


def generate_as_a_process(monkeypatch, capsys, *arguments, cwd):
    done = command("scripts/generate.py", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize("generate", [generate_here, pytest.param(generate_as_a_process, marks=pytest.mark.tools)])
def test_generate_streams(trained, run, tmp_path, monkeypatch, capsys, generate):
    options = (f"--workdir={trained[0]}", "--max_tokens=12", "--seed=3", "--prompt=Once upon a time")
    out, err = generate(monkeypatch, capsys, *options, cwd=tmp_path)
    story = run.generate("Once upon a time", max_tokens=12, seed=3)
    assert out == escape("Once upon a time" + story, "terminal") + "\n"
    assert "tokens/s" in err


@pytest.mark.tools
def test_a_prompt_with_half_a_character_is_continued(trained, tmp_path, monkeypatch, capsys):
    options = (f"--workdir={trained[0]}", "--max_tokens=3", "--temperature=0")
    assert in_process(monkeypatch, "scripts/generate.py", *options, "--prompt=caf\udcc3 \ud83d") == 0
    assert capsys.readouterr().out.startswith("caf\ufffd \ufffd")
    (tmp_path / "prompts.yaml").write_text('- "caf \\uD83D"\n')
    files = (f"--prompts_file={tmp_path / 'prompts.yaml'}", f"--output={tmp_path / 'out.jsonl'}")
    assert in_process(monkeypatch, "scripts/generate.py", *options, *files) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["prompt"] == "caf \ufffd"


def test_generate_continues_a_file_of_prompts(trained, run, tmp_path, monkeypatch):
    (tmp_path / "prompts.yaml").write_text("- Once upon\n- One day\n")
    options = (f"--workdir={trained[0]}", "--max_tokens=12", "--seed=3")
    files = (f"--prompts_file={tmp_path / 'prompts.yaml'}", f"--output={tmp_path / 'out.jsonl'}")
    assert in_process(monkeypatch, "scripts/generate.py", *options, *files) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Once upon", "One day"]
    continuations = run.generate_batch(["Once upon", "One day"], max_tokens=12, temperature=0.8, seed=3)
    assert [row["continuation"] for row in rows] == continuations


@pytest.mark.tools
def test_many_prompts_are_written_batch_by_batch(trained, run, tmp_path, monkeypatch, capsys):
    """Five at most two at a time: three batches, each in the file before the next is begun, and the texts of one batch."""
    prompts = ["Once upon", "One day", "A dog", "Ben", "The end"]
    (tmp_path / "prompts.yaml").write_text("".join(f'- "{prompt}"\n' for prompt in prompts))
    output = tmp_path / "out.jsonl"
    lines_before = []
    real = seqmodels.run.Run.generate_batch

    def spy(self, *arguments, **options):
        lines_before.append(len(output.read_text().splitlines()) if output.exists() else 0)
        return real(self, *arguments, **options)

    monkeypatch.setattr(seqmodels.run.Run, "generate_batch", spy)
    options = (f"--workdir={trained[0]}", "--max_tokens=6", "--batch_size=2", f"--output={output}")
    assert in_process(monkeypatch, "scripts/generate.py", *options, f"--prompts_file={tmp_path / 'prompts.yaml'}") == 0
    assert lines_before == [0, 2, 4]
    assert "5 of 5 prompts" in capsys.readouterr().err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    assert [row["continuation"] for row in rows] == real(run, prompts, max_tokens=6)


@pytest.mark.tools
def test_a_state_is_saved_and_gone_on_from(trained, run, tmp_path, monkeypatch, capsys):
    """From the command line: the text is what the state's text and the new prompt would have given."""
    state = tmp_path / "begun.npz"
    options = (f"--workdir={trained[0]}", "--max_tokens=6", "--temperature=0")
    assert in_process(monkeypatch, "scripts/generate.py", *options, "--prompt=Once upon", f"--save_state={state}") == 0
    begun = capsys.readouterr().out[:-1]
    assert begun == "Once upon" + run.generate("Once upon", max_tokens=6, temperature=0)
    loaded = run.load_state(state)
    assert run.tokenizer.decode(loaded.tokens) == begun
    assert in_process(monkeypatch, "scripts/generate.py", *options, "--prompt= a", f"--from_state={state}") == 0
    expected = " a" + run.generate(begun + " a", max_tokens=6, temperature=0)
    assert capsys.readouterr().out == expected + "\n"
    assert run.continue_from(run.read(" a", loaded), max_tokens=6, temperature=0)[0] == expected[2:]
    assert in_process(monkeypatch, "scripts/generate.py", *options, f"--from_state={state}") == 0  # no prompt: go on
    assert capsys.readouterr().out == run.generate(begun, max_tokens=6, temperature=0) + "\n"


@pytest.mark.tools
def test_what_the_text_looked_at_is_drawn(trained, tmp_path, monkeypatch, capsys):
    options = (f"--workdir={trained[0]}", "--max_tokens=2", "--prompt=Once", f"--attention_plot={tmp_path / 'looked.png'}")
    assert in_process(monkeypatch, "scripts/generate.py", *options) == 0
    assert "looked.png: 1 layers, 4 heads" in capsys.readouterr().err
    assert (tmp_path / "looked.png").read_bytes().startswith(b"\x89PNG")


def test_a_state_of_another_step_is_refused(trained, run, tmp_path):
    state = run.read("Once")
    earlier = seqmodels.load_run(trained[0], step=3)
    for use in (earlier.continue_from, lambda state: earlier.read("x", state), lambda state: earlier.stream("", after=state)):
        with pytest.raises(UserError, match="other parameters"):
            use(state)
    state.save(tmp_path / "state.npz")
    with pytest.raises(UserError, match="another step"):
        earlier.load_state(tmp_path / "state.npz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- 5\n", "entry 2 is 5 (int)"),
        ("a: b\n", "must be a YAML list"),
        ("", "must be a YAML list"),
        ("- [\n", "entry 1 is a sequence"),
        ("- 'a\n", "is not YAML"),
    ],
)
def test_a_file_that_is_no_list_of_prompts(trained, tmp_path, monkeypatch, content, message):
    (tmp_path / "prompts.yaml").write_text(content)
    (tmp_path / "out.jsonl").write_text("mine")
    arguments = (f"--prompts_file={tmp_path / 'prompts.yaml'}", f"--output={tmp_path / 'out.jsonl'}")
    line = in_process(monkeypatch, "scripts/generate.py", f"--workdir={trained[0]}", *arguments)
    assert line.startswith("error: ") and message in line and "\n" not in line
    assert (tmp_path / "out.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("eval.py", (), "--workdir"),
        ("eval.py", ("--workdir=/nowhere",), "not a run folder"),
        ("eval.py", ("--workdir={run}", "--step=5"), "step 5"),
        ("eval.py", ("--workdir={run}", "--step=five"), "--step"),
        ("eval.py", ("--workdir={run}", "--data=/nowhere/stories.txt"), "/nowhere/stories.txt"),
        ("scripts/generate.py", ("--workdir={run}",), "--prompt"),
        ("scripts/generate.py", ("--workdir={run}", "--prompt=x", "--temperature=-1"), "temperature"),
        ("scripts/generate.py", ("--workdir={run}", "--prompts_file=/nowhere.yaml"), "/nowhere.yaml"),
        ("scripts/generate.py", ("--workdir={run}", "--prompt=x", "--prompts_file=y"), "not both"),
        ("scripts/generate.py", ("--workdir={run}", "--prompt=x", "--output=/no/where/x.jsonl"), "no folder /no/where"),
        ("scripts/generate.py", ("--workdir={run}", "--prompt=x", "--save_state=/no/where/x.npz"), "no folder /no/where"),
        (
            "scripts/generate.py",
            ("--workdir={run}", "--prompts_file={run}/a", "--output={run}/./a"),
            "the file of --prompts_file",
        ),
        (
            "scripts/generate.py",
            ("--workdir={run}", "--prompt=x", "--save_state=a", "--attention_plot=./a"),
            "the file of --save_state",
        ),
        ("scripts/generate.py", ("--workdir={run}", "--prompt=x", "--output={run}/tokenizer.json"), "the file of --workdir"),
        ("scripts/generate.py", ("--workdir={run}", "--prompt=x", "--attention_plot=a.txt"), "must end in .png, .svg, .pdf"),
        ("scripts/generate.py", ("--workdir={run}", "--from_state=/nowhere.npz"), "no file /nowhere.npz"),
        ("scripts/generate.py", ("--workdir={run}", "--from_state=x", "--output=y"), "--from_state is for one text"),
        ("scripts/generate.py", ("--workdir={run}", "--prompt=x", "--batch_size=0"), "--batch_size"),
    ],
)
def test_a_persons_mistake_is_one_line(trained, monkeypatch, capsys, script, arguments, message):
    arguments = [argument.format(run=trained[0]) for argument in arguments]
    line = in_process(monkeypatch, script, *arguments)  # a text here is printed on stderr; the status is then 1
    assert line.startswith("error: ") and message in line and "\n" not in line
    assert capsys.readouterr() == ("", "")


def test_what_is_more_than_the_device_has_room_for_is_refused_before_memory_is_asked_for(run, monkeypatch):
    monkeypatch.setattr(device_memory, "available", lambda devices: 10**5)
    for ask, said in (
        (lambda: run.logits(np.zeros((4, 100), int)), "logits of 400 tokens need .* GiB on a device that has"),
        (lambda: run.attention_weights(np.zeros((1, 400), int)), "the weights of 400 tokens, all pairs of them, need .* GiB on"),
    ):
        with pytest.raises(UserError, match=said):
            ask()


def test_windows_longer_than_the_text_are_refused_before_memory_is_asked_for(run):
    with pytest.raises(UserError, match="a length of 999,999,999 tokens is more than the .* that the text has"):
        run.evaluate_lengths((16, 999_999_999))
