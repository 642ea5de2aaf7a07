"""--suite=decode: what a decoded token costs, for every mixer, as the context grows.

Latency, tokens per second alone and in a batch, the speed of reading the context, the state's bytes (measured, and
counted without making it), compilations, and the host's share of a token that is streamed.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
from benchmark_shared import Progress, lengths, positive, progress, some_of
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from configs import base
from seqmodels import generate, mixers, model
from seqmodels.config import from_config_dict
from seqmodels.errors import UserError
from seqmodels.evaluation import decode
from seqmodels.evaluation.perplexity import state_bytes

VOCAB_SIZE = 4096
WINDOW = "attention_window"  # attention with a sliding window, the one contender that is not a mixer's default
WINDOW_STEPS = 256
HOST_WIDTH, HOST_TOKENS = 512, 64


def add_flags(parser: argparse.ArgumentParser) -> None:
    names = (*mixers.names(), WINDOW)
    parser.add_argument("--mixers", type=some_of("mixer", names), default=names, help="who decodes")
    parser.add_argument("--contexts", type=lengths, default=(256, 2048, 16384, 65536), help="tokens read before")
    parser.add_argument("--batch_sizes", type=lengths, default=(1, 32), help="rows decoded together")
    parser.add_argument("--tokens", type=positive, default=32, help="written by each row")
    parser.add_argument("--d_model", type=positive, default=128, help="width of the model")
    parser.add_argument("--repeats", type=positive, default=4, help="of the layers that its paper has for one")
    parser.add_argument("--rounds", type=positive, default=3, help="runs of each, the fastest counts")
    parser.add_argument("--max_state_bytes", type=positive, default=2 << 30, help="larger states are left out")


def run(options: argparse.Namespace) -> dict:
    if options.out is not None and options.out.suffix == ".png":
        raise UserError(f"--out={options.out}: the picture goes beside it under this name; give a .json")
    rows, states = [], Progress({name: 1.0 for name in options.mixers})
    for name in options.mixers:
        states.start(name)
        rows += measure(name, options)
    sizes = {field: getattr(options, field) for field in ("d_model", "repeats", "tokens")}
    results = {"sizes": sizes, "rows": rows, "host": measure_host()}
    print_table(rows, sizes)
    host = results["host"]
    print(
        f"\nhost's share of a streamed token, width {HOST_WIDTH}, {host['pattern']} (goal: under 5 %)\n"
        f"  {1e3 * host['streamed_s']:.2f} ms a token streamed, {1e3 * host['dispatch_s']:.2f} of it until the call "
        f"returns: {100 * host['share']:.1f} %"
    )
    if options.out is not None:
        draw(rows, sizes, options.out.with_suffix(".png"))
    return results


def network_of(name: str, d_model: int, repeats: int) -> model.ModelConfig:
    config = base.get_config()
    mixer = "attention" if name == WINDOW else name
    config.model.pattern = mixers.pattern(mixer)
    config.model.d_model, config.model.repeats = d_model, repeats
    if name == WINDOW:
        config.model.mixers.attention.window = WINDOW_STEPS
    return from_config_dict(config).model


def measure(name: str, options: argparse.Namespace) -> list[dict]:
    network = network_of(name, options.d_model, options.repeats)
    graphdef = model.graphdef(network, VOCAB_SIZE)
    params = jax.jit(model.init_params, static_argnums=(0, 1))(network, VOCAB_SIZE, jax.random.key(0))
    rows = []
    for batch_size in options.batch_sizes:
        for context in options.contexts:
            counted = batch_size * state_bytes(graphdef, params, context + options.tokens)
            row = {"name": name, "batch_size": batch_size, "context": context, "counted_state_bytes": counted}
            if counted <= options.max_state_bytes:
                before = generate.decode._cache_size()
                speed = decode.measure(
                    graphdef, params, VOCAB_SIZE, batch_size=batch_size, context=context,
                    tokens=options.tokens, rounds=options.rounds, key=jax.random.key(1),
                )  # fmt: skip
                row |= dataclasses.asdict(speed) | {"tokens_per_second": speed.tokens_per_second}
                row["compilations"] = generate.decode._cache_size() - before
            rows.append(row)
    return rows


def measure_host() -> dict:
    """Of a token that is streamed, the time until the host's call of the step returns."""
    progress(f"host time per token at width {HOST_WIDTH}")
    network = network_of("attention", HOST_WIDTH, 6)
    graphdef = model.graphdef(network, VOCAB_SIZE)
    params = jax.jit(model.init_params, static_argnums=(0, 1))(network, VOCAB_SIZE, jax.random.key(0))
    tokens, reset = generate.pad_prompts([[1] * 256])
    logits, state = generate.prefill(graphdef, params, tokens, reset, capacity=256 + HOST_TOKENS)
    streamed, dispatched = [], []
    for _ in range(HOST_TOKENS):
        begun = time.perf_counter()
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits, state = generate.step(graphdef, params, token, state)
        dispatched.append(time.perf_counter() - begun)
        jax.block_until_ready(logits)
        streamed.append(time.perf_counter() - begun)
    median = len(streamed) // 2
    result = {"streamed_s": sorted(streamed)[median], "dispatch_s": sorted(dispatched)[median]}
    return result | {"share": result["dispatch_s"] / result["streamed_s"], "pattern": "6 x [attention mlp]"}


