"""Which runs are due, how many at a time, and what ends a comparison: with programs that only pretend to train."""

import json
import os
import signal
import termios
import threading
import time

import numpy as np
import pytest

from configs import demo, recall
from configs.compare import base, probe, rate_length, tinystories_medium, tinystories_small, toy
from seqmodels import mixers, model
from seqmodels.comparison import jobs, plan, results, sizes
from seqmodels.comparison.report import content, figures, html, markdown
from seqmodels.data.text import validation
from seqmodels.errors import UserError
from seqmodels.training import loop

pytestmark = pytest.mark.tools

VOCAB_SIZE = 64
LINKS = dict.fromkeys(mixers.names(), "mixer.py")

# Pretends to train: notes its start, and is best at a rate of 1e-2 (or has diverged, above 1).
TRAIN = """
import json, pathlib, signal, sys, time
rate, seed, folder = float(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[-1].partition("=")[2])
with open(folder.parents[2] / "started", "a") as file:
    file.write(f"{folder.relative_to(folder.parents[2])}\\n")
def stop(*_):
    (folder / "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
if (folder.parents[2] / "slow").exists():
    (folder.parents[2] / "slow").unlink()
    time.sleep(60)
if (folder.parents[2] / "broken").exists():
    sys.exit("error: the disk is full")
if rate > 1:
    print(json.dumps({"step": 2, "diverged": True}))
    sys.exit(1)
row = {"step": 10, "split": "validation", "loss": 1.0, "tokens": 10, "seconds": 1.0, "accuracy": 0.5}
(folder / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
print(json.dumps({"step": 10, "validation_loss": 1.0}))
"""

MEASURE = """
import json, math, pathlib, sys
values = [argument[2:].partition("=") for argument in sys.argv[1:]]
for name, _, value in values:
    if name == "score":
        import numpy as np
        folder = pathlib.Path(value)
        rate, seed = float(folder.parent.name[2:].split("_")[0]), int(folder.name[4:])
        loss = (2.0 + math.log10(rate / 1e-2) ** 2 + 0.01 * seed) * np.array([10.0, 12.0, 9.0, 11.0])
        tokens = np.full(4, 10.0)
        is_task = (folder.parents[2] / "task").exists()
        count = 1 if (folder.parents[2] / "one_document").exists() else 4
        loss, tokens = loss[:count], tokens[:count]
        # of a task: one label of the four examples is wrong, or all of the first segment at a bad rate
        np.savez(
            folder / "scores.npz", loss=loss, tokens=tokens, bytes=4 * tokens, hit_loss=loss / 4, hit_tokens=tokens / 2,
            errors=np.array([0.0, 1.0, 0.0, 0.0] if rate <= 1e-2 else [10.0, 10.0, 0.0, 0.0])[:count] * is_task,
            segment=np.array([0, 0, 1, 1])[:count] * is_task, segment_names=np.array(["length 4", "length 8"][: 2 * is_task]),
            segment_lengths=np.array([4, 8][: 2 * is_task]),
            position_loss=loss * (count > 1), position_tokens=tokens * (count > 1), validation_tokens=0, frequent_pairs=0,
        )
named = {name: value for name, _, value in values}
if "cost" in named:
    asked = json.loads(named["asked"])
    one = {str(context): 1.0 for context in (8, 32, 256)}
    folder_of_all = pathlib.Path(named["out"]).parents[1]
    pathlib.Path(named["out"]).write_text(json.dumps({
        "asked": asked, "device": "none", "parameters": 1, "flops_per_token": 1.0, "train_tokens_per_second": 1.0,
        "flop_utilisation": None, "peak_flops_per_second": None, "train_step_bytes": 1, "state_bytes": one, "decode_seconds": one,
        "load_per_core": 3.0 if (folder_of_all / "busy").exists() else 0.5,
    }))
"""


@pytest.fixture
def programs(tmp_path):
    for name, text in (("train", TRAIN), ("measure", MEASURE)):
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch):
    """The four documents that MEASURE pretends to score."""
    monkeypatch.setattr(validation, "FEW_DOCUMENTS", 2)
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.05)  # these programs end at once


