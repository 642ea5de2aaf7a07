"""The repository keeps its shape: imports point down, and importing does nothing."""

import ast
import functools
import graphlib
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TOPS = ("seqmodels", "configs", "benchmarks", "scripts", "tools", "tests", "train.py", "eval.py")

# From the ground up. A module stands where the longest name here that it begins with stands, and imports only from floors
# below, or what shares its name here. Names on one floor do not know each other. No file is exempt.
FLOORS = (
    (
        "seqmodels.errors",
        "seqmodels.escape",
        "seqmodels.failures",
        "seqmodels.shapes",
        "seqmodels.huge_pages",
        "seqmodels.ops.arguments",
        "seqmodels.packages",
        "seqmodels.suggest",
        "seqmodels.xla_cpu",
    ),
    (
        "seqmodels.circumstances",
        "seqmodels.device_memory",
        "seqmodels.ranges",
        "seqmodels.formats",
        "seqmodels.migrations",
        "seqmodels.processes",
        "seqmodels.screen",
        "seqmodels.ops.target",
        "seqmodels.ops.placement",
    ),
    (
        "seqmodels.fields",
        "seqmodels.registry",
        "seqmodels.ops.chunk",
        "seqmodels.ops.documents",
        "seqmodels.ops.sequence_parallel",
    ),
    ("seqmodels.ops.kernels.gpu.common", "seqmodels.ops.kernels.gpu.tiles", "seqmodels.ops.kernels.tpu.common"),
    ("seqmodels.ops.kernels.gpu.local_sums",),
    (
        "seqmodels.ops.kernels.gpu.chunk_scan",
        "seqmodels.ops.kernels.gpu.delta_rule_per_channel",
        "seqmodels.ops.kernels.tpu.decay_per_channel",
        "seqmodels.ops.kernels.tpu.decay_per_head",
    ),
    ("seqmodels.ops.kernels.tpu.delta_decays",),
    ("seqmodels.ops.kernels.gpu", "seqmodels.ops.kernels.tpu"),
    ("seqmodels.ops.kernels",),
    ("seqmodels.ops.dispatch",),
    ("seqmodels.ops.chunk_scan", "seqmodels.ops.long_conv"),
    ("seqmodels.ops.time_invariant",),
    ("seqmodels.ops.gated_linear_attention", "seqmodels.ops.linear_recurrence"),
    ("seqmodels.ops", "seqmodels.data"),
    ("seqmodels.layers", "seqmodels.object_store"),
    ("seqmodels.channel_layers",),
    ("seqmodels.mixers",),
    ("seqmodels.pattern", "seqmodels.references"),
    ("seqmodels.model",),
    ("seqmodels.config",),
    ("seqmodels.decoding", "seqmodels.command_line", "seqmodels.config_help"),
    ("seqmodels.evaluation",),
    ("seqmodels.training",),
    ("seqmodels.interop", "seqmodels.run", "seqmodels.run_list"),
    ("seqmodels.comparison",),
    ("seqmodels",),
    ("configs",),
    ("train", "eval"),
    ("benchmarks",),
    ("scripts",),
    ("tests.programs",),
    ("tests.configs", "tests.goldens"),
    ("tests.contract",),
    ("tests.odd_values",),
    ("tools",),
    ("tests",),
)
# What the modules whose names begin so import nowhere.
FOREIGN = {
    "seqmodels.ops": {"flax", "ml_collections", "optax"},  # an op is a pure function on arrays
    "seqmodels.data": {"flax", "jax", "optax"},  # data knows no model
}


