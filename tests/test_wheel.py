"""What pyproject.toml says of the package that pip makes; `make wheel` builds it and tries it."""

import re
import tomllib
from pathlib import Path

import pytest

from seqmodels import packages

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(file: str) -> list[str]:
    """The lines of a requirements file without their comments."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    return [line for line in lines if line]


def test_the_dependencies_are_those_of_requirements():
    assert PROJECT["project"]["dependencies"] == requirements("requirements.txt")
    assert PROJECT["project"]["optional-dependencies"]["dev"] == requirements("requirements-dev.txt")


def test_everything_a_command_needs_is_in_the_wheel():
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for file in packages.COMMANDS.values():
        assert (ROOT / file).is_file()
        imported = re.findall(r"^(?:from|import) (train|eval|configs|scripts|benchmarks)\b", (ROOT / file).read_text(), re.M)
        for name in (file.partition("/")[0], *imported):
            found = name if name in included else f"{name}.py"
            assert included[found] == f"{packages.PACKAGE.name}/installed/{found}"
    assert "configs" in included


@pytest.mark.parametrize(
    ("argv", "installed", "typed"),
    [
        (["train.py", "--workdir=a b"], False, "python train.py '--workdir=a b'"),
        (["/elsewhere/train.py"], True, "python /elsewhere/train.py"),
        (["ROOT/scripts/import_hf.py", "X"], True, "seqmodels import X"),
    ],
)
def test_a_command_is_named_as_it_was_typed(monkeypatch, argv, installed, typed):
    monkeypatch.setattr(packages, "IS_INSTALLED", installed)
    assert packages.shell_command([argv[0].replace("ROOT", str(packages.ROOT)), *argv[1:]]) == typed


def test_ci_runs_what_the_contributor_is_told_to():
    """CONTRIBUTING.md: lint, test, test-tools (the walk on a text of one's own among them) and wheel; and the site."""
    for file in (".github/workflows/test.yml", ".ci/run"):
        made = set(re.findall(r"[a-z-]+", " ".join(re.findall(r"\bmake ([a-z -]+)", (ROOT / file).read_text()))))
        assert made >= {"lint", "test", "test-tools", "wheel", "docs"}, file
