"""Many steps and many tokens: memory and open files stay what they were, and every token is one of the vocabulary."""

import json
import os

import train
from tools.drills.interruptions import reference
from tools.drills.trials import Count, Place, in_child

GROWTH = 48 << 20
"""Bytes that a process may grow by between a third of the way and the end: allocators keep some."""


def many_steps(place: Place) -> Count:
    """Tiny steps, with evaluations, rows and checkpoints among them."""
    steps = place.some(1200, 100_000)
    flags = place.flags(
        place.new("steps") / "run", train__steps=steps, train__eval_every_steps=steps // 24,
        train__checkpoint_every_steps=steps // 24, train__log_every_steps=max(10, steps // 2000),
    )  # fmt: skip

    def main() -> None:
        from seqmodels.training.checkpoint import Writer

        seen, save = [], Writer.save

        def measured(self, step, *arguments, **options):
            seen.append((step, *usage()))
            return save(self, step, *arguments, **options)

        Writer.save = measured
        train.main(flags)
        print(json.dumps(seen))

    ended = in_child(main, seconds=7200)
    count = Count()
    count.judge(ended.code == 0, f"exit status {ended.code}: {ended.err[-200:]}")
    if ended.code == 0:
        seen = json.loads(ended.out.splitlines()[-1])
        _judge_growth(count, seen, f"{steps:,} steps")
    return count


def many_tokens(place: Place) -> Count:
    """Tokens generated from one text, by several calls that go on from each other."""
    reference(place)
    tokens, calls = place.some(600, 100_000), 12

    def main() -> None:
        from seqmodels.run import load_run

        run, seen = load_run(place.folder / "reference"), []
        state = run.read("Once upon a time")
        for call in range(calls):
            text, state = run.continue_from(state, max_tokens=tokens // calls, seed=call)
            assert all(0 <= token < run.setup.vocab_size for token in state.tokens)
            seen.append((call, *usage()))
        print(json.dumps([seen, len(state.tokens)]))

    ended = in_child(main, seconds=7200)
    count = Count()
    count.judge(ended.code == 0, f"exit status {ended.code}: {ended.err[-200:]}")
    if ended.code == 0:
        seen, read = json.loads(ended.out.splitlines()[-1])
        _judge_growth(count, seen, f"{read:,} tokens")
    return count


def _judge_growth(count: Count, seen: list, what: str) -> None:
    (_, early, files_early), (_, late, files_late) = seen[len(seen) // 3], seen[-1]
    count.judge(late - early < GROWTH, f"{what}: memory grew from {early:,} to {late:,} bytes")
    count.judge(files_late <= files_early + 2, f"{what}: open files grew from {files_early} to {files_late}")


def usage() -> tuple[int, int]:
    """Bytes of memory that this process has, and the files it has open."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))
