"""Run folders at a glance: figures of runs nobody planned together, and a line for each that is damaged."""

import csv
import errno
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from scripts import runs as command
from seqmodels import config as config_lib
from seqmodels import model, run_list
from seqmodels.errors import UserError
from seqmodels.training import history, run_folder
from tests.configs import tiny


def row(step, split, loss, **more):
    return {"step": step, "split": split, "loss": loss, "tokens_per_second": 100.0 * step, "tokens": step, "seconds": step} | more


@pytest.fixture
def folder(tmp_path):
    """Three runs that have nothing to do with each other, and two damaged folders."""

    def make(name, rows, **overrides):
        path = tmp_path / name
        path.mkdir(parents=True)
        config_lib.save(tiny(**{"model.vocab_size": 257, "data.tokenizer": "bytes"} | overrides), path / "config.json")
        (path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows) + '{"step": 3, "spl')
        return path

    done = make("a/done", [row(5, "train", 3.0), row(10, "train", 2.0), row(10, "validation", 2.5, bits_per_byte=1.25)])
    (done / history.FILE_NAME).write_text(json.dumps({"model": {"parameters": 1234, "state_bytes": 56}}) + '\n{"model": {"par')
    make("b_stopped", [row(4, "train", 3.5)], **{"model.pattern": "gla mlp", "model.repeats": 1})
    make("c_new", [])
    (tmp_path / "d_damaged").mkdir()
    (tmp_path / "d_damaged" / "config.json").write_text('{"seed": ')
    make("e_noise", []).joinpath("metrics.jsonl").write_bytes(b"\x00\xff noise\n")
    return tmp_path


def test_every_run_is_listed(folder):
    listed = {run.name: run for run in run_list.read(run_list.find([folder]))}
    assert list(listed) == ["a/done", "b_stopped", "c_new", "d_damaged", "e_noise"]
    done = listed["a/done"]
    assert (done.parameters, done.state_bytes, done.step, done.steps, done.status) == (1234, 56, 10, 10, "finished")
    assert (done.loss, done.bits_per_byte, done.tokens_per_second) == (2.5, 1.25, 1000.0)
    stopped = listed["b_stopped"]
    config = tiny(**{"model.vocab_size": 257, "model.pattern": "gla mlp", "model.repeats": 1}).model
    assert stopped.parameters == sum(leaf.size for leaf in jax.tree.leaves(model.param_shapes(config, 257)))
    assert stopped.status == "stopped" and stopped.loss is None and stopped.state_bytes > 0
    assert listed["c_new"].status == "new"
    assert listed["d_damaged"].status == listed["e_noise"].status == "damaged"
    assert "config.json" in listed["d_damaged"].problem and "no whole row" in listed["e_noise"].problem


