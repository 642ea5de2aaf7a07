"""The README is short, and its map names every folder of the library and of its tools, and none that is not there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_it_is_read_in_two_minutes():
    """What needs more belongs in docs/."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_its_picture_is_legible_on_a_telephone():
    """A page 390 pixels wide shows it at 358: of one panel (640 pixels of a PNG, 9 points) the text is then 11 pixels high."""
    [picture] = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    data = (ROOT / picture).read_bytes()
    assert data.startswith(b"\x89PNG") and int.from_bytes(data[16:20]) <= 640


def test_the_map_is_complete():
    readme = (ROOT / "README.md").read_text()
    tree = readme[readme.index("## What lies where") :]
    tree = tree[: tree.index("\n```\n", 30)]
    listed, path = set(), []
    for indent, name in re.findall(r"^( *)(\w+)/ ", tree, flags=re.MULTILINE):
        path = [*path[: len(indent) // 2], name]
        listed.add("/".join(path))
    tops = ("configs", "scripts", "seqmodels", "benchmarks", "tools")
    there = {str(file.parent.relative_to(ROOT)) for top in tops for file in (ROOT / top).rglob("*.py")}
    assert listed == there | {"benchmarks/results", "checkpoints", "docs", "tests"}
