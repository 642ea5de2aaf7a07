"""--suite=train: the training step of every mixer.

The host's time, compile time, tokens per second, the parts of the step one by one, and the memory of the loss.

Against a PyTorch Transformer of the same shape (pytorch_transformer.py), in the same process, where PyTorch is
installed.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.timing import positive, progress, take_turns
from configs import base
from seqmodels import mixers
from seqmodels.channel_layers import mlp
from seqmodels.circumstances import num_cores
from seqmodels.config import from_config_dict
from seqmodels.errors import UserError
from seqmodels.layers import RMSNorm
from seqmodels.model import weight_decay_mask
from seqmodels.training import loss
from seqmodels.training.optimizer import learning_rate_schedule, make_optimizer
from seqmodels.training.state import Trainer

VOCAB_SIZE = 4096
PYTORCH, PYTORCH_COMPILED = "pytorch", "pytorch compiled"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mixers", default=",".join(mixers.names()), help="whose training steps to time")
    parser.add_argument("--shapes", default="128x4,256x6", help="of the training step: WIDTHxREPEATS, ...")
    parser.add_argument("--batch_size", type=positive, default=16, help="sequences per step")
    parser.add_argument("--seq_len", type=positive, default=256, help="tokens per sequence")
    parser.add_argument("--rounds", type=positive, default=6, help="turns of each contender")
    parser.add_argument("--torch_compile", action="store_true", help="time torch.compile too (takes a minute)")


def run(options: argparse.Namespace) -> dict:
    names = options.mixers.split(",")
    for name in names:
        mixers.load(name)  # raises, naming the nearest
    shapes = [parse_shape(shape) for shape in options.shapes.split(",")]
    has_torch = importlib.util.find_spec("torch") is not None
    if not has_torch:
        progress("PyTorch is not installed, so nothing is compared with it (pip install torch)")
    sizes = {"batch_size": options.batch_size, "seq_len": options.seq_len}
    results = {"sizes": sizes, "compile": measure_compile(names, sizes), "dispatch": measure_dispatch()}
    results["throughput"] = []
    for d_model, repeats in shapes:
        results["throughput"] += measure_throughput(names, d_model, repeats, sizes, options, has_torch)
    results["parts"] = measure_parts(names, *shapes[0], sizes, options.rounds, has_torch)
    results["loss_memory"] = measure_loss_memory()
    return results


def parse_shape(shape: str) -> tuple[int, int]:
    width, _, repeats = shape.partition("x")
    if not (width.isdecimal() and repeats.isdecimal()):
        raise UserError(f"--shapes: {shape!r} is not WIDTHxREPEATS, like 128x4")
    return int(width), int(repeats)


# ---- the training step


class Training:
    """One training step of ``repeats`` times the pattern on one random batch; ``step()`` waits for it."""

    def __init__(self, pattern: str, d_model: int, repeats: int, *, batch_size: int, seq_len: int, embedding_norm: bool = True):
        config = base.get_config()
        config.model.embedding_norm = embedding_norm
        config.model.pattern = pattern
        config.model.d_model, config.model.repeats = d_model, repeats
        config.data.batch_size, config.data.seq_len = batch_size, seq_len
        config.mesh.data = 1
        self.trainer = Trainer(from_config_dict(config), VOCAB_SIZE, jax.devices()[:1])
        self.state = self.trainer.init()
        self.batch = self.trainer.put(random_batch(batch_size, seq_len))

    def dispatch(self) -> None:
        self.state, self.metrics = self.trainer.train_step(self.state, self.batch)

    def step(self) -> None:
        self.dispatch()
        jax.block_until_ready(self.state)


def random_batch(batch_size: int, seq_len: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(VOCAB_SIZE, size=(batch_size, seq_len + 1), dtype=np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def measure_compile(names, sizes) -> dict:
    """Seconds to trace, lower and compile the training step at 4 repeats and width 128, nothing cached."""
    print("\ncompile time of the training step, 4 repeats of [mixer, mlp] at width 128 (goal: under 10 s)")
    results = {}
    for name in names:
        progress(f"compiling {name}")
        training = Training(mixers.pattern(name), 128, 4, **sizes)
        cpu, wall = time.process_time(), time.perf_counter()
        training.trainer.trace(training.batch).lower().compile()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        results[name] = {"wall_s": wall, "cpu_s": cpu}
        print(f"  {name:24s} {wall:6.1f} s wall {cpu:6.1f} s CPU")
    return results


def measure_dispatch() -> dict:
    """Milliseconds until the call of a step returns, before the device has computed it: the host's share."""
    progress("host time per step")
    training = Training("attention mlp", 64, 24, batch_size=1, seq_len=32)
    times = []
    for _ in range(30):
        training.step()
        start = time.perf_counter()
        training.dispatch()
        times.append(1e3 * (time.perf_counter() - start))
    jax.block_until_ready(training.state)
    result = {"wall_ms": min(times), "median_wall_ms": float(np.median(times))}
    print(
        "\nhost time per step, 24 repeats at width 64, scanned (goal: under 2 ms)\n"
        f"  {result['wall_ms']:.2f} ms (median {result['median_wall_ms']:.2f})"
    )
    return result