def planned(folder, **changes) -> plan.Plan:
    config = base.get_config(demo.get_config())
    config.mixers, config.match, config.contexts = "attention, mlp mlp", "none", (8,)
    config.learning_rates, config.seeds = (1e-1, 1e-3, 1e-2), 3
    config.rate_seeds, config.rate_extensions, config.control = 1, 0, False
    config.base.data.tokenizer, config.base.model.d_model, config.base.model.repeats = "bytes", 32, 1
    config.base.train.steps = 10
    config.update(changes)
    return plan.Plan(config, folder / "compare", VOCAB_SIZE)


ABOUT = {
    "machine": {"processor": "", "cores": 1}, "versions": {}, "command": "", "commit": "", "date": "", "training_data": "abc"
}  # fmt: skip


def execute(programs, of: plan.Plan, number: int = 1, on_news=lambda: None) -> dict:
    """Carry it out; the results."""
    of.workdir.mkdir(exist_ok=True)
    jobs.Executor(
        of, jobs=number, train=lambda run: [str(programs / "train.py"), str(run.learning_rate), str(run.seed)],
        worker=str(programs / "measure.py"), vocab_size=VOCAB_SIZE, on_news=on_news,
    ).run()  # fmt: skip
    found = results.gather(of, VOCAB_SIZE, ABOUT)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def started(of: plan.Plan) -> list[str]:
    return (of.workdir / "started").read_text().split()


@pytest.mark.parametrize("number", [1, 3])
def test_every_run_once(programs, number):
    """All rates with the first seed, then the other seeds at the best rate, whose first run is not done again."""
    of = planned(programs)
    found = execute(programs, of, number)
    expected = [
        f"{name}/{run}"
        for name in ("attention", "mlp_mlp")
        for run in ("lr0.001/seed0", "lr0.01/seed0", "lr0.1/seed0", "lr0.01/seed1", "lr0.01/seed2")
    ]
    assert sorted(started(of)) == sorted(expected)
    if number == 1:
        assert started(of) == expected, "one mixer is completed before the next"
    for row in found["mixers"].values():
        assert row["best_rate"] == 1e-2 and [run["seed"] for run in row["runs"]] == [0, 1, 2]
        # the odd documents: 2 + 0.01 seed nats for each of 12 + 11 of 10 + 10 tokens
        assert row["quality"]["losses"] == pytest.approx([(2.0 + 0.01 * seed) * 23 / 20 for seed in range(3)])
        assert row["quality"]["loss"]["high"] - row["quality"]["loss"]["mean"] == pytest.approx(
            4.302652729911275 * 0.0115 / 3**0.5
        )
    assert found["warnings"] == []
    assert execute(programs, of, number) == found and len(started(of)) == len(expected)


@pytest.mark.parametrize("number", [1, 2])
def test_what_is_known_is_reported_at_once(programs, number):
    """With several processes costs are measured last, and the report does not wait for them."""
    of, news = planned(programs, seeds=1), []

    def note():
        rows = results.gather(of, VOCAB_SIZE, ABOUT)["mixers"].values()
        news.append(tuple(sum(row[part] is not None for row in rows) for part in ("quality", "cost")))

    execute(programs, of, number, note)
    if number == 1:
        assert news == [(1, 0), (1, 1), (2, 1), (2, 2)]
    else:  # the two may also be judged at once
        assert news[-3:] == [(2, 0), (2, 1), (2, 2)]


def test_a_short_search_is_apart_from_the_runs_that_are_reported(programs):
    of = planned(programs, rate_steps=4, seeds=2, mixers="attention")
    execute(programs, of)
    assert started(of)[:3] == [f"attention/lr{rate}_4_steps/seed0" for rate in ("0.001", "0.01", "0.1")]
    assert started(of)[3:] == ["attention/lr0.01/seed0", "attention/lr0.01/seed1"]


def test_a_short_search_has_a_short_schedule(programs):
    """Warm-up and decay take the same part of a short run as of a long one; a warm-up of no step stays that."""

    def optim(warmup, decay, rate_steps):
        of = planned(programs, rate_steps=rate_steps)
        changed = {**of.base, "train": {**of.base["train"], "steps": 490}}
        changed["optim"] = {**of.base["optim"], "warmup_steps": warmup, "decay_steps": decay}
        of = planned(programs, rate_steps=rate_steps, base=changed)
        found = of.rate_runs(of.candidates[0], of.rates())[0].config
        assert found.train.steps == (rate_steps or 490)
        return found.optim.warmup_steps, found.optim.decay_steps

    assert optim(50, None, 120) == (12, None) and optim(50, 490, 120) == (12, 120)
    assert optim(1, 400, 49) == (1, 40) and optim(0, None, 120) == (0, None) and optim(50, None, 0) == (50, None)