def test_a_run_that_trains_is_seen(folder):
    path = folder / "b_stopped" / run_folder.LOCK_NAME
    hold = (
        f"import fcntl, sys; f = open({str(path)!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert run_list.read([folder / "b_stopped"])[0].status == "training"
        other.stdin.close()
    assert run_list.read([folder / "b_stopped"])[0].status == "stopped"


def test_tables(folder):
    runs = run_list.read(run_list.find([folder]))
    table = run_list.text(runs, "table").splitlines()
    assert len({len(line) for line in table[:4]}) == 1 and table[1].replace("-", "").replace(":", "").strip("| ") == ""
    assert "| a/done " in table[2] and " 1,234 |" in table[2] and "accuracy" not in table[0]
    rows = list(csv.DictReader(io.StringIO(run_list.text(runs, "csv"))))
    assert [each["name"] for each in rows] == [run.name for run in runs] and float(rows[0]["loss"]) == 2.5
    latex = run_list.text(runs, "latex").splitlines()
    assert latex[0].startswith(r"\begin{tabular}{ll") and latex[-1] == r"\end{tabular}"
    assert all(line.endswith(r"\\") for line in latex[4:-2]) and r"d\_damaged" in "\n".join(latex)


def test_a_narrow_terminal_has_lines_that_fit(folder):
    runs = run_list.read(run_list.find([folder]))
    assert run_list.text(runs, "table", 1000) == run_list.text(runs, "table") and run_list.text(runs, "csv", 40).count("\n") == 5
    table, problems = run_list.text(runs, "table", 60).rsplit("\n\n", 1)
    assert max(map(len, table.splitlines())) <= 60 and "|" not in table and "1,234" in table and table.count("a/done") > 1
    assert [line.partition(": ")[0] for line in problems.splitlines()] == ["d_damaged", "e_noise"]


def test_records_of_a_run_are_shown_without_its_tokenizer(folder):
    (folder / "b_stopped" / "config.json").unlink()
    values = tiny(**{"model.pattern": "gla mlp", "model.repeats": 3, "data.tokenizer": "bpe"})
    config_lib.save(values, folder / "b_stopped" / "config.json")
    [run] = run_list.read([folder / "b_stopped"])
    assert (run.status, run.step, run.repeats, run.parameters) == ("stopped", 4, 3, None)
    assert "the sizes are not known: no tokenizer" in run.problem and "damaged" not in run_list.text([run], "table")
    outcome = {"status": "finished", "summary": {"parameters": 1234, "state_bytes": 56}}
    (folder / "b_stopped" / run_folder.OUTCOME_NAME).write_text(json.dumps(outcome))
    [run] = run_list.read([folder / "b_stopped"])
    assert (run.parameters, run.state_bytes, run.problem) == (1234, 56, None)


def test_the_command_sorts_and_draws(folder, monkeypatch, capsys):
    picture = folder / "curves.svg"
    monkeypatch.setattr("sys.argv", ["runs.py", str(folder), "--sort=loss", f"--plot={picture}"])
    command.main()
    printed = capsys.readouterr()
    assert [line.split("|")[1].strip() for line in printed.out.splitlines()[2:4]] == ["a/done", r"b_stopped"]
    assert picture.read_text().lstrip().startswith("<?xml") and "2 runs" in printed.err
    for flags, wrong in ((["--plot=x.jpeg"], "must end in .png"), (["--format=html"], "html")):
        monkeypatch.setattr("sys.argv", ["runs.py", str(folder), *flags])
        with pytest.raises(UserError, match=wrong):
            command.main()


@pytest.mark.parametrize(
    "odd",
    [
        row(1, "train", "low"), row(1, "validation", [1.0]),
        row(10**30, "train", 1.0), row(1, "train", 1.0) | {"step": "1"}, row(1, "test", 1.0),
        row(1, "train", 1.0, tokens_per_second="fast"), row(1, "validation", 1.0, bits_per_byte={"a": "b"}),
        {"step": 1, "split": "train", "loss": 1.0}, row(1, "train", float("nan")), row(True, "train", 1.0), row(1, ["train"], 1.0),
    ],
)  # fmt: skip
def test_a_row_that_no_run_writes_is_damage(folder, odd):
    path = folder / "b_stopped" / "metrics.jsonl"
    before = path.read_text().splitlines()[0]
    path.write_text(f"{json.dumps(odd)}\n{before}\n")
    [run] = run_list.read([folder / "b_stopped"])
    assert [each["step"] for each in run.rows] == [4] and run.problem is None
    path.write_text(f"{json.dumps(odd)}\n")
    runs = run_list.read([folder / "b_stopped"])
    assert "no whole row" in runs[0].problem
    assert all("damaged" in run_list.text(runs, form) for form in run_list.FORMATS)


def test_rows_that_cannot_be_read_are_a_line_of_the_table(folder):
    for name, make in (("b_stopped", os.mkfifo), ("c_new", os.mkdir)):
        (folder / name / "metrics.jsonl").unlink()
        make(folder / name / "metrics.jsonl")
    os.mkfifo(folder / "e_noise" / history.FILE_NAME)  # and nobody waits for a writer
    problems = {run.name: run.problem for run in run_list.read(run_list.find([folder]))}
    assert "is not a regular file" in problems["b_stopped"] and "is not a regular file" in problems["c_new"]
    assert problems["a/done"] is None


@pytest.mark.parametrize("seconds, said", [(2.0**38, ""), (-(2.0**38), ""), (2.0**80, ""), (0.0, "1970-01-01 00:00")])
def test_a_clock_out_of_all_years_leaves_a_cell_empty(seconds, said):
    assert run_list._when(SimpleNamespace(stat=lambda: SimpleNamespace(st_mtime=seconds))) == said


def test_a_folder_that_cannot_be_read_now_is_a_line_of_the_table(folder, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(run_folder, "read_config", refuse)
    [done] = run_list.read([folder / "a/done"])
    assert "cannot be read now: permission denied" in done.problem


def test_a_closed_folder_is_a_line_of_the_table(folder):
    path = folder / "a"
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        for place in [folder, *folder.parents]:
            if str(place).startswith("/tmp/"):
                place.chmod(0o755)
        os.seteuid(65534)
    try:
        found = run_list.find([folder])
        problems = {run.name: run.problem for run in run_list.read(found)}
    finally:
        os.seteuid(user)
        path.chmod(0o755)
    assert "cannot be read now: permission denied" in problems["a"] and problems["b_stopped"] is None


def test_no_cell_is_a_formula(tmp_path):
    names = ["=1+1", "+1", "-1", "@x", "a,=b", 'q"q']
    table = list(csv.reader(io.StringIO(run_list.text([run_list.ListedRun(name) for name in names], "csv"))))
    assert [cells[0] for cells in table[1:]] == ["'=1+1", "'+1", "'-1", "'@x", "a,=b", 'q"q']


def test_a_folder_without_a_run_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        run_list.find([tmp_path])
    with pytest.raises(UserError, match="there is no folder"):
        run_list.find([tmp_path / "nothing"])