def sources(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Every Python file by its dotted name."""
    paths = [path for top in TOPS for path in ([root / top] if top.endswith(".py") else (root / top).rglob("*.py"))]
    dotted = (".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for path in paths)
    return dict(sorted((name, path) for name, path in zip(dotted, paths) if path.exists()))


@functools.cache
def parsed(path: pathlib.Path, text: str) -> ast.Module:
    return ast.parse(text, filename=str(path))


def imports(path: pathlib.Path, known: dict[str, pathlib.Path]) -> set[str]:
    """What a file imports, wherever in the file it does so: modules of ``known`` whole, other packages by their first name."""
    names = set()
    for node in ast.walk(parsed(path, path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names |= {full if (full := f"{node.module}.{alias.name}") in known else node.module for alias in node.names}
    return {name if name in known else name.split(".")[0] for name in names}


def begins(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def floor(name: str) -> tuple[int, str] | None:
    """Where a module stands: its floor and its name there; None of other people's packages."""
    found = [(number, each) for number, names in enumerate(FLOORS) for each in names if begins(name, each)]
    return max(found, key=lambda place: len(place[1]), default=None)


def upward_imports(root: pathlib.Path) -> list[str]:
    """Every import that does not point down, and every file that stands nowhere."""
    known, wrong = sources(root), []
    for name, path in known.items():
        place = floor(name)
        if place is None:
            wrong.append(f"{name} needs a place in FLOORS")
            continue
        for other in sorted(imports(path, known)):
            there = floor(other)
            if there is not None and there[1] != place[1] and there[0] >= place[0]:
                wrong.append(f"{name} imports {other}")
            wrong += [f"{name} imports {other}" for prefix, names in FOREIGN.items() if begins(name, prefix) and other in names]
    return wrong


def test_imports_point_down():
    assert upward_imports(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "wrong"),
    [
        ("seqmodels/ops/chunk.py", "from seqmodels.ops import kernels", "seqmodels.ops.chunk imports seqmodels.ops.kernels"),
        ("seqmodels/model.py", "def f():\n    import seqmodels.training.loop", "seqmodels.model imports seqmodels.training.loop"),
        ("seqmodels/data/text/toy.py", "from flax import nnx", "seqmodels.data.text.toy imports flax"),
        ("seqmodels/run.py", "from scripts import compare", "seqmodels.run imports scripts.compare"),
    ],
)
def test_an_upward_import_is_found(tmp_path, file, line, wrong):
    for each in ("seqmodels/ops/kernels/__init__.py", "seqmodels/training/loop.py", "scripts/compare.py", file):
        path = tmp_path / each
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert upward_imports(tmp_path) == []
    (tmp_path / file).write_text(line)
    assert upward_imports(tmp_path) == [wrong]


def test_imports_go_round_in_no_circle():
    known = sources(ROOT)
    graph = {name: imports(path, known) & known.keys() - {name} for name, path in known.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_a_mixer_never_imports_a_mixer():
    known = sources(ROOT)
    mixing = {name for name in known if name.startswith("seqmodels.mixers.")}
    assert {name: sorted(found) for name in mixing if (found := imports(known[name], known) & mixing)} == {}


def test_no_file_is_named_for_nothing():
    nameless = {"utils", "util", "helpers", "helper", "misc"}
    assert not [name for name in sources(ROOT) if nameless & set(name.split("."))]


def test_forbidden_idioms():
    """No default hidden in `.get(key, default)`; of NNX only the containers, JAX does the transforming."""
    forbidden = {"jit", "grad", "value_and_grad", "scan", "vmap", "remat", "Optimizer", "Dropout", "Cache"}
    for name, path in sources(ROOT).items():
        if begins(name, "tests"):
            continue
        for node in ast.walk(parsed(path, path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
                reads_environment = ast.unparse(node.func.value) == "os.environ"
                assert reads_environment or len(node.args) + len(node.keywords) < 2, f"{path}:{node.lineno}: .get with a default"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nnx":
                assert node.attr not in forbidden, f"{path}:{node.lineno}: nnx.{node.attr}"


def test_nothing_depends_on_where_it_was_written():
    elsewhere = "/work" + "/"
    files = [*sources(ROOT).values(), *(ROOT / name for name in ("Makefile", ".ci/run", "pyproject.toml"))]
    assert not [str(path) for path in files if elsewhere in path.read_text()]


@pytest.mark.tools
def test_importing_does_nothing():
    """Importing every module touches no device (there is none to touch here), warns of nothing, prints nothing."""
    without = (
        "tests",
        "scripts",
        "benchmarks.peers",
        "tools.pages.site",
    )  # what may be missing: pytest, a command line, PyTorch, mkdocs
    modules = [name for name in sources(ROOT) if not any(begins(name, each) for each in without)]
    modules.remove("tools.pages.equivalence")  # of the tests' own laws
    program = "import sys, importlib\nfor name in sys.argv[1:]: importlib.import_module(name)"
    result = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:seqmodels", "-c", program, *modules],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "no_such_platform"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
