"""--suite=hf: the training step of Mamba and Mamba-2 against Hugging Face's models in PyTorch.

Both sides have the same sizes (those of our mixers' defaults), the same number of parameters, the same batch, the same
loss, AdamW with clipping. Hugging Face's side is ``MambaForCausalLM`` and ``Mamba2ForCausalLM`` without compiled
kernels, which need a GPU: a loop over the steps for Mamba, products within chunks for Mamba-2.

PyTorch takes its turns with a thread for each core and with one, and the faster of the two is what we are compared with: its
threads wait for each other busily, after every small operation. On cores that were busy with other work two threads
took 171 ms where one took 7 (Mamba, one layer of width 32, B 2, T 16), in CPU time ten times as much, too.
"""

import argparse
import importlib.util
import os
import types

from benchmarks.suites.train import VOCAB_SIZE, Training, random_batch
from benchmarks.timing import Progress, names_out_of, positive, take_turns
from seqmodels import mixers
from seqmodels.circumstances import num_cores
from seqmodels.errors import UserError

OURS, THEIRS = "seqmodels", "transformers"
MODELS = ("mamba", "mamba2")


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=names_out_of("model", MODELS), default=",".join(MODELS), help="which to time")
    parser.add_argument("--d_model", type=positive, default=128, help="width")
    parser.add_argument("--layers", type=positive, default=4, help="layers, each a mixer alone")
    parser.add_argument("--batch_size", type=positive, default=8, help="sequences per step")
    parser.add_argument("--seq_len", type=positive, default=256, help="tokens per sequence")
    parser.add_argument("--rounds", type=positive, default=4, help="turns of each contender")
    parser.add_argument("--seconds", type=float, default=30.0, help="a contender whose turns took so long gets no third")


def run(options: argparse.Namespace) -> dict:
    lacking = [package for package in ("torch", "transformers") if importlib.util.find_spec(package) is None]
    if lacking:
        raise UserError(f"--suite=hf needs {' and '.join(lacking)}: pip install torch transformers")
    sizes = {name: getattr(options, name) for name in ("d_model", "layers", "batch_size", "seq_len")}
    load, cores = os.getloadavg()[0], num_cores()
    if load > cores / 2:
        print(f"\nother work is running (load {load:.1f} on {cores} cores): PyTorch's threads suffer more than ours do")
    clock = Progress({name: 1.0 for name in options.models})
    results = {"sizes": sizes | {"vocab_size": VOCAB_SIZE}, "hf": [], "left_out": []}
    for name in options.models:
        clock.start(name)
        if name in mixers.names():
            results["hf"] += measure(name, sizes, options.rounds, options.seconds)
        else:
            print(f"\n{name} is left out: there is no mixer of this name yet")
            results["left_out"].append(name)
    return results


def measure(name: str, sizes: dict, rounds: int, seconds: float) -> list[dict]:
    """Training steps of both in turns, a row each."""
    shape = {each: sizes[each] for each in ("batch_size", "seq_len")}
    ours = Training(name, sizes["d_model"], sizes["layers"], embedding_norm=False, **shape)
    from benchmarks.peers.pytorch_transformer import by_threads

    theirs = hugging_face_trainer(name, sizes, shape)
    parameters = {
        OURS: ours.trainer.num_parameters,
        THEIRS: sum(parameter.numel() for parameter in theirs.model.parameters()),
    }
    assert parameters[OURS] == parameters[THEIRS], f"{name}: not the same model: {parameters} parameters"
    times = take_turns({OURS: ours.step} | by_threads(THEIRS, theirs.step), rounds, seconds, steady=True)
    best = min((side for side in times if side != OURS), key=lambda side: times[side]["wall_ms"])
    tokens = shape["batch_size"] * shape["seq_len"]
    print(
        f"\n{name}: training step, width {sizes['d_model']}, {sizes['layers']} layers, {VOCAB_SIZE} words,"
        f" {parameters[OURS]} parameters each, B {shape['batch_size']}, T {shape['seq_len']}\n"
        f"  {'':24s} {'ms':>8s} {'median':>8s} {'CPU ms':>8s} {'tokens/s':>9s}  of {THEIRS}' best speed"
    )
    rows = []
    for side, measured in times.items():
        row = {"name": name, "side": side, "parameters": parameters[OURS], "best": best} | measured
        row["tokens_per_second"] = 1e3 * tokens / measured["wall_ms"]
        row["of_best"] = times[best]["wall_ms"] / measured["wall_ms"]
        row["of_best_cpu"] = times[best]["cpu_ms"] / measured["cpu_ms"]
        print(
            f"  {side:24s} {measured['wall_ms']:8.1f} {measured['median_wall_ms']:8.1f} {measured['cpu_ms']:8.1f}"
            f" {row['tokens_per_second']:9.0f}  {row['of_best']:.2f} (by CPU time {row['of_best_cpu']:.2f})"
        )
        rows.append(row)
    return rows


def hugging_face_trainer(name: str, sizes: dict, shape: dict):
    os.environ["HF_HUB_OFFLINE"] = "1"  # transformers would look for compiled kernels
    import torch
    import transformers

    from benchmarks.peers import pytorch_transformer

    transformers.logging.set_verbosity_error()  # it warns at length that there are no kernels
    torch.manual_seed(0)
    config = mixers.load(name).Config()
    same = dict(
        vocab_size=VOCAB_SIZE, hidden_size=sizes["d_model"], num_hidden_layers=sizes["layers"],
        state_size=config.d_state, conv_kernel=config.conv_width, expand=config.expand, layer_norm_epsilon=1e-5,
        tie_word_embeddings=True, use_cache=False, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    if name == "mamba":
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**same))
    else:
        num_heads = config.expand * sizes["d_model"] // config.head_dim
        heads = dict(num_heads=num_heads, head_dim=config.head_dim, n_groups=config.num_groups)
        model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**same, **heads))
    model.train()

    def loss(inputs, targets):
        logits = model(inputs).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    trained = types.SimpleNamespace(parameters=model.parameters)
    trainer = pytorch_transformer.Trainer(trained, **random_batch(**shape), compiled=False)
    trainer.forward = loss
    return trainer
