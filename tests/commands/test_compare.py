"""scripts/compare.py from the command line to the page, with a run that diverges; killed on the way.

Comparisons take 90 CPU seconds each and are made in `make test-tools`; what decides, measures and draws has its tests in
tests/comparison.
"""

import html.parser
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from seqmodels import command_line
from seqmodels.comparison import jobs, scores, worker
from seqmodels.errors import UserError
from seqmodels.run import load_run

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "compare.py"
STEPS = 6
STATUS = {
    "attention/lr0.001/seed0": "finished", "attention/lr1e+30/seed0": "diverged",
    "no_mixer/lr0.001/seed0": "finished", "no_mixer/lr1e+30/seed0": "diverged",
}  # fmt: skip
pytestmark = pytest.mark.xdist_group("compare")  # one comparison for all of them
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def flags(folder: Path, **changes) -> list[str]:
    values = {
        "base.data.toy_documents": 60, "base.data.tokenizer": "bytes", "base.data.seq_len": 32, "base.data.batch_size": 4,
        "base.data.cache_dir": folder / "data", "base.model.d_model": 32, "base.model.repeats": 1,
        "base.optim.warmup_steps": 1, "base.train.steps": STEPS, "base.train.log_every_steps": 1,
        "base.train.eval_every_steps": 3, "base.train.eval_tokens": 256, "base.train.checkpoint_every_steps": 3,
        "learning_rates": "1e-3,1e30", "seeds": 1, "rate_extensions": 0,
        "validation_tokens": 4096, "contexts": "8,16", "decode_tokens": 4,
    } | changes  # fmt: skip
    return [
        f"--config={ROOT / 'configs' / 'compare' / 'toy.py'}",
        f"--workdir={folder / 'compare'}",
        "--mixers=attention,no_mixer=mlp mlp",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]