def measure_throughput(names, d_model, repeats, sizes, options, has_torch) -> list[dict]:
    """Training steps of every mixer, and of PyTorch's Transformer, in turns."""
    progress(f"training steps at width {d_model}, {repeats} repeats")
    trainings = {name: Training(mixers.pattern(name), d_model, repeats, **sizes) for name in names}
    contenders = {name: training.step for name, training in trainings.items()}
    flops = {name: training.trainer.flops_per_token for name, training in trainings.items()}
    if has_torch:
        from benchmarks.peers import pytorch_transformer

        trainer = pytorch_trainer(d_model, repeats, sizes, compiled=False)
        contenders |= pytorch_transformer.by_threads(PYTORCH, trainer.step)
        if "attention" in trainings:
            ours = trainings["attention"].trainer.num_parameters
            theirs = sum(parameter.numel() for parameter in trainer.model.parameters())
            assert ours == theirs, f"not the same model: {ours} parameters against {theirs}"
        if options.torch_compile:
            progress("compiling PyTorch's model")
            compiled = pytorch_trainer(d_model, repeats, sizes, compiled=True).step
            contenders |= pytorch_transformer.by_threads(PYTORCH_COMPILED, compiled)
    times = take_turns(contenders, options.rounds, steady=True)
    best = min((times[name] for name in times if name not in flops), key=lambda each: each["wall_ms"], default=None)
    tokens = sizes["batch_size"] * sizes["seq_len"]
    print(f"\ntraining step, width {d_model}, {repeats} repeats, B {sizes['batch_size']}, T {sizes['seq_len']}")
    print(f"  {'':24s} {'ms':>8s} {'median':>8s} {'CPU ms':>8s} {'tokens/s':>9s} {'GFLOP/s':>8s}  of PyTorch's best speed")
    rows = []
    for name, measured in times.items():
        row = {"name": name, "d_model": d_model, "repeats": repeats} | measured
        row["tokens_per_second"] = 1e3 * tokens / measured["wall_ms"]
        line = f"  {name:24s} {measured['wall_ms']:8.1f} {measured['median_wall_ms']:8.1f} {measured['cpu_ms']:8.1f}"
        line += f" {row['tokens_per_second']:9.0f}"
        if name in flops:
            row["gflops_per_second"] = row["tokens_per_second"] * flops[name] / 1e9
            line += f" {row['gflops_per_second']:8.0f}"
            if best is not None:
                row["of_pytorch"] = best["wall_ms"] / measured["wall_ms"]
                row["of_pytorch_cpu"] = best["cpu_ms"] / measured["cpu_ms"]
                line += f"  {row['of_pytorch']:.2f} (by CPU time {row['of_pytorch_cpu']:.2f})"
        print(line)
        rows.append(row)
    return rows


def pytorch_trainer(d_model, repeats, sizes, *, compiled):
    import torch

    from benchmarks.peers import pytorch_transformer

    torch.manual_seed(0)
    num_heads = mixers.load("attention").Config().num_heads
    model = pytorch_transformer.Transformer(
        d_model, repeats, num_heads, mlp.default_hidden(d_model), sizes["seq_len"], VOCAB_SIZE
    )
    return pytorch_transformer.Trainer(model, **random_batch(**sizes), compiled=compiled)


# ---- the parts of a step


def measure_parts(names, d_model, repeats, sizes, rounds, has_torch) -> list[dict]:
    """Forward and backward of each part alone, times how often a step has it."""
    progress(f"parts of the step at width {d_model}")
    counts = {name: repeats * mixers.pattern(name).split().count(name) for name in names} | {
        "mlp": repeats, "norm": 2 * repeats + 2, "embedding": 1, "loss": 1, "optimizer": 1,
    }  # fmt: skip
    ours = our_parts(names, d_model, repeats, sizes)
    theirs = pytorch_parts(d_model, repeats, sizes) if has_torch else {}
    contenders = ours | {f"{PYTORCH} {name}": run for name, run in theirs.items()}
    times = take_turns(contenders, rounds, steady=True)
    print(f"\nparts of that step at width {d_model}, forward and backward, alone")
    print(f"  {'':24s} {'ms':>8s} {'CPU ms':>8s} {'times':>6s} {'ms a step':>10s}  PyTorch: ms, CPU ms")
    rows = []
    for name, count in counts.items():
        measured = times[name]
        row = {"name": name, "count": count} | measured
        line = f"  {name:24s} {measured['wall_ms']:8.2f} {measured['cpu_ms']:8.2f} {count:6d}"
        line += f" {count * measured['wall_ms']:10.1f}"
        if name in theirs:
            row[PYTORCH] = times[f"{PYTORCH} {name}"]
            line += f"  {row[PYTORCH]['wall_ms']:.2f}, {row[PYTORCH]['cpu_ms']:.2f}"
        print(line)
        rows.append(row)
    return rows