def test_the_grid_extends_until_the_best_is_inside(programs):
    """By halves and doubles beyond the end at which the best lies, at most so often; the same again from the same folder."""
    of = planned(programs, learning_rates=(4e-2, 8e-2), rate_extensions=3, rate_seeds=2, seeds=2, mixers="attention")
    found = execute(programs, of)
    rates = ["0.04", "0.08", "0.02", "0.01"]
    assert started(of) == [f"attention/lr{rate}/seed{seed}" for rate in rates for seed in (0, 1)] + [
        f"attention/lr0.005/seed{seed}" for seed in (0, 1)
    ]
    row = found["mixers"]["attention"]
    assert row["best_rate"] == 1e-2 and [each["rate"] for each in row["rates"]] == [5e-3, 1e-2, 2e-2, 4e-2, 8e-2]
    assert found["warnings"] == [] and found["rate_search"]["runs"] == 10
    assert "Rates beyond the grid were tried for attention (0.005, 0.01, 0.02)" in markdown.page(found, [], LINKS)
    number = len(started(of))
    assert execute(programs, of) == found and len(started(of)) == number
    of = planned(programs, learning_rates=(1e-5, 2e-5), rate_extensions=2, seeds=1, mixers="attention")
    row = execute(programs, of)["mixers"]["attention"]
    assert [each["rate"] for each in row["rates"]] == [1e-5, 2e-5, 4e-5, 8e-5], "bounded"
    of = planned(programs, learning_rates=(4.0, 8.0), rate_extensions=2, seeds=1, mixers="attention")
    assert execute(programs, of)["mixers"]["attention"]["best_rate"] == 1.0, "all of the grid have diverged"


def test_whether_the_rate_chosen_short_wins_at_full_length(programs):
    of = planned(programs, rate_steps=4, seeds=2, mixers="attention", check_rates=True)
    found = execute(programs, of)
    at_length = found["mixers"]["attention"]["rates_at_length"]
    assert len(started(of)) == 3 + 3 * 2 and [each["rate"] for each in at_length["rates"]] == [1e-3, 1e-2, 1e-1]
    assert at_length["best"] == 1e-2 and at_length["regret"] == 0.0
    # the even documents: 2 + 0.01 seed nats for each of 10 + 9 of 10 + 10 tokens
    assert at_length["spread"] == pytest.approx(0.01 * 0.95 / 2**0.5, rel=1e-3)
    assert "| attention | 0.01 | 0.01 | 0.0000 | 0.0067 |" in markdown.page(found, [], LINKS)


def test_the_control(programs):
    """MLPs alone, matched, last and not ranked; what mixers gain over it is said, and it is among the pairs."""
    of = planned(programs, mixers="attention, gla", match="params", tolerance=0.05, control=True, seeds=2, learning_rates=(1e-2,))
    assert [each.label for each in of.candidates] == ["attention", "gla", plan.CONTROL]
    control = of.candidates[-1]
    assert control.is_control and set(control.matched.sizes.pattern.split()) == {"mlp"}
    assert abs(control.matched.of_reference) <= 0.05
    found = execute(programs, of)
    rows = found["mixers"]
    assert found["control"] == plan.CONTROL and rows["attention"]["gain"] == {"bits_per_byte": 0.0}
    assert rows[plan.CONTROL]["gain"] is None and len(found["pairs"]) == 3
    pooled = [pair["over_seeds_pooled"] for pair in found["pairs"]]
    assert [each["p_value"] for each in pooled] == [1.0] * 3 and not any(pair["significant_pooled"] for pair in found["pairs"])
    text = markdown.page(found, [], LINKS)
    assert "no better than none: attention, gla" in text and "of 2: attention" in text
    assert content.terminal(found).splitlines()[-1].startswith(plan.CONTROL)
    with pytest.raises(UserError, match="'no_mixer', which is the control's label"):
        planned(programs, mixers="attention, no_mixer=gla mlp", control=True)
    task = recall.get_config("mqar_small").copy_and_resolve_references()
    assert len(planned(programs, base=task, mixers="attention", control=True).candidates) == 1, "a task has none"