def start(argv: list[str], log: Path) -> subprocess.Popen:
    with open(log, "a") as stderr:
        return subprocess.Popen(
            [sys.executable, SCRIPT, *argv], stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip


def finish(folder: Path, log: Path) -> dict:
    """Compare to the end; the summary."""
    child = start(flags(folder), log)
    out, _ = child.communicate(timeout=1200)
    assert child.returncode == 0, log.read_text()
    return json.loads(out.splitlines()[-1])


def outcomes(folder: Path) -> dict[str, dict]:
    paths = (folder / "compare").rglob(jobs.OUTCOME)
    return {str(path.parent.relative_to(folder / "compare")): json.loads(path.read_text()) for path in paths}


@pytest.fixture(scope="module")
def script():
    """scripts/compare.py as a module, in this process."""
    sys.path.insert(0, str(SCRIPT.parent))
    specification = importlib.util.spec_from_file_location("compare", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison that was left alone: its folder, and its summary."""
    folder = tmp_path_factory.mktemp("compare")
    return folder, finish(folder, folder / "log")


@pytest.mark.tools
def test_every_run_ends(compared):
    folder, summary = compared
    assert {name: each["status"] for name, each in outcomes(folder).items()} == STATUS
    assert set(summary["mixers"]) == {"attention", "no_mixer"}
    assert math.isfinite(summary["mixers"]["attention"]["perplexity"])


@pytest.mark.tools
def test_a_killed_comparison_goes_on(tmp_path):
    """Killed (-9) in its second run and begun again: what was finished is not done again; the rest is."""
    log = tmp_path / "log"
    child = start(flags(tmp_path), log)
    end = time.monotonic() + 1200
    second = tmp_path / "compare" / "attention" / "lr1e+30" / "seed0" / "train.log"
    while not second.exists() and child.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    assert child.poll() is None, log.read_text()
    child.send_signal(signal.SIGKILL)
    child.communicate()
    done = {name: (tmp_path / "compare" / name / jobs.OUTCOME).stat().st_mtime_ns for name in outcomes(tmp_path)}
    assert list(done) == ["attention/lr0.001/seed0"]
    summary = finish(tmp_path, log)
    assert {name: each["status"] for name, each in outcomes(tmp_path).items()} == STATUS
    for name, written in done.items():
        assert (tmp_path / "compare" / name / jobs.OUTCOME).stat().st_mtime_ns == written
    assert set(summary["mixers"]) == {"attention", "no_mixer"}
    assert math.isfinite(summary["mixers"]["attention"]["perplexity"])


@pytest.mark.tools
def test_a_finished_comparison_starts_no_process(compared, script, monkeypatch, tmp_path, capsys):
    """Its records are enough, without checkpoints, tokenizers and logs: so it can be taken to another machine, and published."""
    folder, summary = compared
    kept = [path for path in (folder / "compare").rglob("*") if path.name in jobs.RECORDS]
    for path in kept:
        copy = tmp_path / "compare" / path.relative_to(folder / "compare")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)

    def forbidden(*_, **__):
        raise AssertionError("a child was started")

    monkeypatch.setattr(jobs.Executor, "_launch", forbidden)
    elsewhere = [each.replace(f"--workdir={folder}", f"--workdir={tmp_path}") for each in flags(folder)]
    script.main([str(SCRIPT), *elsewhere])
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["mixers"] == summary["mixers"]
    assert "4 runs are done" in said.err and "time: everything is trained" in said.err
    assert "measuring how the untrained model starts" not in said.err, "what is known of the start is not measured again"
    table = said.err[said.err.index("\nmixer ") + 1 :].splitlines()
    assert table[0].split()[:4] == ["mixer", "bits", "per", "byte"] and table[2].startswith("no_mixer"), "the control is last"
    first, second = (json.loads((each / "compare" / "results.json").read_text()) for each in (folder, tmp_path))
    assert second["pairs"] == first["pairs"] and second["mixers"]["attention"]["cost"] == first["mixers"]["attention"]["cost"]


def test_a_run_without_scores_or_checkpoint_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["worker", f"--score={tmp_path}"])
    with pytest.raises(UserError, match="neither its scores nor a checkpoint to score: rename the folder"):
        worker.main()


@pytest.mark.tools
def test_every_command_trains_what_was_planned(compared, script):
    """It names every field in which a run differs from configs/base.py, and so needs no file of the comparison."""
    folder, _ = compared
    for name, each in outcomes(folder).items():
        python, program, *argv = shlex.split(each["command"])
        config, workdir = script.train.parse([program, *argv])
        assert python == "python" and workdir == folder / "compare" / name
        assert config == script.config_lib.load(workdir / "config.json")


@pytest.mark.tools
def test_results(compared):
    """The figures are those of the runs: by another way, from the run's folder."""
    folder, _ = compared
    results = json.loads((folder / "compare" / "results.json").read_text())
    rows = results["mixers"]
    assert abs(rows["no_mixer"]["of_reference"]) <= 0.01
    row = rows["attention"]
    assert row["best_rate"] == 1e-3 and row["rates"][1]["loss"] is None
    assert len(row["rates"][1]["diverged_at"]) == 1 and row["rates"][1]["diverged_at"][0] <= STEPS
    run = load_run(folder / "compare" / "attention" / "lr0.001" / "seed0")
    evaluation = run.evaluate(max_tokens=4096)
    scored = scores.load(run.workdir, 4096)
    assert scored.loss.sum() / scored.tokens.sum() == pytest.approx(evaluation.loss, rel=1e-6)
    assert scored.tokens.sum() == 4096
    halves = [scored.mean("loss", half) * scored.tokens[half].sum() for half in (scored.reported, ~scored.reported)]
    assert sum(halves) / 4096 == pytest.approx(evaluation.loss, rel=1e-6)
    assert scored.frequent_pairs > 0 and scored.hit_loss.sum() <= scored.loss.sum()
    rest = (scored.tokens - scored.hit_tokens)[scored.reported].sum()
    parts = scored.hit_loss[scored.reported].sum() + scored.mean("rest_loss", scored.reported) * rest
    assert parts == pytest.approx(scored.loss[scored.reported].sum())
    assert row["quality"]["loss"]["mean"] == pytest.approx(scored.mean("loss", scored.reported))
    assert row["quality"]["perplexity"]["mean"] == pytest.approx(math.exp(row["quality"]["loss"]["mean"]))
    # of bytes, every target but an end of text is one byte
    reported = slice(1, None, 2)
    nats = scored.loss[reported].sum() / math.log(2)
    assert row["quality"]["bits_per_byte"]["mean"] == pytest.approx(nats / scored.bytes[reported].sum())
    assert row["cost"]["parameters"] == run.trainer.num_parameters
    assert row["cost"]["state_bytes"]["32"] == run.state_bytes(32)
    assert row["cost"]["flop_utilisation"] is None, "a CPU has no data sheet"
    assert row["cost"]["train_step_bytes"] > 3 * 4 * row["cost"]["parameters"], "parameters and two moments"
    assert set(row["cost"]["decode_seconds"]) == {"8", "16"}
    assert results["control"] == "no_mixer" and rows["no_mixer"]["gain"] is None
    means = {label: each["quality"]["bits_per_byte"]["mean"] for label, each in rows.items()}
    assert row["gain"]["bits_per_byte"] == pytest.approx(means["no_mixer"] - means["attention"])
    assert row["quality"]["position_1_loss"]["mean"] == pytest.approx(scored.by_position()[0])
    start = row["start"]
    assert start["figures"]["layers"] == ["attention", "mlp"] and 0 < start["summary"]["token_share_last"] < 1
    assert start["summary"]["token_share_first"] == start["figures"]["token_share"][0]
    [pair] = results["pairs"]
    assert pair["difference"] < 0 and pair["over_seeds"] is None and not pair["significant"], "one seed shows nothing"
    low, high = pair["over_documents"]["low"], pair["over_documents"]["high"]
    assert low <= pair["difference"] <= high


@pytest.mark.tools
def test_warnings(compared):
    _, summary = compared
    said = "\n".join(summary["warnings"])
    assert "the best learning rate is the lowest that was tried: attention (0.001), no_mixer (0.001)" in said
    assert "diverged at a learning rate: attention (1e+30), no_mixer (1e+30)" in said


@pytest.mark.tools
def test_other_runs_are_not_overwritten(compared, script):
    folder, _ = compared
    with pytest.raises(SystemExit, match=r"seed0 holds a run with train.steps 6, not 7: choose another --workdir"):
        command_line.run(lambda: script.main([str(SCRIPT), *flags(folder, **{"base.train.steps": 7})]))


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--mixers=atention", "did you mean 'attention'"),
        ("--mixers=gla,", "empty entry"),
        ("--mixers=gla,gla", "'gla' twice"),
        ("--config.match=size", "config.match='size' is not one of"),
        ("--config.learning_rates=fast", "learning_rates"),
        ("--config.seeds=0", "config.seeds=0 must be at least 1"),
        ("--config.base.train.stpes=3", "steps"),
        ("--config.base.model.mixers.gla.num_heads=5", "num_heads"),
        ("--jobs=0", "--jobs=0 must be at least 1"),
        ("--jobs=1025", "--jobs=1025 must be at most 1024"),
        ("--jobs=two", "--jobs='two' must be int"),
        ("--config.base.data.source=/no/such/data", "/no/such/data"),
        ("--config=" + str(ROOT / "configs" / "demo.py"), "comparison"),
    ],
)
def test_mistakes_are_one_line(script, tmp_path, flag, complaint):
    workdir = tmp_path / "compare"
    argv = [str(SCRIPT), *flags(workdir)]
    if flag.startswith("--config="):
        argv = [str(SCRIPT), flag, f"--workdir={workdir}"]
    elif flag.startswith("--mixers="):
        argv = [each for each in argv if not each.startswith("--mixers=")] + [flag]
    else:
        argv = [each for each in argv if not each.startswith("--mixers=")] + ["--mixers=attention,gla", flag]
    with pytest.raises(SystemExit) as stopped:
        command_line.run(lambda: script.main(argv))
    assert str(stopped.value.code).startswith("error: ") and complaint in stopped.value.code
    assert "\n" not in stopped.value.code
    assert not workdir.exists(), "a failed start leaves no folder"


