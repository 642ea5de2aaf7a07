"""The README's file tree names every file that is there, and none that is not.

Mixers are free to be missing: adding one touches its own file only.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_file_tree_is_complete():
    readme = (ROOT / "README.md").read_text()
    tree = readme[readme.index("## What lies where"):]
    listed = set(re.findall(r"(\w+\.py)", tree[: tree.index("\n```\n", 30)]))
    places = [ROOT, *(ROOT / folder for folder in ("configs", "scripts", "seqmodels"))]
    there = {path.name for path in ROOT.glob("*.py")}
    for place in places[1:]:
        there |= {path.name for path in place.rglob("*.py")} - {"__init__.py"}
    mixers = {path.name for path in (ROOT / "seqmodels" / "mixers").glob("*.py")}
    assert listed - there == set()
    assert there - listed - mixers == set()