def test_what_will_be_done_is_said(programs, capsys):
    of = planned(programs, rate_steps=5, rate_seeds=2, seeds=2)
    of.workdir.mkdir()

    def announced():
        executor = jobs.Executor(of, jobs=1, train=list, worker="", vocab_size=VOCAB_SIZE, on_news=list)
        return executor.announcement()

    tokens = of.base["data"]["batch_size"] * of.base["data"]["seq_len"]
    runs, search, time_left = announced()
    assert runs == f"16 runs, 100 steps, {100 * tokens:,} tokens; 0 runs are done"
    assert search.startswith("of these the learning rates take 12 runs and 60 steps (60%)") and "first run has ended" in time_left
    execute(programs, of)
    assert announced()[0].endswith("16 runs are done") and announced()[2] == "time: everything is trained"
    assert "attention lr 0.001 seed 0: validation loss 1.0000 after 10 steps, 0:00:0" in capsys.readouterr().err


def test_starts_that_go_with_the_result_are_said(programs):
    """Of four mixers the token's share falls as the loss grows: the report has both, the correlation and a warning."""
    of = planned(programs, mixers="attention, gla, mamba, lstm", learning_rates=(1e-2,), seeds=1)
    execute(programs, of)
    for index, candidate in enumerate(of.candidates):
        [run] = of.seed_runs(candidate, 1e-2)
        with np.load(run.folder / "scores.npz") as saved:
            values = dict(saved)
        np.savez(
            run.folder / "scores.npz", **(values | {"loss": values["loss"] + index, "position_loss": values["loss"] + 8 * index})
        )
        summary = {"token_share_first": 0.9 - 0.2 * index, "stream_rms_last": 1.0 + 0.1 * index}
        jobs.write_json(candidate.folder / jobs.START, {"asked": {}, "figures": {}, "summary": summary})
    found = results.gather(of, VOCAB_SIZE, ABOUT)
    spearman = found["audit"]["spearman"]
    assert spearman["token_share_first"]["rho"] == -1.0 and spearman["position_1_loss"]["rho"] == 1.0
    share, position = found["audit"]["differences"]
    assert "first layer goes from 0.3 (lstm) to 0.9 (attention)" in share and "one token of context" in position
    assert any(warning.startswith("the mixers start unlike: the token's share") for warning in found["warnings"])
    text = markdown.page(found, [], LINKS)
    assert "| token's share of the stream after the first layer | -1.00 |" in text and "The mixers start unlike" in text
    # What others wrote is text in both.
    hostile = "<script>alert(1)</script> ![x](http://a/b.png) \x1b[2J"
    base = {**found["base"], "data": {**found["base"]["data"], "source": hostile}}
    rows = {hostile if label == "mamba" else label: row for label, row in found["mixers"].items()}
    found |= {"warnings": [hostile], "base": base, "mixers": rows, "about": {**found["about"], "command": hostile}}
    for text in (markdown.page(found, [], LINKS), html.page(found, [], LINKS)):
        assert "<script>alert" not in text and "\x1b" not in text and text.count("alert(1)") >= 4
    assert "![x](" not in markdown.page(found, [], LINKS)


def test_a_report_of_few_documents_warns(programs, monkeypatch):
    monkeypatch.setattr(validation, "FEW_DOCUMENTS", 50)
    found = execute(programs, planned(programs, mixers="attention", seeds=1))
    expected = [f"{what}: only 2 documents, fewer than 50" for what in ("reported on", "learning rates chosen on")]
    assert [warning[: len(start)] for warning, start in zip(found["warnings"], expected, strict=True)] == expected
    assert all(f"- **Warning:** {start}" in markdown.page(found, [], LINKS) for start in expected)


def test_no_document_is_left_to_report_on(programs):
    """The one there is chooses the learning rate; no figure is made up, and no difference is tested."""
    of = planned(programs)
    of.workdir.mkdir()
    (of.workdir / "one_document").touch()
    found = execute(programs, of)
    assert found["pairs"] == [] and found["validation"]["documents"] == 0
    for row in found["mixers"].values():
        assert row["best_rate"] == 1e-2
        assert row["quality"]["bits_per_byte"] == {"mean": None, "low": None, "high": None, "values": 3}
    assert content.headline(found).startswith("No mixer has figures. Too few documents")
    assert "| attention |" in markdown.page(found, figures.draw(found, of.workdir, ["png"]), LINKS)