def print_table(rows: list[dict], sizes: dict) -> None:
    print(f"\ngreedy decoding, width {sizes['d_model']}, {sizes['repeats']} repeats, {sizes['tokens']} tokens a row")
    print(
        f"  {'':18s} {'batch':>5s} {'context':>8s} {'ms/token':>9s} {'tokens/s':>9s} {'reading/s':>10s} "
        f"{'state bytes':>13s} {'counted':>13s} {'compiled':>8s}"
    )
    for row in rows:
        line = f"  {row['name']:18s} {row['batch_size']:5d} {row['context']:8d}"
        if "seconds_per_step" not in row:
            print(f"{line} {'(state too large)':>44s} {row['counted_state_bytes']:13,d}")
            continue
        reading = row["prefill_tokens_per_second"]
        print(
            f"{line} {1e3 * row['seconds_per_step']:9.3f} {row['tokens_per_second']:9.0f} "
            f"{reading if reading == reading else float('nan'):10.0f} {row['state_bytes']:13,d} "
            f"{row['counted_state_bytes']:13,d} {row['compilations']:8d}"
        )


def draw(rows: list[dict], sizes: dict, path) -> None:
    """Latency and state against context, a panel for each batch size; a line that lies flat is a state of fixed size."""
    batch_sizes = sorted({row["batch_size"] for row in rows})
    figure = Figure(figsize=(6.2 * (len(batch_sizes) + 1), 6.4), layout="constrained")
    panels = figure.subplots(1, len(batch_sizes) + 1)
    names = list(dict.fromkeys(row["name"] for row in rows))
    styles = {name: dict(color=f"C{i % 10}", ls=("-", "--", ":")[i // 10], marker="o", ms=4) for i, name in enumerate(names)}
    for axes, batch_size in zip(panels, batch_sizes):
        for name in names:
            mine = [row for row in rows if (row["name"], row["batch_size"]) == (name, batch_size)]
            mine = [row for row in mine if "seconds_per_step" in row]
            axes.plot([row["context"] for row in mine], [row["seconds_per_step"] for row in mine], label=name, **styles[name])
        axes.set_title(f"one token, batch {batch_size}")
        axes.yaxis.set_major_formatter(EngFormatter("s"))
    for name in names:
        mine = [row for row in rows if (row["name"], row["batch_size"]) == (name, batch_sizes[0])]
        axes = panels[-1]
        axes.plot([row["context"] for row in mine], [row["counted_state_bytes"] for row in mine], label=name, **styles[name])
        axes.set_title(f"state, batch {batch_sizes[0]}")
        axes.yaxis.set_major_formatter(EngFormatter("B"))
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda steps, _: f"{steps / 1024:g}k" if steps >= 1024 else f"{steps:g}")
        axes.set_xlabel("tokens of context (1k = 1024)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"decoding, width {sizes['d_model']}, {sizes['repeats']} repeats")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
