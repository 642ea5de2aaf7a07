"""Let a run write: text streams to the terminal as the model makes it.

    python scripts/generate.py --workdir=runs/gla --prompt="Once upon a time" [--max_tokens=200] [--temperature=0.8]
    python scripts/generate.py --workdir=runs/gla --prompts_file=prompts.yaml --output=stories.jsonl
    python scripts/generate.py --workdir=runs/gla --prompt="Once upon a time" --save_state=begun.npz
    python scripts/generate.py --workdir=runs/gla --from_state=begun.npz --prompt=" The end was" --seed=1

The first form prints the prompt and its continuation, and the speed on stderr. The second continues a YAML list of
prompts, many at a time, into one JSON object per line (prompt, continuation), written as they finish. The third keeps what the
model knows at the end; the fourth goes on from there, as often and with as many seeds as you like.
--attention_plot=FILE.png draws what each token looked at.
"""

import argparse
import contextlib
import itertools
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone, uninstalled, in any directory

if __name__ == "__main__":  # ahead of imports that fail without the packages
    from seqmodels.packages import check_packages

    check_packages()

from seqmodels import command_line, model, screen, suggest
from seqmodels.data import atomic, well_formed
from seqmodels.errors import UserError
from seqmodels.escape import escape, say
from seqmodels.evaluation import plots
from seqmodels.formats import yaml_texts
from seqmodels.ranges import Count, CountOrZero, NonNegative, Probability, Seed
from seqmodels.run import Run, load_run

SAMPLING = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed")


def main() -> None:
    options = parse_flags()
    prompts = None if options.prompts_file is None else read_prompts(options.prompts_file)

    command_line.use_compilation_cache(options.compilation_cache_dir)
    with screen.phase("reading the run"):
        run = load_run(options.workdir, options.step, devices=options.devices)
    if options.attention_plot is not None:
        model.check_attention(run.config.model.pattern)  # ahead of the text
    sampling = {name: getattr(options, name) for name in SAMPLING}
    if prompts is None and options.output is None:
        stream(run, options.prompt or "", sampling, options)
    else:
        write_batches(run, [options.prompt] if prompts is None else prompts, sampling, options.batch_size, options.output)