def test_warnings(programs):
    """A best rate at an end of the grid, a rate that diverged, a mixer that diverged at all of them: a line for each kind."""
    of = planned(programs, learning_rates=(1e-2, 1e-1, 2.0), seeds=1)
    [edge, diverged] = sorted(execute(programs, of)["warnings"], key=lambda line: "diverged" in line)
    assert "the lowest that was tried: attention (0.01), mlp mlp (0.01); a lower one may be better" in edge
    assert "diverged at a learning rate: attention (2), mlp mlp (2)" in diverged
    of = planned(programs, learning_rates=(1e-3, 1e-2), seeds=1, mixers="attention")
    assert "the highest that was tried: attention (0.01)" in execute(programs, of)["warnings"][0]
    of = planned(programs, learning_rates=(1e-2,), seeds=1, mixers="attention", rate_extensions=2)
    assert "one learning rate was tried" in execute(programs, of)["warnings"][0]
    of = planned(programs, learning_rates=(2.0, 3.0), mixers="attention, mlp mlp")
    found = execute(programs, of)
    assert [row["quality"] for row in found["mixers"].values()] == [None, None] and found["pairs"] == []
    assert "diverged at every learning rate: attention (2, 3), mlp mlp (2, 3)" in found["warnings"][0]
    drawn = figures.draw(found, of.workdir, ["png"])
    assert "| attention |" in markdown.page(found, drawn, LINKS) and "</html>" in html.page(found, drawn, LINKS)


def test_a_task_is_judged_by_its_accuracy(programs):
    """Each segment counts once; rates alike in accuracy are parted by the loss; page and pictures speak of accuracy."""
    base = recall.get_config("mqar_small")
    base.train.steps = 10
    of = planned(programs, base=base.copy_and_resolve_references(), mixers="attention, lstm")
    of.workdir.mkdir()
    (of.workdir / "task").touch()
    assert [each.config.model.pattern for each in of.candidates] == ["attention", "lstm"], "as the base: without MLPs"
    found = execute(programs, of)
    row = found["mixers"]["attention"]
    assert row["best_rate"] == 1e-2 and [each["accuracy"] for each in row["rates"]] == [1.0, 1.0, 0.5]
    # of the reported examples 1 and 3: 1 of 10 labels wrong in the first segment, none in the second
    assert row["quality"]["accuracy"]["mean"] == pytest.approx(0.95)
    assert row["quality"]["by_segment"] == [["length 4", 4, pytest.approx(0.9)], ["length 8", 8, 1.0]]
    assert row["curves"][0]["accuracy"] == [0.5] and "perplexity" not in row["quality"]
    assert found["pairs"][0]["difference"] == 0.0 and not found["pairs"][0]["significant"]
    drawn = figures.draw(found, of.workdir, ["png"])
    assert {picture.name for picture in drawn} >= {"pareto", "by_segment", "curves", "rates"}
    assert not {picture.name for picture in drawn} & {"by_position", "recall"}
    text = markdown.page(found, drawn, LINKS)
    assert "accuracy 0.9500" in text and "perplexity" not in text and "the task mqar" in text
    assert "3 seeds do not show a difference between any two" in text
    assert "</html>" in html.page(found, drawn, LINKS)


def test_speeds_measured_beside_other_work(programs):
    of = planned(programs, seeds=1, mixers="attention")
    of.workdir.mkdir()
    (of.workdir / "busy").touch()
    [warning] = execute(programs, of)["warnings"]
    assert "busy with other work (up to 3.0 processes a core) when the speeds of attention were measured" in warning


def test_a_failure_ends_it_and_says_where_to_look(programs):
    of = planned(programs, mixers="attention")
    (programs / "compare").mkdir()
    (programs / "compare" / "broken").touch()
    with pytest.raises(UserError, match="attention lr 0.001 seed 0 ended with status 1.*the disk is full.*train.log"):
        execute(programs, of)
    (programs / "compare" / "broken").unlink()
    assert execute(programs, of)["mixers"]["attention"]["best_rate"] == 1e-2


