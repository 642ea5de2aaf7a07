"""--suite=decode: what a decoded token costs, for every mixer, as the context grows.

Latency, tokens per second alone and in a batch, the speed of reading the context, the state's bytes (measured, and
counted without making it), compilations, and the host's share of a token that is streamed.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp

from benchmarks.decode_report import draw
from benchmarks.timing import Progress, lengths, names_out_of, positive, progress
from configs import base
from seqmodels import mixers, model
from seqmodels.config import from_config_dict
from seqmodels.decoding import generate
from seqmodels.decoding.sampling import Sampler, Sampling
from seqmodels.errors import UserError
from seqmodels.evaluation import decode
from seqmodels.evaluation.perplexity import state_bytes

VOCAB_SIZE = 4096
WINDOW = "attention_window"  # attention with a sliding window, the one contender that is not a mixer's default
WINDOW_STEPS = 256
HOST_WIDTH, HOST_TOKENS = 512, 64


def add_flags(parser: argparse.ArgumentParser) -> None:
    names = (*mixers.names(), WINDOW)
    parser.add_argument("--mixers", type=names_out_of("mixer", names), default=names, help="who decodes")
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
        draw(results, options.out.with_suffix(".png"))
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
    for context in options.contexts:
        before = None  # read by one row, and only if a batch is to be measured
        for batch_size in options.batch_sizes:
            counted = batch_size * state_bytes(graphdef, params, context + options.tokens)
            row = {"name": name, "batch_size": batch_size, "context": context, "counted_state_bytes": counted}
            rows.append(row)
            if counted > options.max_state_bytes:
                continue
            before = before or decode.read(
                graphdef, params, VOCAB_SIZE, context=context, extra_capacity=options.tokens, key=jax.random.key(1)
            )
            compiled = generate.decode._cache_size()
            speed = decode.measure_after(
                graphdef, params, before, batch_size=batch_size, tokens=options.tokens, rounds=options.rounds
            )
            row |= dataclasses.asdict(speed) | {"tokens_per_second": speed.tokens_per_second}
            row["compilations"] = generate.decode._cache_size() - compiled
    return sorted(rows, key=lambda row: (row["batch_size"], row["context"]))


def measure_host() -> dict:
    """Of a token that is streamed, the time until the host's call of the step returns."""
    progress(f"host time per token at width {HOST_WIDTH}")
    network = network_of("attention", HOST_WIDTH, 6)
    graphdef = model.graphdef(network, VOCAB_SIZE)
    params = jax.jit(model.init_params, static_argnums=(0, 1))(network, VOCAB_SIZE, jax.random.key(0))
    tokens, reset = generate.pad_prompts([[1] * 256])
    logits, state = generate.prefill(graphdef, params, tokens, reset, capacity=256 + HOST_TOKENS)
    advance, index = generate.stepper(graphdef), jnp.int32(0)
    sampler = jax.device_put(Sampler(Sampling(), jax.random.key(2)))
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    streamed, dispatched = [], []
    for _ in range(HOST_TOKENS):
        begun = time.perf_counter()
        token, index, state = advance(params, sampler, token, index, state)
        dispatched.append(time.perf_counter() - begun)
        jax.block_until_ready(token)
        streamed.append(time.perf_counter() - begun)
    median = len(streamed) // 2
    result = {"streamed_s": sorted(streamed)[median], "dispatch_s": sorted(dispatched)[median]}
    return result | {"share": result["dispatch_s"] / result["streamed_s"], "width": HOST_WIDTH, "pattern": "6 x [attention mlp]"}


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
        print(
            f"{line} {1e3 * row['seconds_per_step']:9.3f} {row['tokens_per_second']:9.0f} "
            f"{row['prefill_tokens_per_second']:10.0f} {row['state_bytes']:13,d} "
            f"{row['counted_state_bytes']:13,d} {row['compilations']:8d}"
        )
