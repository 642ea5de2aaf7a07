"""scripts/benchmark.py measures tiny shapes without PyTorch, writes what it printed, and refuses what it lacks."""

import importlib.util
import json
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from benchmarks import kernel_cases, op_cases, op_report, timing
from benchmarks.suites import decode, gpu, hf, kernels, ops
from scripts import benchmark
from seqmodels.errors import UserError
from tools.pages import decoding

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "benchmark.py"
DECODING = SCRIPT.parent.parent / "benchmarks" / "results" / "decode_cpu.json"
pytestmark = pytest.mark.tools
HAS_PYTORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def run(*arguments: str, cwd=None):
    return subprocess.run([sys.executable, SCRIPT, *arguments], cwd=cwd, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--suite=trian"], "did you mean 'train'? known: ops, train, decode, hf, kernels, models"),
        ([], "--suite"),
        (["--suite=train", "--mixers=atention"], "attention"),
        (["--suite=train", "--shapes=128"], "WIDTHxREPEATS"),
        (["--suite=train", "--out=no/such/folder/x.json"], "no/such/folder"),
    ],
)
def test_mistakes_are_one_line(arguments, complaint):
    result = run(*arguments)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and complaint in line


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--suite=train", "--rounds=0"], "from 1 on"),
        (["--suite=train", "--ops=scalar_decay"], "--ops"),
        (["--suite=ops", "--ops=scalar_decai"], "did you mean 'scalar_decay'"),
        (["--suite=ops", "--implementations=chunked,assoziative"], "did you mean 'associative'"),
        (["--suite=ops", "--lengths=256,x"], "'x' is not a whole number"),
        (["--suite=ops", "--lengths="], "--lengths: '' is not a whole number"),
        (["--suite=ops", "--out=x.png"], "beside it"),
        (["--suite=hf", "--models=mamba3"], "did you mean 'mamba'"),
        (["--suite=decode", "--mixers=mambo"], "did you mean 'mamba'"),
        (["--suite=decode", "--out=x.png"], "beside it"),
        (["--suite=gpu"], "needs an NVIDIA GPU and found cpu; --rehearse runs anywhere"),
        (["--suite=kernels", "--ops=decay per heat"], "did you mean 'decay per head'"),
        (["--suite=models", "--sizes=16M"], "did you mean '15M'"),
    ],
)
def test_mistakes_in_flags(monkeypatch, arguments, complaint):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(UserError, match=complaint):
        options = benchmark.parse_flags()
        benchmark.SUITES[options.suite].run(options)


def test_help_lists_the_flags_of_a_suite():
    ops = run("--suite=ops", "--help").stdout
    assert "--growth_lengths" in ops and "--shapes" not in ops


