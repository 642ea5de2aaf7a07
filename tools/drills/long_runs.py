"""Many steps and many tokens: memory, open files and programs stay what they were, and every token is one of the vocabulary."""

import json
import os
import statistics
import time

import train
from tools.drills.interruptions import reference
from tools.drills.trials import Count, Place, in_child

GROWTH = 48 << 20
"""Bytes that a process may grow by between a third of the way and the end: allocators keep some."""
HOST_SECONDS = 2e-3
"""Of CPU time that the thread of the loop may take for a step."""
LAYERS = 24


def many_steps(place: Place) -> Count:
    """Tiny steps, with evaluations, rows and checkpoints among them: memory, open files, compiled programs."""
    steps = place.some(1200, 100_000)
    flags = place.flags(
        place.new("steps") / "run", train__steps=steps, train__eval_every_steps=steps // 24,
        train__checkpoint_every_steps=steps // 24, train__log_every_steps=max(10, steps // 2000),
    )  # fmt: skip

    def main() -> None:
        from seqmodels.training.checkpoint import Writer

        seen, compiled, save = [], compilations(), Writer.save

        def measured(self, step, *arguments, **options):
            seen.append((step, *usage(), len(compiled), len(list((place.folder / "programs").glob("*")))))
            return save(self, step, *arguments, **options)

        Writer.save = measured
        train.main(flags)
        print(json.dumps(seen))

    ended = in_child(main, seconds=7200)
    count = Count()
    count.record(ended.code == 0, f"exit status {ended.code}: {ended.err[-200:]}")
    if ended.code == 0:
        seen = json.loads(ended.out.splitlines()[-1])
        _record_growth(count, [each[:3] for each in seen], f"{steps:,} steps")
        (*_, compiled_early, kept_early), (*_, compiled_late, kept_late) = seen[len(seen) // 3], seen[-1]
        count.record(compiled_late == compiled_early, f"{compiled_late - compiled_early} programs were compiled after a third")
        count.record(kept_late == kept_early, f"the cache of programs grew from {kept_early} to {kept_late} files")
    return count


def host_time(place: Place) -> Count:
    """CPU time of the loop's thread for a step of 24 layers: the median below 2 ms, late ones no dearer than early ones."""
    steps = place.some(300, 10_000)
    flags = place.flags(
        place.new("host") / "run", train__steps=steps, train__eval_every_steps=steps, train__checkpoint_every_steps=steps,
        train__log_every_steps=10, model__repeats=LAYERS // 2, model__pattern="linear_attention mlp",
    )  # fmt: skip

    def main() -> None:
        from seqmodels.training import loop

        seconds, one_step = [], loop._Run.train_one_step

        def measured(self):
            begun = time.thread_time()
            one_step(self)
            seconds.append(time.thread_time() - begun)

        loop._Run.train_one_step = measured
        train.main(flags)
        third = len(seconds) // 3
        print(
            json.dumps([statistics.median(part) for part in (seconds[third:], seconds[third : 2 * third], seconds[2 * third :])])
        )

    ended = in_child(main, seconds=7200)
    count = Count()
    count.record(ended.code == 0, f"exit status {ended.code}: {ended.err[-200:]}")
    if ended.code == 0:
        median, early, late = json.loads(ended.out.splitlines()[-1])
        count.record(median < HOST_SECONDS, f"{steps:,} steps of {LAYERS} layers: {1e3 * median:.2f} ms of CPU time for a step")
        count.record(late < 1.5 * early, f"a step took {1e3 * early:.2f} ms of CPU time, and {1e3 * late:.2f} ms at the end")
        print(f"{'':22} {1e3 * median:.2f} ms of the loop's thread for a step of {LAYERS} layers")
    return count


def compilations() -> list[str]:
    """A list that grows by one for each program that XLA compiles, or loads, from now on."""
    import jax

    found: list[str] = []

    def note(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    return found


def many_tokens(place: Place) -> Count:
    """Tokens generated from one text, by calls that go on from each other where a text has ended: memory and open files."""
    reference(place)
    tokens, parts = place.some(600, 100_000), 12

    def main() -> None:
        from seqmodels.run import load_run

        run, seen = load_run(place.folder / "reference"), []
        state = run.read("Once upon a time")
        for part in range(parts):
            while len(state.tokens) < tokens * (part + 1) // parts:
                _, state = run.continue_from(state, max_tokens=tokens // parts, seed=len(state.tokens))
            assert all(0 <= token < run.trainer.vocab_size for token in state.tokens)
            seen.append((part, *usage()))
        print(json.dumps([seen, len(state.tokens)]))

    ended = in_child(main, seconds=7200)
    count = Count()
    count.record(ended.code == 0, f"exit status {ended.code}: {ended.err[-200:]}")
    if ended.code == 0:
        seen, read = json.loads(ended.out.splitlines()[-1])
        count.record(read >= tokens, f"{read:,} tokens of {tokens:,}")
        _record_growth(count, seen, f"{read:,} tokens")
    return count


def _record_growth(count: Count, seen: list, what: str) -> None:
    third = len(seen) // 3
    (_, early, _), (_, late, _) = seen[third], seen[-1]
    # The fewest of several moments: a checkpoint that is still being written has files open.
    files_early, files_late = (min(files for _, _, files in part) for part in (seen[third : 2 * third], seen[2 * third :]))
    count.record(late - early < GROWTH, f"{what}: memory grew from {early:,} to {late:,} bytes")
    count.record(files_late <= files_early + 2, f"{what}: open files grew from {files_early} to {files_late}")


def usage() -> tuple[int, int]:
    """Bytes of memory that this process has, and the files it has open."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))
