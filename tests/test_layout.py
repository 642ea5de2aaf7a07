"""The house keeps its shape: imports point down, importing does nothing, and a mixer is a file that looks like one."""

import ast
import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqmodels import mixers

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = sorted(
    path.relative_to(ROOT)
    for top in ("seqmodels", "configs", "scripts", "tests", "train.py", "eval.py")
    for path in ([ROOT / top] if top.endswith(".py") else (ROOT / top).rglob("*.py"))
)
PACKAGE = [path for path in SOURCES if path.parts[0] == "seqmodels"]
SHIPPED = [path for path in SOURCES if path.parts[0] != "tests"]

# Part of seqmodels -> the other parts it may import. A new part needs a line here, and so a thought.
MAY_KNOW = {
    "shapes": set(),
    "errors": set(),
    "escape": set(),
    "ranges": {"errors"},
    "ops": set(),
    "layers": {"errors", "ranges", "ops"},
    "mixers": {"errors", "ranges", "layers", "ops"},
    "model": {"errors", "ranges", "layers", "mixers"},
    "data": {"errors", "escape", "ranges"},
    "generate": {"errors", "layers", "model"},
    "evaluation": {"errors", "layers", "model", "generate", "data"},
    "training": {
        "errors", "escape", "ranges", "layers", "mixers", "model", "generate", "data", "evaluation", "config", "ops", "xla_cpu"
    },
    "config": {"errors", "ranges", "mixers", "model", "data", "evaluation", "training"},
    "command_line": {"errors", "escape", "ranges", "xla_cpu"},
    "huge_pages": set(),
    "xla_cpu": set(),
    "interop": {"errors", "layers", "mixers", "model", "data", "training", "config"},
    "read_state": {"errors", "model", "generate", "data"},
    "run": {
        "errors", "escape", "layers", "mixers", "model", "generate", "read_state", "data", "evaluation", "training", "config",
        "xla_cpu",
    },
    "comparison": {"escape", "errors", "ranges", "layers", "mixers", "model", "data", "evaluation", "training", "config", "run"},
}


def parse(path: pathlib.Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), filename=str(path))


def imported(path: pathlib.Path) -> set[str]:
    """Dotted names a file imports, wherever in the file it does so; `from a import b` counts as a.b."""
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part(path: pathlib.Path) -> str:
    return path.parts[1].removesuffix(".py")


def parts_imported(path: pathlib.Path) -> set[str]:
    parts = {name.split(".")[1] for name in imported(path) if name.startswith("seqmodels.")}
    return parts | {
        "run" for name in imported(path) if name == "seqmodels"
    }  # the package itself imports the top


@pytest.mark.parametrize("path", [path for path in PACKAGE if part(path) != "__init__"], ids=str)
def test_imports_point_down(path):
    assert part(path) in MAY_KNOW, "give this part of seqmodels its place in MAY_KNOW"
    assert parts_imported(path) - {part(path)} <= MAY_KNOW[part(path)]
    tops = {name.split(".")[0] for name in imported(path)}
    assert not tops & {"configs", "scripts", "tests", "train", "eval"}
    if part(path) == "ops":
        assert not tops & {"flax", "ml_collections", "optax"}, "an op is a pure function on arrays"
    if part(path) == "data":
        assert not tops & {"flax", "optax"}, "data knows no model"


@pytest.mark.parametrize(
    "path", [path for path in PACKAGE if part(path) == "mixers"], ids=lambda path: path.stem
)
def test_a_mixer_never_imports_a_mixer(path):
    others = {f"seqmodels.mixers.{name}" for name in mixers.names()}
    assert not {
        name for name in imported(path) for other in others if name == other or name.startswith(f"{other}.")
    }


def test_no_file_is_named_for_nothing():
    nameless = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert not [str(path) for path in SOURCES if nameless & {each.removesuffix(".py") for each in path.parts}]


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_forbidden_idioms(path):
    """No default hidden in `.get(key, default)`; of NNX only the containers, JAX does the transforming."""
    for node in ast.walk(parse(path)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            reads_environment = ast.unparse(node.func.value) == "os.environ"
            assert reads_environment or len(node.args) + len(node.keywords) < 2, (
                f"{where}: .get with a default"
            )
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "nnx":
            forbidden = {
                "jit",
                "grad",
                "value_and_grad",
                "scan",
                "vmap",
                "remat",
                "Optimizer",
                "Dropout",
                "Cache",
            }
            assert node.attr not in forbidden, f"{where}: nnx.{node.attr}"


def test_nothing_depends_on_where_it_was_written():
    elsewhere = "/work" + "/"
    files = [*SOURCES, pathlib.Path("Makefile"), pathlib.Path(".ci/run"), pathlib.Path("pyproject.toml")]
    assert not [str(path) for path in files if elsewhere in (ROOT / path).read_text()]


def test_importing_does_nothing():
    """Importing every module touches no device (there is none to touch here), warns of nothing, prints nothing."""
    modules = [
        ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for path in SHIPPED
        if path.parts[0] != "scripts"
    ]
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


# -- mixers -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=mixers.names())
def mixer(request):
    return mixers.load(request.param)


def test_a_mixer_says_what_it_is(mixer):
    said = mixer.__doc__.lower()
    missing = [
        word for word in ("arxiv", "state", "numerical trap", "deviations from the paper") if word not in said
    ]
    assert not missing, f"the header of {mixer.__name__} says nothing of: {missing}"


def test_config_is_frozen_complete_and_commented(mixer):
    config = mixer.Config()  # every field has a default
    fields = {field.name: field for field in dataclasses.fields(config)}
    assert fields["implementation"].default is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.implementation = "recurrent"
    assert hash(config) == hash(mixer.Config()), "it sits in the graphdef: tuples, no dicts or lists"
    source = pathlib.Path(mixer.__file__).read_text()
    (definition,) = [
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Config"
    ]
    lines = source.splitlines()
    for node in definition.body:
        if isinstance(node, ast.AnnAssign):
            said = "#" in lines[node.end_lineno - 1] or lines[node.lineno - 2].lstrip().startswith("#")
            assert said, f"{node.target.id} has no comment"


@pytest.mark.parametrize("d_model", [32, 96])
def test_default_config_works_at_any_multiple_of_32(mixer, d_model):
    built = mixer.Mixer(mixer.Config(), d_model, rngs=nnx.Rngs(params=0))
    x = np.random.default_rng(0).standard_normal((2, 5, d_model)).astype(np.float32)
    y, _ = jax.jit(lambda x: built(x))(x)
    assert y.shape == x.shape and bool(jnp.isfinite(y).all()) and float(jnp.abs(y).max()) > 0.0
    assert built.output_kernel[...].shape[1] == d_model, "the model scales this projection with depth"


def test_initialisation_follows_the_key(mixer):
    first, again, other = (
        nnx.to_pure_dict(nnx.state(mixer.Mixer(mixer.Config(), 32, rngs=nnx.Rngs(params=seed)), nnx.Param))
        for seed in (0, 0, 1)
    )
    same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again))]
    changed = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other))]
    assert all(same) and any(changed)