def test_train_suite(tmp_path):
    small = ("--shapes=32x1", "--batch_size=2", "--seq_len=16", "--rounds=1")
    result = run("--suite=train", "--mixers=attention", "--out=results.json", *small, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["versions"]["jax"] in result.stdout
    assert results["dispatch"]["wall_ms"] < 20
    assert results["compile"]["attention"]["cpu_s"] > 0
    steps = {row["name"]: row for row in results["throughput"]}
    tokens_per_second = 1e3 * 2 * 16 / steps["attention"]["wall_ms"]
    assert steps["attention"]["tokens_per_second"] == pytest.approx(tokens_per_second)
    parts = {row["name"]: row["count"] for row in results["parts"]}
    # norms: of the embedding, before either layer, before the head
    assert parts == {"attention": 1, "mlp": 1, "norm": 4, "embedding": 1, "loss": 1, "optimizer": 1}
    assert results["loss_memory"]["chunked_mib"] < results["loss_memory"]["plain_mib"] / 8


def test_decode_suite(tmp_path, monkeypatch):
    """A recurrent state has one size and one compiled step per batch; a cache has one of each per context."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(decode, "HOST_WIDTH", 32)
    monkeypatch.setattr(decode, "HOST_TOKENS", 3)
    small = ["--contexts=16,32", "--batch_sizes=1,2", "--tokens=3", "--d_model=32", "--repeats=1", "--rounds=1"]
    # the state of attention at the larger context and batch is 2 rows x 35 tokens x 2 x 32 floats, and some marks
    which = ["--mixers=attention,attention_window,linear_attention", "--max_state_bytes=15000", "--out=results.json"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--suite=decode", *which, *small])
    options = benchmark.parse_flags()
    results = decode.run(options)
    rows = {(row["name"], row["batch_size"], row["context"]): row for row in results["rows"]}
    assert len(rows) == 3 * 2 * 2
    assert "seconds_per_step" not in rows["attention", 2, 32]
    for row in rows.values():
        if "seconds_per_step" in row:
            assert row["state_bytes"] == row["counted_state_bytes"]
            assert row["tokens_per_second"] == pytest.approx(row["batch_size"] / row["seconds_per_step"])
    states = {key: row["counted_state_bytes"] for key, row in rows.items()}
    assert states["attention", 1, 32] > states["attention", 1, 16]
    assert states["linear_attention", 1, 32] == states["linear_attention", 1, 16]
    compiled = [rows["linear_attention", 1, context]["compilations"] for context in (16, 32)]
    assert compiled == [1, 0]
    assert 0 < results["host"]["share"] <= 1
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")

    page = decoding.page(timing.circumstances_of_run() | results, "results.json")
    ratios = [
        rows[name, 1, 32]["seconds_per_step"] / rows[name, 1, 16]["seconds_per_step"]
        for name in ("attention", "attention_window")  # whose 256 tokens are not full yet
    ]
    each = f"{min(ratios):.2f} to {max(ratios):.2f} times as long"
    assert f"- where the state grows (`attention`, `attention_window`): {each}" in page
    assert "- where the state has one size (`linear_attention`): " in page
    assert "of 10 states that were made, 10 have just these bytes" in page and "2 states were too large" in page
    (line,) = [line for line in page.splitlines() if "contexts |" in line and "`linear_attention`" in line]
    assert line.endswith("| 1 for 2 contexts | 1 for 2 contexts |")


@pytest.mark.skipif(not DECODING.exists(), reason="benchmarks/results/decode_cpu.json has not been measured yet")
def test_the_page_on_decoding_is_current():
    """In every figure; the picture is made with it."""
    written = decoding.page(json.loads(DECODING.read_text()), DECODING.name)
    assert written == decoding.PAGE.read_text(encoding="utf-8"), "run python -m tools.pages.decoding"
    assert decoding.PAGE.with_suffix(".png").exists()


def test_ops_suite(tmp_path):
    """Attention step by step saves a ring per step for its gradient: more than the bound at the larger length."""
    small = ("--batch_size=1", "--heads=1", "--key_dim=4", "--value_dim=4", "--channels=8", "--rounds=2")
    which = ("--ops=linear_recurrence,softmax_attention", "--implementations=recurrent,parallel,chunked")
    sizes = ("--lengths=256,16", "--growth_lengths=16,64,256", "--memory_gib=0.0015")
    result = run("--suite=ops", "--out=results.json", *small, *which, *sizes, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "[4/6, " in result.stderr and " to go]" in result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["op"], row["implementation"], row["seq_len"]): row for row in results["ops"]}
    assert {name: list(forms) for name, forms in results["lacking"].items()} == {
        "linear_recurrence": ["parallel"],
        "softmax_attention": [],
    }
    assert len(rows) == 2 * (2 + 3)
    too_large = rows["softmax_attention", "recurrent", 256]["gradient"]
    assert not too_large["run"] and "wall_ms" not in too_large and too_large["temp_bytes"] > 0.0015 * 2**30
    assert "not run: would need more than 0.0015 GiB" in result.stdout
    ran = [row[which] for row in rows.values() for which in ("forward", "gradient") if row[which] is not too_large]
    assert all(each["wall_ms"] > 0 and each["compile_cpu_s"] > 0 and each["turns"] == 2 for each in ran)
    ours, theirs = (rows["linear_recurrence", form, 256]["forward"] for form in ("chunked", "recurrent"))
    assert theirs["of_chunked"]["wall_ms"] == pytest.approx(theirs["wall_ms"] / ours["wall_ms"])
    assert [fit["lengths"] for fit in results["growth"]] == [[16, 64, 256]] * 2
    assert {(fit["op"], fit["implementation"]) for fit in results["growth_of_forms"]} == {
        ("linear_recurrence", "recurrent"),
        ("linear_recurrence", "chunked"),
        ("softmax_attention", "parallel"),
        ("softmax_attention", "chunked"),
    }
    assert {goal["verdict"] for goal in results["goals"]} == {"not judged: not measured"}
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def gradient_row(op, implementation, *, wall_ms, temp_bytes=100, run=True):
    measured = {"run": run, "temp_bytes": temp_bytes} | ({"wall_ms": wall_ms, "cpu_ms": wall_ms} if run else {})
    return {"op": op, "implementation": implementation, "batch_size": 4, "seq_len": 1024, "gradient": measured}


def verdicts(rows, growth=(), **other_sizes) -> list[str]:
    sizes = op_cases.STATED_SIZES | other_sizes
    return [goal["verdict"] for goal in op_report.goal_verdicts(rows, list(growth), sizes)]


def test_goals_are_judged():
    chunked = gradient_row("selective_scan", "chunked", wall_ms=10.0)
    unmeasured = "not judged: not measured"
    rows = [chunked, gradient_row("selective_scan", "associative", wall_ms=30.0, temp_bytes=399)]
    assert verdicts(rows) == ["met", "missed", unmeasured]
    assert verdicts(rows, states=8) == [unmeasured] * 3
    assert verdicts(rows, heads=1) == ["met", "missed", unmeasured]  # it has no heads
    rows = [chunked, gradient_row("selective_scan", "associative", wall_ms=None, temp_bytes=400, run=False)]
    assert verdicts(rows) == ["not judged: above the bound on memory", "met", unmeasured]
    for exponent, lengths, verdict in (
        (1.05, [1024, 32768], "met"),
        (1.06, [1024, 2048, 32768], "missed"),
        (0.5, [1024, 16384], "not judged: measured over [1024, 16384]"),
    ):
        growth = [{"op": "selective_scan", "lengths": lengths, "exponent": exponent, "exponent_cpu": exponent}]
        assert verdicts([chunked], growth)[-1] == verdict


def test_growth_is_the_exponent_of_the_length():
    times = {steps: {"wall_ms": 3e-4 * steps**1.5, "cpu_ms": 2.0 * steps} for steps in (256, 1024, 4096)}
    (fit,) = ops.fit("no_decay", "chunked", 1, times)
    assert (fit["exponent"], fit["exponent_cpu"]) == pytest.approx((1.5, 1.0))
    assert ops.fit("no_decay", "chunked", 1, {256: times[256]}) == []


def test_a_gradient_is_of_every_input():
    """Of functions that return the final state beside the outputs; none of the inputs is forgotten or unused."""
    cases = op_cases
    sizes = cases.STATED_SIZES | {"key_dim": 4, "value_dim": 3, "channels": 5, "states": 2, "heads": 1}
    for name in ("channel_decay", "selective_scan"):
        programs = ops.Programs(cases.OPS[name], "recurrent", sizes, 2, 4)
        call, known = programs.compile("gradient")
        results, gradients = call()
        assert [x.ndim for x in results] == ([4, 4] if name == "channel_decay" else [3, 3])
        inputs = cases.OPS[name].inputs(np.random.default_rng(0), sizes, 2, 4)
        assert [x.shape for x in gradients] == [x.shape for x in inputs]
        assert all(bool((x != 0).any()) for x in jax.tree.leaves(gradients))
        assert known["output_bytes"] >= sum(x.nbytes for x in gradients)


def test_the_picture_has_a_line_per_form():
    rows = [gradient_row(op, form, wall_ms=1.0) for op in ("no_decay", "selective_scan") for form in ("chunked",)]
    rows.append(gradient_row("no_decay", "associative", wall_ms=None, run=False))
    growth = [{"op": "no_decay", "lengths": [1, 2], "wall_ms": [1.0, 2.0], "exponent": 1.0, "batch_size": 1}]
    figure = op_report.picture(rows, growth, op_cases.STATED_SIZES)
    labels = [[line.get_label() for line in axes.get_lines()] for axes in figure.axes]
    assert labels == [["chunked", "associative (too large from T 1024)", "chunked, B 1: T^1.00"], ["chunked"]]


def test_turns(monkeypatch):
    """The first call never counts, even of the slowest; who used up its time gets two turns all the same."""
    calls = {"fast": 0, "slow": 0}
    now = [0.0]
    clock = types.SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: 2 * now[0])
    monkeypatch.setattr(timing, "time", clock)

    def contender(name, first, later):
        def call():
            calls[name] += 1
            now[0] += first if calls[name] == 1 else later

        return call

    contenders = {"fast": contender("fast", 0, 0), "slow": contender("slow", 1.0, 0.125)}
    times = timing.take_turns(contenders, rounds=4, seconds=0.1)
    assert calls == {"fast": 5, "slow": 3}
    assert times["fast"] == {"wall_ms": 0.0, "median_wall_ms": 0.0, "cpu_ms": 0.0, "turns": 4}
    assert times["slow"] == {"wall_ms": 125.0, "median_wall_ms": 125.0, "cpu_ms": 250.0, "turns": 2}
    times = timing.take_turns({"slow": contenders["slow"]}, rounds=4, steady=True)
    assert calls["slow"] == 3 + 1 + 2 * 4 and times["slow"]["turns"] == 4


def suite(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    options = benchmark.parse_flags()
    return benchmark.SUITES[options.suite].run(options)


def test_kernels_suite(monkeypatch, tmp_path):
    """Rehearsed: both passes run in the kernel's interpreter and agree with the chunked form; what is there is not run again."""
    for module in (kernels, timing):
        monkeypatch.setattr(module, "circumstances", lambda: {"commit": "abc"})
    out = tmp_path / "kernels.json"
    arguments = "--suite=kernels", "--rehearse", "--ops=linear recurrence", f"--out={out}"
    alone = suite(monkeypatch, *arguments, "--contenders=pallas")["rows"]
    assert [list(row["contenders"]) for row in alone] == [["pallas"], ["pallas"]]
    results = suite(monkeypatch, *arguments)  # a row that lacks a contender is measured again
    assert [row["pass"] for row in results["rows"]] == ["forward", "gradient"]
    for row in results["rows"]:
        assert row["error"]["pallas to chunked"] < 1e-6 and "ms" not in row["contenders"]["pallas"]
    assert json.loads(out.read_text())["rows"] == results["rows"]
    monkeypatch.setattr(kernels, "measure", None)
    assert suite(monkeypatch, *arguments)["rows"] == results["rows"]


def test_gpu_suite(monkeypatch, tmp_path):
    """Rehearsed: right beside float64 numbers that a process of its own makes, equal from run to run, timed, and not run again."""
    for module in (gpu, timing):
        monkeypatch.setattr(module, "circumstances", lambda: {"commit": "abc"})
    before = jax.config.jax_enable_compilation_cache, jax.config.jax_compilation_cache_dir
    out = tmp_path / "gpu.json"
    arguments = (
        "--suite=gpu", "--rehearse", "--ops=linear recurrence", "--kinds=ceilings,check,time,profile,peer",
        f"--carry={tmp_path}", f"--out={out}",
    )  # fmt: skip
    try:
        results = suite(monkeypatch, *arguments)
        assert suite(monkeypatch, *arguments)["rows"] == results["rows"]
    finally:
        jax.config.update("jax_enable_compilation_cache", before[0])
        jax.config.update("jax_compilation_cache_dir", before[1])
    rows = {(row["kind"], row["part"]): row for row in results["rows"]}
    assert list(rows) == [
        ("ceilings", ""), ("check", "gradient"), ("time", "gradient"), ("profile", "gradient"), ("time", "forward"),
        ("peer", "forward"),
    ]  # fmt: skip
    checked = rows["check", "gradient"]
    assert set(checked["error"]) == {"output", "a", "b"} and max(checked["error"].values()) < 1e-5
    assert checked["runs"] == 2 and checked["different_runs"] == 0
    assert list(rows["time", "forward"]["contenders"]) == ["pallas"] and results["verdicts"] == []
    assert json.loads(out.read_text())["rows"] == results["rows"]


def test_gpu_rows_by_rank():
    """Right or wrong comes before any figure, the headline gradients before all others; every kind has rows."""
    rows = gpu.ranked()
    kinds = [row.kind for row in rows]
    assert {*kinds} == {*gpu.KINDS} and len({*rows}) == len(rows)
    first = rows[kinds.index("time")]
    assert (first.shape, first.part) == (gpu.HEADLINE, "gradient") and "check" not in kinds[kinds.index("time") :]
    assert {row.op for row in rows if row.op} == {*kernel_cases.CASES}


def test_gpu_verdicts():
    def row(kind, **found):
        return {"kind": kind, "name": "kda", "shape": "s", "part": "gradient"} | found

    rows = [
        row("check", error={"q": 0.5, "k": float("nan"), "v": 0.001}, runs=20, different_runs=3),
        row("time", contenders={"pallas": {"ms": 3.0}}),
        row("peer", ms=2.0),
    ]
    assert gpu.verdicts(rows) == [
        "WRONG: kda, q: 5.0e-01 off",
        "WRONG: kda, k: nan off",
        "RACE: kda: 3 of 20 runs differ from the first",
        "1.50 of the other library's time: kda, s, gradient",
    ]


def test_kernels_goals():
    def row(op, shape, ours, peer):
        contenders = {"pallas": {"ms": ours}, "peer": {"ms": peer}}
        return {"op": op, "shape": shape, "pass": "forward", "contenders": contenders, "bound_ms": 1.0}

    small, large = "B8 T1024 H8 D64", "B8 T8192 H32 D128"
    rows = [row("decay per head", small, 0.6, 1.0), row("softmax attention", small, 0.5, 0.5), row("kda", large, 1.9, 2.0)]
    said = {goal["goal"]: goal["verdict"] for goal in kernels.goal_verdicts(rows)}
    assert said == {
        f"at most 0.5 of the peer's time (decay per head, {small}, forward: 0.60)": "missed",
        f"no slower than cuDNN's attention (decay per head, {small}, forward: 1.20)": "missed",
        f"at most 1 of the peer's time (kda, {large}, forward: 0.95)": "met",
        f"at least half of the bound (kda, {large}, forward: 0.53)": "met",
    }


def test_kernels_bound():
    """What passes through memory: q, k, v and o once forward; with the backward pass inputs thrice, the output twice."""
    cases = kernel_cases
    shape = cases.Shape(2, 8, 3, 16)
    case = cases.CASES["no decay"]
    inputs = case.inputs(shape, jax.random.key(0))
    array = 2 * 2 * 8 * 3 * 16
    bytes_of = kernels.bytes_of
    assert bytes_of(inputs, inputs["v"], "forward") == 4 * array and bytes_of(inputs, inputs["v"], "gradient") == 11 * array
    assert (
        case.flops(shape, "forward") == 2 * 8 * 3 * 4 * 16 * 16 and case.flops(shape, "gradient") == 3 * 2 * 8 * 3 * 4 * 16 * 16
    )


def test_kernels_bound_by_exponentials():
    """A selective scan's 16 a channel and step take longer on Hopper than its bytes; with the backward pass three times as many."""
    case, shape = kernel_cases.CASES["selective scan (N 16)"], kernel_cases.SHAPES["B8 T8192 H32 D128"]
    exponentials = [case.exponentials(shape, part) for part in kernel_cases.PASSES]
    assert exponentials == [65_536 * 4096 * 16, 3 * 65_536 * 4096 * 16]
    row = {"flops": 0.0, "bytes": 2.15e9, "exponentials": exponentials[0]}
    found = kernels.bound(row, kernels.CHIPS["H100"])
    assert found["bound_by"] == "exponentials" and round(found["bound_ms"], 2) == 1.16
    assert kernels.bound(row | {"exponentials": 0.0}, kernels.CHIPS["H100"])["bound_by"] == "memory"
    measured = row | found | {"contenders": {"pallas": {"ms": 2 * found["bound_ms"]}}}
    assert kernels.of_bound(measured) == ["50% of the bound (exponentials)"]
    assert kernels.of_bound(measured | {"contenders": {"pallas": {"lacking": "no GPU"}}}) == []


def test_models_suite(monkeypatch, tmp_path):
    out = tmp_path / "models.json"
    results = suite(monkeypatch, "--suite=models", "--sizes=tiny", "--mixers=gla", "--contexts=4", f"--out={out}")
    [row] = results["rows"]
    assert row["mixer"] == "gla" and row["train_tokens_per_second"] > 0 and set(row["decode_seconds"]) == {"4"}
    assert json.loads(out.read_text()) == results


def test_hf_suite_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--suite=hf"])
    with pytest.raises(UserError, match="pip install torch transformers"):
        hf.run(benchmark.parse_flags())


@pytest.mark.skipif(not HAS_PYTORCH, reason="needs torch and transformers, which nothing else here does")
def test_hf_suite(tmp_path):
    """Each model is measured or left out; what is measured has the same parameters on both sides, by assertion."""
    small = ("--d_model=32", "--layers=1", "--batch_size=2", "--seq_len=16", "--rounds=1")
    result = run("--suite=hf", "--out=results.json", *small, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["name"] for row in results["hf"]} | set(results["left_out"]) == {"mamba", "mamba2"}
    for row in results["hf"]:
        assert row["best"].startswith("transformers, ")
        assert row["tokens_per_second"] == pytest.approx(1e3 * 2 * 16 / row["wall_ms"])
    for name in {row["name"] for row in results["hf"]}:
        assert any(row["side"] == "transformers, 1 thread" for row in results["hf"] if row["name"] == name)