def parse_flags() -> argparse.Namespace:
    parser = command_line.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_workdir("the run folder: a path, gs://BUCKET/PATH or s3://BUCKET/PATH")
    parser.add_value("--step", CountOrZero, help="which checkpoint; default the newest")
    parser.add_argument("--prompt", help="the text to continue")
    parser.add_argument("--prompts_file", type=Path, help="a YAML list of texts to continue")
    parser.add_argument("--output", type=command_line.output_stream, help="write continuations here, one JSON object per line")
    parser.add_value("--batch_size", Count, default=32, help="at most so many prompts at a time (default 32)")
    parser.add_value("--devices", Count, default=1, help="so many devices share the prompts of --prompts_file (default 1)")
    parser.add_value("--max_tokens", CountOrZero, default=200, help="at most so many new tokens (default 200)")
    parser.add_value("--temperature", NonNegative, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_value("--top_k", Count, help="sample among the k likeliest tokens only")
    parser.add_value("--top_p", Probability, help="sample among the likeliest tokens that make up this probability")
    parser.add_value("--min_p", Probability, help="sample among tokens at least so probable, the likeliest being 1")
    parser.add_value("--seed", Seed, default=0, help="another seed, another story (default 0)")
    parser.add_argument("--save_state", type=command_line.output_file, help="keep what the model knows at the end (.npz)")
    parser.add_argument("--from_state", type=Path, help="go on from such a file; --prompt is then read after it")
    parser.add_argument(
        "--attention_plot", type=command_line.output_file, help="draw what each token looked at: .png, .svg or .pdf"
    )
    command_line.add_compilation_cache_flag(parser)
    options = parser.parse_args()
    if options.prompt is not None and options.prompts_file is not None:
        raise UserError("give either --prompt or --prompts_file, not both")
    if options.prompt is None and options.prompts_file is None and options.from_state is None:
        raise UserError('give either --prompt="Once upon a time" or --prompts_file=FILE.yaml')
    for name in ("save_state", "from_state", "attention_plot"):
        if getattr(options, name) is not None and (options.prompts_file is not None or options.output is not None):
            raise UserError(f"--{name} is for one text that is printed, not for --prompts_file or --output")
    if options.from_state is not None and not options.from_state.is_file():
        raise UserError(f"--from_state: {suggest.no_such('file', options.from_state)}")
    outputs = {name: getattr(options, name) for name in ("output", "save_state", "attention_plot")}
    command_line.check_distinct(outputs, {"prompts_file": options.prompts_file}, options.workdir)
    plots.check_suffix("attention_plot", options.attention_plot)
    if options.prompt is not None:
        options.prompt = well_formed(options.prompt)  # a byte that is not UTF-8 arrives as half a character
    return options


def read_prompts(path: Path) -> list[str]:
    try:
        return [well_formed(prompt) for prompt in yaml_texts.read(path)]
    except FileNotFoundError:
        raise UserError(suggest.no_such("file", path)) from None


def stream(run: Run, prompt: str, sampling: dict, options: argparse.Namespace) -> None:
    before = None if options.from_state is None else run.load_state(options.from_state)
    written, clock = [], []

    def on_token(token: int) -> None:
        written.append(token)
        clock.append(time.perf_counter())

    pieces = run.stream(prompt, after=before, on_token=on_token, **sampling)
    with screen.phase("compiling"):  # of two tokens: the first waits for the prefill, the second for the step
        first = list(itertools.islice(pieces, 2))
    for piece in itertools.chain([prompt], first, pieces):
        print(escape(piece, "terminal"), end="", flush=True)
    print(flush=True)
    if len(clock) > 2:
        # The first token waits for the prefill and the second for the step to compile.
        speed = (len(clock) - 2) / (clock[-1] - clock[1])
        say(f"{len(clock)} tokens, {speed:,.0f} tokens/s")
    if options.save_state is None and options.attention_plot is None:
        return
    state = run.read(written, run.read(prompt, before))
    if options.save_state is not None:
        state.save(options.save_state)
        say(f"{options.save_state}: the state after {len(state.tokens):,} tokens")
    if options.attention_plot is not None:
        weights = run.attention_weights([state.tokens])
        plots.attention_weights(weights, options.attention_plot, [run.tokenizer.decode([token]) for token in state.tokens])
        say(f"{options.attention_plot}: {weights.shape[0]} layers, {weights.shape[2]} heads")


def write_batches(run: Run, prompts: list[str], sampling: dict, batch_size: int, output: Path | None) -> None:
    start, tokens = time.perf_counter(), 0
    # Batches of one size, as near as that goes: another size compiles again.
    size = math.ceil(len(prompts) / math.ceil(len(prompts) / batch_size))
    with contextlib.ExitStack() as stack:
        file = sys.stdout
        if output is not None:
            stack.enter_context(atomic.disk_errors_as_user_errors("--output", output.parent))
        for first in range(0, len(prompts), size):
            batch = prompts[first : first + size]
            with screen.phase(f"continuing {len(batch)} prompts"):
                continuations = run.generate_batch(batch, first_row=first, **sampling)
            if first == 0 and output is not None:  # not sooner: a mistake in a flag leaves an older file as it is
                file = stack.enter_context(open(output, "w", encoding="utf-8"))
            for prompt, text in zip(batch, continuations):
                tokens += len(run.tokenizer.encode(text))
                record = json.dumps({"prompt": prompt, "continuation": text}, ensure_ascii=False)
                print(escape(record, "json"), file=file, flush=True)
            seconds = time.perf_counter() - start
            say(f"{first + len(batch)} of {len(prompts)} prompts, {tokens} tokens in {seconds:.1f} s, compilation included")


if __name__ == "__main__":
    command_line.run(main)