# -- the page


class Tags(html.parser.HTMLParser):
    """Every tag that is opened is closed, in order; collects addresses."""

    EMPTY = {"meta"}

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.count = [], [], 0

    def handle_starttag(self, tag, attributes):
        self.count += 1
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.EMPTY:  # of an SVG
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"


@pytest.mark.tools
def test_the_page_is_whole_and_needs_nothing(compared):
    folder, _ = compared
    text = (folder / "compare" / "report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    tags.close()
    assert tags.open == [] and tags.count > 50
    assert 'name="viewport"' in text and text.count("<svg ") >= 5 and "src=" not in text and "@import" not in text
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)", text))
    links = {address for address in tags.addresses if not address.startswith(("#", "https://arxiv.org/abs/"))}
    assert {link for link in links if not (folder / "compare" / link).exists()} == set() and len(links) > 10
    for name in ("table.tex", "table.csv", "methods.tex", "references.bib"):
        assert (folder / "compare" / name).stat().st_size > 100
    assert (folder / "compare" / "figures" / "curves.pdf").read_bytes().startswith(b"%PDF")
    for said in ("within 1.0% of attention", "jax", "--mixers=attention,no_mixer=mlp mlp", "odd-numbered"):
        assert said in text
    markdown = (folder / "compare" / "report.md").read_text(encoding="utf-8")
    for picture in re.findall(r"\]\((.+\.png)\)", markdown):
        assert (folder / "compare" / picture).read_bytes().startswith(b"\x89PNG")
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("| ")} >= {3, 5}


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")
@pytest.mark.tools
def test_the_page_in_a_browser(compared, tmp_path):
    """It sorts when its heads are pressed, without a word on the console; on a screen as narrow as a phone's nothing overflows."""
    folder, _ = compared
    text = (folder / "compare" / "report.html").read_text(encoding="utf-8")
    probe = """<script>
      const heads = document.querySelectorAll("#results th button");
      const order = () => Array.from(document.querySelectorAll("#results tbody tr")).map(row => row.cells[0].textContent).join(",");
      heads[0].click(); const up = order(); heads[0].click(); const down = order();
      const said = {up, down, overflow: document.documentElement.scrollWidth > window.innerWidth, error: window.failed || null};
      document.title = JSON.stringify(said);
    </script></body>"""
    catch = "<script>window.onerror = message => { window.failed = message; };</script>\n<style>"
    page = tmp_path / "probe.html"
    page.write_text(text.replace("<style>", catch, 1).replace("</body>", probe), encoding="utf-8")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=400,800", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    said = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1]))
    assert said == {"up": "attention,no_mixer", "down": "no_mixer,attention", "overflow": False, "error": None}


@pytest.mark.tools
def test_documents_and_positions(compared):
    """Each target belongs to the document that its text is of, and to the position it is read at."""
    folder, _ = compared
    run = load_run(folder / "compare" / "attention" / "lr0.001" / "seed0")
    validation = run.validation()
    places = np.arange(4096)
    documents = scores.document_of(validation, places)
    ends = np.flatnonzero(np.asarray(validation.tokens[:4096]) == validation.end_of_text)
    assert documents[ends].tolist() == list(range(len(ends)))
    scored = scores.load(run.workdir, 4096)
    assert scored.tokens[: len(ends)].tolist() == np.diff(np.concatenate([[-1], ends])).tolist()
    assert scored.position_tokens.sum() == scored.tokens[1::2].sum()