def test_a_signal_stops_the_children_first(programs):
    of = planned(programs, mixers="attention")
    (programs / "compare").mkdir()
    (programs / "compare" / "slow").touch()

    def stop_when_it_trains():
        while (programs / "compare" / "slow").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_when_it_trains)
    thread.start()
    with pytest.raises(loop.Stopped) as stopped:
        execute(programs, of)
    thread.join()
    assert stopped.value.exit_code == 143
    assert (of.workdir / started(of)[0] / "saved").exists()
    assert execute(programs, of)["mixers"]["attention"]["best_rate"] == 1e-2


def test_a_run_that_goes_on_elsewhere_is_waited_for(programs):
    """Not started a second time while another process holds its folder; here, until that one is gone."""
    of = planned(programs, mixers="attention", learning_rates=(1e-2,), seeds=1)
    [run] = of.rate_runs(of.candidates[0], of.rates())
    run.folder.mkdir(parents=True)
    program = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); "
        "time.sleep(2)"
    )
    holder = jobs.subprocess.Popen([jobs.sys.executable, "-c", program, run.folder / ".lock"], stdout=jobs.subprocess.PIPE)
    holder.stdout.readline()
    execute(programs, of)
    assert holder.poll() is not None
    holder.communicate()


SETTINGS = [
    (toy.get_config, {}), *((probe.get_config, {"setting": setting}) for setting in probe.SETTINGS),
    (tinystories_small.get_config, {}), (rate_length.get_config, {}),
    *((tinystories_medium.get_config, {"setting": setting}) for setting in tinystories_medium.SETTINGS),
]  # fmt: skip


@pytest.mark.parametrize("get_config, options", SETTINGS)
def test_the_configs_there_are(get_config, options):
    """Complete, and every mixer in them can be built at the base's width."""
    compare, base = plan.read(get_config(**options))
    patterns = plan.entries(compare.mixers, base)
    assert len(patterns) >= 3 and compare.seeds >= 2
    for pattern in patterns.values():
        config = sizes.with_sizes(base, sizes.base_sizes(base, pattern))
        model.param_shapes(config.model, 512)


@pytest.mark.parametrize(
    "changes", [{"seeds": 10**9}, {"rate_seeds": 10**7, "seeds": 10**7}, {"rate_extensions": 1100}, {"contexts": (2**31 - 1,)},
                {"decode_tokens": 2**31 - 1}],
)  # fmt: skip
def test_more_runs_or_tokens_than_anybody_has_are_refused_before_one_is_planned(tmp_path, changes):
    (field, *_) = changes
    with pytest.raises(UserError, match=f"config.{field}=.*must be at most"):
        planned(tmp_path, **changes)
    plan.check_folders(planned(tmp_path, rate_extensions=32))


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (
            {"learning_rates": tuple(1e-3 + 1e-6 * number for number in range(5000))},
            "config.learning_rates=.* has more than 100 values",
        ),
        ({"contexts": tuple(range(1, 5000))}, "config.contexts=.* has more than 100 values"),
        ({"mixers": ",".join(f"a{number}=gla mlp" for number in range(5000))}, "config.mixers has 5,000 entries, more than 200"),
        ({"mixers": "gla," * 150 + "," * 10**6}, "config.mixers has .* entries, more than 200"),
        ({"mixers": "gla," + "x" * 10**5}, "there is no mixer or channel layer 'xxx"),
        (
            {"seeds": 1000, "mixers": "gla, mamba, lstm", "rate_extensions": 3},
            "may come to 27,0.. runs, more than 20,000: config.mixers has 3, config.learning_rates 3 .* config.seeds 1000",
        ),
    ],
    ids=["rates", "contexts", "mixers", "empty", "long", "runs"],
)
def test_a_comparison_of_thousands_is_refused_in_one_short_line(tmp_path, changes, complaint):
    config = toy.get_config()
    for name, value in changes.items():
        config[name] = value
    with pytest.raises(UserError, match=complaint) as error:
        plan.read(config)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_folder_names_and_entries():
    text = "gla, hybrid = mamba2 mlp  attention mlp, mlp mlp, mamba"
    found = plan.entries(text, {"model": {"pattern": "attention mlp"}})
    assert found == {
        "gla": "gla mlp", "hybrid": "mamba2 mlp attention mlp", "mlp mlp": "mlp mlp", "mamba": "mamba mamba"
    }  # fmt: skip
    alone = plan.entries(text, {"model": {"pattern": "attention"}})
    assert alone == found | {"gla": "gla", "mamba": "mamba"}, "a base without MLPs"
    long = " ".join(["mamba2 mlp"] * 20)
    assert plan.folder_name(long) != plan.folder_name(long + " mlp") and len(plan.folder_name(long)) < 64
    for label in plan.OWN_NAMES:
        with pytest.raises(UserError, match="would be a folder where the report has"):
            plan.entries(f"gla, {label.upper()} = mlp", {"model": {"pattern": "attention mlp"}})
    assert not set(plan.folder_name("../a/b c")) & set("/ ") and not plan.folder_name("../x").startswith(".")


