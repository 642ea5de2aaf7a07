"""Our runs become other libraries' checkpoints: what was imported byte for byte, what was trained here exactly."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import seqmodels
from configs import base
from seqmodels import model
from seqmodels.config import from_config_dict
from seqmodels.data.text.tokenizer import BytesTokenizer
from seqmodels.errors import UserError
from seqmodels.interop import checkpoint, kinds, safetensors
from seqmodels.pattern import parse_pattern
from tests.configs import layer_configs
from tests.goldens import load
from tests.interop.test_import_hf import GOLDENS, error_of


def untrained(pattern: str, vocab_size: int = 50, **changes):
    """(config, params) of a small model; ``changes`` of mixer options begin with ``mixer_``."""
    options = {name.removeprefix("mixer_"): value for name, value in changes.items() if name.startswith("mixer_")}
    fields = {name: value for name, value in changes.items() if not name.startswith("mixer_")}
    config = dataclasses.replace(from_config_dict(base.get_config()).model, embedding_norm=False)
    layers = layer_configs(pattern, **options)
    config = dataclasses.replace(config, d_model=32, repeats=2, pattern=pattern, **layers | fields)
    shapes = model.param_shapes(config, vocab_size)
    leaves, tree = jax.tree.flatten(shapes)
    generator = np.random.default_rng(0)
    params = jax.tree.unflatten(tree, [generator.standard_normal(leaf.shape, np.float32) for leaf in leaves])
    return config, params


@pytest.mark.parametrize("kind", kinds.names())
def test_in_and_out_is_the_same_file(kind, tmp_path):
    folder = load(GOLDENS[kind]).directory
    found = checkpoint.read(folder)
    written = checkpoint.export_folder(found.config, found.params, found.config.vocab_size, None, tmp_path / "out")
    assert written.model_type == kind
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    theirs, golden = (json.loads((each / "config.json").read_text()) for each in (tmp_path / "out", folder))
    ids = {"bos_token_id", "eos_token_id", "pad_token_id"}
    feedforward = {"ffn_proj_factor", "ffn_round_up_to_multiple_of"}  # of xLSTM: the same width in other words
    assert {name for name in theirs.keys() & golden.keys() if theirs[name] != golden[name]} <= ids | feedforward
    again = checkpoint.read(tmp_path / "out")
    assert again.config == found.config
    jax.tree.map(np.testing.assert_array_equal, again.params, found.params)


@pytest.mark.parametrize(
    ("pattern", "changes", "kind"),
    [
        ("attention mlp", {}, "llama"),
        ("attention mlp attention mlp", {"mixer_num_kv_heads": 2, "tie_embeddings": False}, "llama"),
        ("mamba mamba", {}, "mamba"),
        ("mamba mamba", {"mixer_selection_norm": True}, "falcon_mamba"),
        ("mamba2 mamba2", {"mixer_dt_smallest": 0.01}, "mamba2"),
        ("gla mlp", {}, "gla"),
        ("hgrn mlp hgrn mlp", {}, "hgrn"),
        ("hgrn2 mlp", {}, "hgrn2"),
        ("linear_attention mlp", {"mixer_normalize": False, "mixer_eps": 1e-5}, "linear_attn"),
        ("mlstm mlp", {"mixer_block": "v2", "logit_cap": 20.0}, "xlstm"),
    ],
)
def test_what_was_trained_here(pattern, changes, kind, tmp_path):
    """Layer for layer in the order of depth: the reimported model has the same weights."""
    config, params = untrained(pattern, **changes)
    written = checkpoint.export_folder(config, params, 50, None, tmp_path / "out")
    assert written.model_type == kind
    again = checkpoint.read(tmp_path / "out")
    words = parse_pattern(written.pattern)
    copies = len(parse_pattern(pattern)) // len(words)
    assert again.config.repeats == 2 * copies
    for position, word in enumerate(words):
        found = again.params["layers"][f"{position}_{word}"]
        for layer in range(2 * copies):
            ours = params["layers"][f"{layer % copies * len(words) + position}_{word}"]
            jax.tree.map(lambda a, b, at=layer: np.testing.assert_array_equal(a[at], b[at // copies]), found, ours)
    for name in params.keys() - {"layers"}:
        jax.tree.map(np.testing.assert_array_equal, again.params[name], params[name])


@pytest.mark.parametrize("tied", [True, False])
def test_a_norm_on_the_embedding_becomes_part_of_the_table(tied, tmp_path):
    """Their models have none; the exported one is the same function."""
    config, params = untrained("attention mlp", embedding_norm=True, tie_embeddings=tied)
    checkpoint.export_folder(config, params, 50, None, tmp_path / "out")
    again = checkpoint.read(tmp_path / "out")
    assert not again.config.embedding_norm and not again.config.tie_embeddings
    tokens = np.arange(50)[None]
    ours, theirs = (
        jax.jit(lambda c=c, p=p: model.merge(model.graphdef(c, 50), p)(tokens)[0])()
        for c, p in ((config, params), (again.config, again.params))
    )
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("pattern", "changes", "said"),
    [
        ("attention mlp", {"mixer_window": 8}, "mixers.attention.window=8 has no place in a llama"),
        ("attention mlp", {"mixer_rope": False}, "mixers.attention.rope=False"),
        ("attention mlp", {"logit_cap": 30.0}, "model.logit_cap=30.0"),
        ("attention mlp", {"norm": "layer"}, "model.norm='layer'"),
        ("gla mlp", {"mixer_norm_eps": 1e-3}, "mixers.gla.norm_eps=0.001"),
        ("gla mlp", {"mixer_temperature": 8.0}, "mixers.gla.temperature=8.0"),
        ("linear_attention mlp", {"mixer_feature_map": "softmax"}, "feature_map='softmax'"),
        ("rwkv6 rwkv_channel_mix", {}, "has no place in a rwkv6"),
        ("rwkv6 mlp", {}, "no kind of checkpoint has model.pattern='rwkv6 mlp'"),
        ("attention mlp mamba", {}, "no kind of checkpoint has model.pattern='attention mlp mamba'"),
        ("lstm mlp", {}, "no kind of checkpoint has model.pattern"),
    ],
)
def test_what_has_no_place_is_named(pattern, changes, said, tmp_path):
    config, params = untrained(pattern, **changes)
    with pytest.raises(UserError, match=said):
        checkpoint.export_folder(config, params, 50, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_tokenizer_and_narrow_types(tmp_path):
    config, params = untrained("attention mlp", 300)
    checkpoint.export_folder(config, params, 300, BytesTokenizer(), tmp_path / "out", dtype="bfloat16")
    theirs = json.loads((tmp_path / "out" / "config.json").read_text())
    assert theirs["eos_token_id"] == 256 and theirs["vocab_size"] == 300 and theirs["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    tensors = safetensors.read_folder(tmp_path / "out")
    assert {tensor.dtype for tensor in tensors.values()} == {safetensors.DTYPES["BF16"]}
    rounded = params["embedding"].astype(safetensors.DTYPES["BF16"])
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], rounded)
    workdir = tmp_path / "run"
    checkpoint.import_folder(tmp_path / "out", workdir, defaults=from_config_dict(base.get_config()))
    run = seqmodels.load_run(workdir)
    assert isinstance(run.tokenizer, BytesTokenizer) and run.trainer.vocab_size == 300


def test_mistakes_at_the_command_line(tmp_path, monkeypatch):
    def said(*arguments):
        return error_of(monkeypatch, "scripts/export_hf.py", *arguments)

    assert "--out" in said("--workdir=/no/such")
    assert "not a run folder" in said("--workdir=/no/such", f"--out={tmp_path / 'out'}")
    workdir = tmp_path / "run"
    defaults = from_config_dict(base.get_config())
    checkpoint.import_folder(load("hf/llama").directory, workdir, defaults=defaults)
    assert "not empty" in said(f"--workdir={workdir}", f"--out={workdir}")
    assert "cannot write in '/dev/null'" in said("--workdir=nothing", "--out=/dev/null/new"), "ahead of the run"
    assert "--dtype" in said(f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--dtype=int8")
