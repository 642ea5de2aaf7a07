"""What is recorded of the process and the code that made a figure."""

import os
import subprocess

from seqmodels import circumstances


def test_a_commit_is_dirty_where_the_code_is_not_what_it_says(tmp_path):
    author = {f"GIT_{who}_{what}": "x@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

    def git(*words):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True, env=os.environ | author)

    (tmp_path / "seqmodels").mkdir()
    (tmp_path / "train.py").write_text("1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    clean = circumstances.commit(tmp_path)
    assert len(clean) == 12 and int(clean, 16) >= 0
    (tmp_path / "notes.txt").write_text("beside the code\n")
    assert circumstances.commit(tmp_path) == clean
    added = tmp_path / "seqmodels" / "mine.py"
    added.write_text("2\n")
    assert circumstances.commit(tmp_path) == f"{clean}-dirty"
    added.unlink()
    (tmp_path / "train.py").write_text("2\n")
    assert circumstances.commit(tmp_path) == f"{clean}-dirty"


def test_code_that_is_no_clone_has_no_commit(tmp_path):
    assert circumstances.commit(tmp_path) == ""


def test_circumstances_name_what_made_a_figure():
    about = circumstances.circumstances()
    assert {"command", "commit", "date", "versions", "machine"} == set(about)
    assert {"python", "jax", "flax"} <= set(about["versions"]) and about["machine"]["cores"] >= 1