def test_scores_of_other_tokens_do_not_count(programs):
    of = planned(programs, mixers="attention", learning_rates=(1e-2,), seeds=1)
    execute(programs, of)
    [run] = of.rate_runs(of.candidates[0], of.rates())
    assert jobs.scores.load(run.folder, 0) is not None and jobs.scores.load(run.folder, 5) is None
    with np.load(run.folder / "scores.npz") as saved:
        values = dict(saved)
    for name, value in {
        "validation_tokens": np.zeros(3), "frequent_pairs": np.array("x"), "loss": np.zeros(7), "tokens": np.zeros((4, 1)),
        "errors": np.array(["x"] * 4), "segment": np.full(4, 9), "position_loss": np.zeros(3), "segment_lengths": np.array(["x"]),
    }.items():  # fmt: skip
        np.savez(run.folder / "scores.npz", **values | {name: value})
        assert jobs.scores.load(run.folder, 0) is None, name
    (run.folder / "scores.npz").write_bytes(b"PK\x03\x04 damaged")
    assert jobs.scores.load(run.folder, 0) is None
    assert np.isfinite(execute(programs, of)["mixers"]["attention"]["quality"]["loss"]["mean"])


def test_a_record_that_no_comparison_wrote_does_not_count(programs):
    of = planned(programs, mixers="attention", learning_rates=(1e-2,), seeds=1)
    [candidate] = of.candidates
    [run] = of.rate_runs(candidate, of.rates())
    run.folder.mkdir(parents=True, exist_ok=True)
    whole = {"status": "finished", "step": 10, "seconds": 1.0, "summary": {}}
    jobs.write_json(run.folder / jobs.OUTCOME, whole)
    assert jobs.outcome(run) == whole
    for odd in ([whole], 5, {}, *({**whole, name: value} for name, value in (
        ("status", "x"), ("status", [1]), ("step", "10"), ("step", None), ("step", -1), ("seconds", True), ("summary", [1]),
    ))):  # fmt: skip
        jobs.write_json(run.folder / jobs.OUTCOME, odd)
        assert jobs.outcome(run) is None, odd
        for name, read in ((jobs.COST, lambda: jobs.cost(candidate, {})), (jobs.START, lambda: jobs.start(candidate))):
            jobs.write_json(candidate.folder / name, odd)
            assert read() is None, odd


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_the_line_of_progress_fits_the_terminal_that_it_is_written_to(term, monkeypatch):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(jobs, "REWRITE_SECONDS", 0.0)
    monkeypatch.setattr(jobs, "LINE_SECONDS", 0.0)
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 61))  # whatever stdout is
    with open(theirs, "w") as stream, open(ours, "rb", buffering=0) as shown:
        display = jobs.Display(stream)
        display.update(lambda: "x" * 100)
        display.close()
        stream.flush()
        text = shown.read(1000)
    assert text.count(b"x") == (60 if term == "xterm" else 100) and (b"\x1b" in text) == (term == "xterm")


def test_a_narrow_terminal_shows_the_time_left(programs, monkeypatch):
    """It cuts off what stands last, which is the name of a run."""
    monkeypatch.setattr(jobs.Executor, "_seconds_left", lambda self: 311.0)
    executor = jobs.Executor(
        planned(programs), jobs=1, train=lambda run: [], worker="", vocab_size=VOCAB_SIZE, on_news=lambda: None
    )
    assert executor._estimate_line().startswith("[0/10 runs, about 0:05:11 to go, waiting")
