"""Let a run write: text streams to the terminal as the model makes it.

    python scripts/generate.py --workdir=runs/gla --prompt="Once upon a time" [--max_tokens=200] [--temperature=0.8]
    python scripts/generate.py --workdir=runs/gla --prompts_file=prompts.yaml --output=stories.jsonl

The first form prints the prompt and its continuation, and the speed on stderr. The second continues a YAML list of
prompts in one batch, into one JSON object per line (prompt, continuation).
"""

import json
import sys
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone, uninstalled, in any directory

from seqmodels import command_line
from seqmodels.errors import UserError
from seqmodels.run import Run, load_run, read_config


def main() -> None:
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="the run folder")
    parser.add_argument("--step", type=int, help="which checkpoint; default the newest")
    parser.add_argument("--prompt", help="the text to continue")
    parser.add_argument("--prompts_file", type=Path, help="a YAML list of texts to continue, in one batch")
    parser.add_argument("--output", type=Path, help="write continuations here, one JSON object per line")
    parser.add_argument("--max_tokens", type=int, default=200, help="at most so many new tokens (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_argument("--top_k", type=int, help="sample among the k likeliest tokens only")
    parser.add_argument("--top_p", type=float, help="sample among the likeliest tokens that make up this probability")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another story (default 0)")
    options = parser.parse_args()
    if (options.prompt is None) == (options.prompts_file is None):
        raise UserError('give either --prompt="Once upon a time" or --prompts_file=FILE.yaml')
    prompts = [options.prompt] if options.prompts_file is None else read_prompts(options.prompts_file)

    command_line.use_compilation_cache(read_config(options.workdir).train.compilation_cache_dir)
    run = load_run(options.workdir, options.step)
    sampling = {name: getattr(options, name) for name in ("max_tokens", "temperature", "top_k", "top_p", "seed")}
    if options.prompts_file is None and options.output is None:
        stream(run, options.prompt, sampling)
    else:
        write_batch(run, prompts, sampling, options.output)


def read_prompts(path: Path) -> list[str]:
    try:
        prompts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"{path} must be a YAML list of texts")
    return prompts


def stream(run: Run, prompt: str, sampling: dict) -> None:
    clock = []
    pieces = run.stream(prompt, on_token=lambda: clock.append(time.perf_counter()), **sampling)
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)
    if len(clock) > 2:
        # The first token waits for the prefill and the second for the step to compile.
        speed = (len(clock) - 2) / (clock[-1] - clock[1])
        print(f"{len(clock)} tokens, {speed:,.0f} tokens/s", file=sys.stderr)


def write_batch(run: Run, prompts: list[str], sampling: dict, output: Path | None) -> None:
    start = time.perf_counter()
    continuations = run.generate_batch(prompts, **sampling)
    tokens = sum(len(run.tokenizer.encode(text)) for text in continuations)
    rows = [
        json.dumps({"prompt": prompt, "continuation": text}, ensure_ascii=False)
        for prompt, text in zip(prompts, continuations)
    ]
    if output is None:
        print("\n".join(rows))
    else:
        output.write_text("\n".join(rows) + "\n", encoding="utf-8")
    seconds = time.perf_counter() - start
    print(f"{len(prompts)} prompts, {tokens} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)


if __name__ == "__main__":
    command_line.run(main)