def our_parts(names, d_model, repeats, sizes) -> dict[str, Callable]:
    """Name -> a call that runs the part forward and backward and waits."""
    training = Training(mixers.pattern(names[0]), d_model, repeats, **sizes)
    config, params = training.trainer.config, training.state["params"]
    batch, embedding = training.batch, params["embedding"]
    random = np.random.default_rng(0)
    x, y_gradient = (
        jnp.asarray(random.normal(size=(sizes["batch_size"], sizes["seq_len"], d_model)), jnp.float32) for _ in range(2)
    )
    rngs = nnx.Rngs(0)
    layers = {name: mixers.load(name) for name in names}
    layers = {name: module.Mixer(module.Config(), d_model, rngs=rngs) for name, module in layers.items()}
    layers["mlp"] = mlp.Layer(mlp.Config(), d_model, rngs=rngs)
    norm = RMSNorm(d_model, eps=config.model.norm_eps, rngs=rngs)

    def forward_and_backward(function, cotangent, *arguments):
        def both(cotangent, *arguments):
            y, backward = jax.vjp(function, *arguments)
            return y, backward(cotangent)

        compiled = jax.jit(both)
        return lambda: jax.block_until_ready(compiled(cotangent, *arguments))

    parts = {}
    for name, layer in layers.items():
        graphdef, layer_params = nnx.split(layer)
        apply = lambda params, x, graphdef=graphdef: nnx.merge(graphdef, params)(x)[0]  # noqa: E731
        parts[name] = forward_and_backward(apply, y_gradient, layer_params, x)
    graphdef, norm_params = nnx.split(norm)
    parts["norm"] = forward_and_backward(lambda params, x: nnx.merge(graphdef, params)(x), y_gradient, norm_params, x)
    parts["embedding"] = forward_and_backward(
        lambda embedding: jnp.take(embedding, batch["inputs"], axis=0), y_gradient, embedding
    )
    parts["loss"] = forward_and_backward(
        lambda x, embedding: loss.cross_entropy(x, embedding.T, batch["targets"])[0], jnp.float32(1), x, embedding
    )
    schedule = learning_rate_schedule(config.optim, config.train.steps)
    optimizer = make_optimizer(config.optim, schedule, weight_decay_mask(config.model, VOCAB_SIZE))

    def update(gradients, state, params):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(update)
    gradients, optimizer_state = params, optimizer.init(params)
    parts["optimizer"] = lambda: jax.block_until_ready(compiled(gradients, optimizer_state, params))
    return parts


def pytorch_parts(d_model, repeats, sizes) -> dict[str, Callable]:
    """PyTorch's counterparts, by the names of ours."""
    import torch

    torch.set_num_threads(num_cores())
    trainer = pytorch_trainer(d_model, repeats, sizes, compiled=False)
    model, (inputs, targets) = trainer.model, trainer.batch
    x = torch.randn(sizes["batch_size"], sizes["seq_len"], d_model, requires_grad=True)
    y_gradient = torch.randn_like(x)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return {
        "attention": lambda: model.blocks[0].attention(x).backward(y_gradient),
        "mlp": lambda: model.blocks[0].mlp(x).backward(y_gradient),
        "norm": lambda: model.norm(x).backward(y_gradient),
        "embedding": lambda: model.embedding(inputs).backward(y_gradient),
        "loss": lambda: model.loss(x, targets).backward(),
        "optimizer": trainer.update,
    }


# ---- the memory of the loss


def measure_loss_memory() -> dict:
    """MiB of temporaries of the loss and its gradients at 32,768 tokens in the vocabulary, in chunks and with all logits at once."""
    progress("memory of the loss")
    tokens, d_model, vocab_size = (16, 256), 128, 32_768
    shapes = (
        jax.ShapeDtypeStruct((*tokens, d_model), jnp.float32),
        jax.ShapeDtypeStruct((d_model, vocab_size), jnp.float32),
        jax.ShapeDtypeStruct(tokens, jnp.int32),
    )

    def chunked(hidden, kernel, targets):
        return loss.cross_entropy(hidden, kernel, targets)[0]

    def plain(hidden, kernel, targets):
        return optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, targets).sum()

    result = {}
    for name, function in {"chunked": chunked, "plain": plain}.items():
        compiled = jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(*shapes).compile()
        result[f"{name}_mib"] = compiled.memory_analysis().temp_size_in_bytes / 2**20
    print(
        f"\nmemory of the loss and its gradients, {vocab_size} words, B {tokens[0]}, T {tokens[1]}, width {d_model}\n"
        f"  in chunks {result['chunked_mib']:.0f} MiB, all logits at once {result['plain_mib']:.0f} MiB"
    )
    return result
