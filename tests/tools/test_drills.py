"""What drills call growth."""

import json

from tools.drills import __main__ as main
from tools.drills import long_runs
from tools.drills.trials import Count


def failures(files):
    """Of so many open files at each moment."""
    count = Count()
    long_runs._record_growth(count, [(step, 10**8, each) for step, each in enumerate(files)], "12 steps")
    return count.failures


def test_files_that_a_save_has_open_are_no_growth_and_a_leak_is():
    """The last moment is one of those in which the checkpoint before it is still being written."""
    assert failures([16, 19, 16, 16, 16, 19, 16, 16, 16, 16, 16, 19]) == []
    assert failures(range(16, 28)) == ["12 steps: open files grew from 20 to 24"]


def test_the_page_is_of_the_results_and_says_what_has_not_been_run():
    written = main.table(json.loads(main.OUT.read_text()))
    assert written == main.PAGE.read_text().partition(main.BEGIN)[2].partition(main.END)[0]
    assert "Not run yet, long part: `hostile_files`, `damaged_token_caches`, `damaged_runs`" in main.table({"long": {}})
