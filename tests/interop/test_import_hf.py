"""Other libraries' checkpoints become run folders. Their logits are in tests/mixers and tests/interop/test_goldens_llama.py."""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import seqmodels
from configs import base
from seqmodels.config import from_config_dict
from seqmodels.data.text import hub as data_hub
from seqmodels.errors import UserError
from seqmodels.interop import checkpoint, hub, kinds, safetensors, table
from tests.configs import tiny
from tests.goldens import load, manifest
from tests.mixers.goldens import assert_close

ROOT = Path(__file__).resolve().parents[2]
# Kinds by the names of their goldens; flash-linear-attention's begin with fla_.
GOLDENS = {
    name.removeprefix("fla_"): f"hf/{name}" for name in (entry.removeprefix("hf/") for entry in manifest() if "hf/" in entry)
}


def config_of(kind: str) -> dict:
    return checkpoint._read_json(load(GOLDENS[kind]).directory)


def copy_of(kind: str, folder: Path, **changes) -> Path:
    """A golden's folder, fields of its config changed."""
    shutil.copytree(load(GOLDENS[kind]).directory, folder)
    theirs = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(theirs))
    return folder


def error_of(monkeypatch, script: str, *arguments: str) -> str:
    """The one line that a script ends with."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    message = stopped.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


def word_tokenizer(pieces: int):
    """A tokenizer.json whose last piece is </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{index}": index for index in range(pieces - 1)} | {"</s>": pieces - 1}
    library = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    return library


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A run folder of the Llama golden, with a tokenizer of fewer pieces than the model has rows."""
    folder = tmp_path_factory.mktemp("import")
    word_tokenizer(90).save(str(copy_of("llama", folder / "llama") / "tokenizer.json"))
    lines = []
    checkpoint.import_folder(folder / "llama", folder / "run", defaults=from_config_dict(base.get_config()), report=lines.append)
    assert len(lines) == 1 and "eos_token_id 1 is 'w1', no special token" in lines[0]
    shutil.rmtree(folder / "llama")
    return folder / "run"


def test_every_kind_has_a_golden():
    assert set(kinds.names()) <= set(GOLDENS)


def test_a_run_of_a_checkpoint(imported):
    """load_run needs nothing else; the same logits, and text out."""
    run = seqmodels.load_run(imported)
    golden = load("hf/llama").arrays
    assert run.step == 0 and run.config.data.seq_len == 128
    assert_close(run.logits(golden["input_ids"]), golden["logits"], 5e-5)
    assert run.tokenizer.vocab_size == 90 and run.trainer.vocab_size == 97
    text = run.generate("w3 w4", max_tokens=5, temperature=0)
    tokens = [3, 4]
    for _ in range(5):
        tokens.append(int(run.logits([tokens])[0, -1].argmax()))
    assert text.strip() == run.tokenizer.decode(tokens[2:])


def test_eval_takes_it(imported, monkeypatch, capsys, tmp_path):
    (tmp_path / "text.txt").write_text("w1 w2 w3<|endoftext|>w4 w5<|endoftext|>" * 20)
    assert "give --data" in error_of(monkeypatch, "eval.py", f"--workdir={imported}")
    monkeypatch.setattr(sys, "argv", ["eval.py", f"--workdir={imported}", f"--data={tmp_path / 'text.txt'}", "--max_tokens=50"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    assert stopped.value.code == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["step"] == 0 and 4.0 < row["validation_loss"] < 9.0  # log 97 = 4.57: random weights know nothing


def test_without_a_tokenizer(tmp_path, monkeypatch):
    lines = []
    checkpoint.import_folder(
        load("hf/mamba").directory, tmp_path / "run", defaults=from_config_dict(base.get_config()), report=lines.append
    )
    assert len(lines) == 1 and "no tokenizer.json" in lines[0]
    run = seqmodels.load_run(tmp_path / "run")
    assert run.tokenizer is None and run.logits([[1, 2]]).shape == (1, 2, 97)
    with pytest.raises(ValueError, match="0..96"):
        run.logits([[97]])
    with pytest.raises(UserError, match="no tokenizer.json"):
        run.generate("Once")
    with pytest.raises(UserError, match="no tokenizer.json"):
        run.validation("toy")
    arguments = (f"--workdir={tmp_path / 'run'}", "--prompt=Once")
    assert "no tokenizer.json" in error_of(monkeypatch, "scripts/generate.py", *arguments)


def test_a_tokenizer_that_does_not_fit_is_left_out(tmp_path):
    folder, lines = copy_of("llama", tmp_path / "llama"), []
    word_tokenizer(98).save(str(folder / "tokenizer.json"))
    assert checkpoint._tokenizer(folder, checkpoint.read(folder).config, lines.append) is None
    assert "no special token" in lines[0] and "largest id is 97, the model has 97 rows" in lines[1]


def test_an_end_of_text_beyond_the_rows_is_not_called_unknown(tmp_path):
    folder, lines = copy_of("llama", tmp_path / "llama", eos_token_id=97), []
    word_tokenizer(98).save(str(folder / "tokenizer.json"))
    assert checkpoint._tokenizer(folder, checkpoint.read(folder).config, lines.append) is None
    assert len(lines) == 2 and "nothing says" not in lines[1] and "largest id is 97, the model has 97 rows" in lines[1]


def test_an_end_of_text_on_a_row_without_training_is_said(tmp_path):
    folder, lines = copy_of("llama", tmp_path / "llama", eos_token_id=None), []
    library = word_tokenizer(90)
    text = library.to_str().replace("</s>", "w89")
    (folder / "tokenizer.json").write_text(text)
    tokenizer = checkpoint._tokenizer(folder, checkpoint.read(folder).config, lines.append)
    assert tokenizer.end_of_text == 90 and len(lines) == 1 and "id 90, is new" in lines[0] and "import again" in lines[0]


def test_another_tokenizer_in_the_folder_of_an_imported_run_is_said(imported, tmp_path):
    shutil.copytree(imported, tmp_path / "run")
    lines = []
    seqmodels.load_run(tmp_path / "run", report=lines.append)
    assert lines == []
    path = tmp_path / "run" / "tokenizer.json"
    path.write_text(path.read_text().replace('"w3"', '"x3"'))
    seqmodels.load_run(tmp_path / "run", report=lines.append)
    assert len(lines) == 1 and "tokenizer.json is not the one" in lines[0]


def test_shards_and_half_precision(tmp_path):
    """An index and its files, bfloat16 and float16: the values that these stand for, in float32."""
    golden = load("hf/llama").directory
    whole = safetensors.read_folder(golden)
    names = sorted(whole)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    folder = copy_of("llama", tmp_path / "llama", dtype="bfloat16")
    (folder / "model.safetensors").unlink()
    for (file, of_part), dtype in zip(parts.items(), ("BF16", "F16")):
        safetensors.write(folder / file, {name: whole[name].astype(safetensors.DTYPES[dtype]) for name in of_part})
    index = {"metadata": {}, "weight_map": {name: file for file, of_part in parts.items() for name in of_part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found, expected = checkpoint.read(folder), checkpoint.read(golden)
    back = table.write_tensors(found.kind, found.config, found.params)
    for number, dtype in ((0, "BF16"), (1, "F16")):
        for name in names[number::2]:
            rounded = whole[name].astype(safetensors.DTYPES[dtype]).astype(np.float32)
            np.testing.assert_array_equal(back[name], rounded)
            assert not np.array_equal(rounded, whole[name]) or name.endswith("norm.weight")
    assert found.config == expected.config
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="lacks model-00002-of-00002.safetensors"):
        checkpoint.read(folder)


def test_older_llama_configs():
    """Fields that transformers 4 has elsewhere or leaves out."""
    theirs = config_of("llama")
    del theirs["rope_parameters"], theirs["head_dim"], theirs["attention_bias"], theirs["mlp_bias"]
    found = table.read_config(kinds.load("llama"), theirs | {"rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "bfloat16"})
    ((_, mixer),) = found.mixers
    assert mixer.rope_base == 5e5 and mixer.head_dim == 16


def fields_set(kind: str, entry: table.Field, value) -> dict:
    """Ours of a golden's config with every name of a field at one value, also where it is within a group."""
    theirs = config_of(kind)
    for name in entry.theirs.split():
        group, _, last = name.rpartition(".")
        (theirs.setdefault(group, {}) if group else theirs)[last] = value
    return table._flat_ours(kinds.load(kind), table.read_config(kinds.load(kind), theirs))


@pytest.mark.parametrize("kind", kinds.names())
def test_a_zero_and_a_null_are_not_read_as_absent(kind):
    """A zero is refused or is ours; a null is refused, false, or None where their library's default is that."""
    for entry in (each for each in kinds.load(kind).fields if isinstance(each, table.Field) and each.ours):
        try:
            assert 0 in [fields_set(kind, entry, 0)[name] for name in entry.ours.split()], entry.theirs
        except UserError as error:
            assert "config.json" in str(error)
        if isinstance(entry.default, bool):
            assert fields_set(kind, entry, None)[entry.ours.split()[0]] is False
        elif entry.default is not None:
            with pytest.raises(UserError, match="=None; write what is meant|lacks"):
                fields_set(kind, entry, None)


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("llama", {"num_hidden_layers": 10**9}), ("llama", {"num_hidden_layers": 60_000}), ("llama", {"vocab_size": 2**24}),
        ("llama", {"intermediate_size": 2**20}), ("mamba", {"state_size": 2**20}), ("mamba", {"num_hidden_layers": 10**6}),
    ],
    ids=str,
)  # fmt: skip
def test_a_model_larger_than_its_tensors_is_refused_before_memory_is_asked_for(tmp_path, kind, changes):
    with pytest.raises(UserError, match="config.json|tensors hold") as error:
        checkpoint.read(copy_of(kind, tmp_path / kind, **changes))
    assert "\n" not in str(error.value)


def test_falcons_intermediate_size_counts():
    theirs = config_of("falcon_mamba") | {"expand": 16, "intermediate_size": 192}
    ((_, mixer),) = table.read_config(kinds.load("falcon_mamba"), theirs).mixers
    assert mixer.expand == 3 and mixer.selection_norm


def test_an_xlstm_has_as_many_layers_as_num_blocks_says(tmp_path):
    """transformers' ``xLSTMConfig(num_blocks=2)`` is saved with num_hidden_layers=32, which its model does not read."""
    golden = load("hf/xlstm")
    found = checkpoint.read(copy_of("xlstm", tmp_path / "xlstm", num_hidden_layers=32))
    assert found.config.repeats == 2
    jax.tree.map(np.testing.assert_array_equal, found.params, checkpoint.read(golden.directory).params)
    kind = kinds.load("xlstm")
    assert table.read_config(kind, config_of("xlstm") | {"num_hidden_layers": 3, "num_blocks": None}).repeats == 3
    written = table.write_config(kind, found.config)
    assert (written["num_blocks"], written["num_hidden_layers"]) == (2, 2)


def test_fields_that_nobody_knows_are_reported():
    lines = []
    table.read_config(kinds.load("mamba"), config_of("mamba") | {"colour": "red", "shade": None}, lines.append)
    assert len(lines) == 1 and "colour='red'" in lines[0] and "shade" not in lines[0]


def test_another_class_and_code_of_its_own_are_said():
    lines = []
    theirs = config_of("llama") | {"architectures": ["LlamaModel"], "auto_map": {"AutoModel": "modeling.Mine"}}
    table.read_config(kinds.load("llama"), theirs, lines.append)
    assert len(lines) == 2 and "['LlamaModel'], and is read as a LlamaForCausalLM" in lines[0] and "auto_map" in lines[1]
    for kind in kinds.names():
        table.read_config(kinds.load(kind), config_of(kind), pytest.fail)  # of what its library saved, nothing is


def test_an_adapter_beside_the_model_is_refused(tmp_path):
    folder = copy_of("llama", tmp_path / "llama")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="adapter_config.json: an adapter changes"):
        checkpoint.read(folder)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling="),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters.rope_type='yarn'"),
        ("llama", {"rope_parameters": {"rope_type": "default", "factor": 8.0}}, "rope_parameters.factor=8.0"),
        ("llama", {"rope_parameters": {"type": "linear", "factor": 8.0}}, "rope_parameters.type='linear'"),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "rope_parameters.full_attention.rope_type='yarn'",
        ),
        ("llama", {"rope_parameters": "yarn"}, "rope_parameters='yarn'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"sliding_window": 64}, "sliding_window=64"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"hidden_act": ["silu"]}, r"hidden_act=\['silu'\]"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config="),
        ("llama", {"rope_theta": 5.0}, "rope_parameters.rope_theta=10000.0 but rope_theta=5.0"),
        ("llama", {"hidden_size": None}, "lacks hidden_size"),
        ("llama", {"hidden_size": "wide"}, "hidden_size|d_model"),
        ("llama", {"num_attention_heads": 0}, "^config.json asks for .*num_heads=0"),
        ("llama", {"rms_norm_eps": "1e-5"}, "^config.json asks for .*norm_eps='1e-5' must be float"),
        ("llama", {"num_attention_heads": 0, "head_dim": None}, "head_dim .None. cannot be"),
        ("llama", {"num_key_value_heads": 3}, "num_kv_heads=3"),
        ("mamba", {"use_bias": True}, "use_bias=True"),
        ("mamba", {"intermediate_size": 100}, "intermediate_size=100"),
        ("falcon_mamba", {"intermediate_size": None, "expand": 0}, "expand=0"),
        ("falcon_mamba", {"intermediate_size": 100}, "intermediate_size .100. cannot be"),
        ("mamba2", {"num_heads": 4}, "num_heads=4"),
        ("xlstm", {"weight_mode": "fused"}, "weight_mode='fused'"),
        ("gla", {"attn": {"layers": [1]}}, "attn="),
        ("gla", {"use_short_conv": True}, "use_short_conv=True"),
        ("gla", {"clamp_min": -3.0}, "clamp_min=-3.0"),
        ("gla", {"use_gk": None}, "use_gk=None"),
        ("retnet", {"num_kv_heads": 1}, "num_kv_heads=1"),
        ("hgrn", {"use_lower_bound": False}, "use_lower_bound=False"),
        ("hgrn2", {"expand_ratio": 16}, "expand_ratio=16"),
        ("linear_attn", {"feature_map": "hedgehog"}, "feature_map='hedgehog'"),
        ("rwkv6", {"norm_bias": False}, "norm_bias=False"),
    ],
)
def test_a_field_that_we_cannot_do_is_named(kind, changes, said):
    with pytest.raises(UserError, match=said):
        table.read_config(kinds.load(kind), config_of(kind) | changes)


@pytest.mark.parametrize("kind", ["gla", "retnet"])
def test_the_norm_that_their_library_fuses_has_another_name(kind, tmp_path):
    """As by their default; a checkpoint that we write says which it has, or they would not find it."""
    folder = copy_of(kind, tmp_path / "fused", fuse_norm=True)
    tensors = safetensors.read_folder(folder)
    renamed = {name.replace("attn.g_norm.", "attn.g_norm_swish_gate."): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    safetensors.write(folder / "model.safetensors", renamed)
    found = checkpoint.read(folder)
    golden = checkpoint.read(load(GOLDENS[kind]).directory)
    jax.tree.map(np.testing.assert_array_equal, found.params, golden.params)
    checkpoint.export_folder(found.config, found.params, 97, None, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["fuse_norm"] is False
    assert safetensors.read_folder(tmp_path / "out").keys() == tensors.keys()


def test_a_kind_that_is_not_here(tmp_path):
    with pytest.raises(UserError, match="'recurrent_gemma'.*RG-LRU.*known: .*llama"):
        checkpoint.read(load("hf/recurrent_gemma").directory)
    with pytest.raises(UserError, match="'bert'.*known: .*llama"):
        checkpoint.read(copy_of("llama", tmp_path / "bert", model_type="bert"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), r"model\.norm\.weight is missing.*\[64\]"),
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), r"layers\.1\.mlp\.up_proj\.weight is missing"),
        (lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.bias": np.zeros(96, np.float32)}), r"up_proj\.bias has no"),
        (
            lambda tensors: tensors.update({"lm_head.weight": np.zeros((96, 64), np.float32)}),
            r"lm_head\.weight has shape \[96, 64\].*\[97, 64\]",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, change, said):
    folder = copy_of("llama", tmp_path / "llama")
    tensors = {name: np.array(array) for name, array in safetensors.read_folder(folder).items()}
    change(tensors)
    safetensors.write(folder / "model.safetensors", tensors)
    with pytest.raises(UserError, match=said):
        checkpoint.read(folder)


def test_a_tied_head_may_be_there_if_it_is_the_embedding(tmp_path):
    folder = copy_of("mamba", tmp_path / "mamba")
    tensors = {name: np.array(array) for name, array in safetensors.read_folder(folder).items()}
    tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"]
    safetensors.write(folder / "model.safetensors", tensors)
    assert checkpoint.read(folder).config.tie_embeddings
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    safetensors.write(folder / "model.safetensors", tensors)
    with pytest.raises(UserError, match="lm_head.weight differs"):
        checkpoint.read(folder)


def tensors_of(kind: str) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in safetensors.read_folder(load(GOLDENS[kind]).directory).items()}


def in_shards(folder: Path, *shards: dict[str, np.ndarray], named: dict[str, int] | None = None) -> None:
    """Write shards and their index; ``named``: names that the index puts into a shard beside those that are there."""
    (folder / "model.safetensors").unlink()
    files = [f"model-{number}-of-{len(shards)}.safetensors" for number in range(len(shards))]
    places = {name: file for file, shard in zip(files, shards) for name in shard}
    places |= {name: files[number] for name, number in (named or {}).items()}
    for file, shard in zip(files, shards):
        safetensors.write(folder / file, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize(("kind", "embedding"), [("llama", "model.embed_tokens.weight"), ("mamba", "backbone.embeddings.weight")])
def test_of_a_tied_head_either_name_may_be_kept(kind, embedding, tmp_path):
    """In one file, and in shards whose index names both."""
    tensors, head = tensors_of(kind), "lm_head.weight"
    table_of_tokens = tensors.pop(embedding)
    body = {name: tensor for name, tensor in tensors.items() if name != head}
    folder = copy_of(kind, tmp_path / kind, tie_word_embeddings=True)
    for kept in (embedding, head):
        safetensors.write(folder / "model.safetensors", {**body, kept: table_of_tokens})
        found = checkpoint.read(folder)
        assert found.config.tie_embeddings and "output_kernel" not in found.params
        np.testing.assert_array_equal(found.params["embedding"], table_of_tokens)
        in_shards(folder, body, {kept: table_of_tokens}, named={embedding: 1, head: 1})
        again = checkpoint.read(folder)
        jax.tree.map(np.testing.assert_array_equal, again.params, found.params)
    (folder / "config.json").write_text(json.dumps(config_of(kind) | {"tie_word_embeddings": False}))
    with pytest.raises(UserError, match="is missing"):
        checkpoint.read(folder)


def test_all_that_is_in_the_shards_is_looked_at(tmp_path):
    tensors = tensors_of("llama")
    names = sorted(tensors)
    first, second = ({name: tensors[name] for name in part} for part in (names[::2], names[1::2]))
    folder = copy_of("llama", tmp_path / "foreign")
    in_shards(folder, first, second | {"foreign.weight": tensors["model.norm.weight"]})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["foreign.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"foreign\.weight has no place"):
        checkpoint.read(folder)
    folder = copy_of("llama", tmp_path / "twice")
    in_shards(folder, first, second | {names[0]: tensors[names[0]] + 1})
    with pytest.raises(UserError, match=f"{names[0]}, which another shard has as well"):
        checkpoint.read(folder)


def damaged(content: bytes, cut: slice | None = None, header: bytes | None = None) -> bytes:
    if header is not None:
        return len(header).to_bytes(8, "little") + header + content
    return content[cut]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: b"", "cut off"),
        (lambda content: content[:100], "cut off"),
        (lambda content: content[:-4], "cut off: .* ends at byte"),
        (lambda content: damaged(b"", header=b"no JSON"), "damaged: its header"),
        (lambda content: damaged(b"", header=b'{"a":{"dtype":"F32"}}'), "damaged: a has not just"),
        (lambda content: damaged(b"1234", header=b'{"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}'), "a is I32"),
        (lambda content: damaged(b"1234", header=b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}'), "a of shape"),
        (lambda content: damaged(b"1234", header=b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}'), "a of shape"),
    ],
)
def test_a_damaged_file(tmp_path, damage, said):
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage((load("hf/llama").directory / "model.safetensors").read_bytes()))
    with pytest.raises(UserError, match=said):
        safetensors.read(path)


def test_a_file_that_is_cut_off_while_it_is_read_ends_no_process(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.write(path, {"a": np.ones(3000, np.float32), "b": np.ones(3000, np.float32)})
    tensors = safetensors.read(path)
    os.truncate(path, 15000)
    assert tensors["a"].sum() == 3000 and "b" in tensors and tensors.count == 6000
    with pytest.raises(UserError, match="model.safetensors has 15,000 bytes, and had 24,.*: it was cut off meanwhile"):
        tensors["b"]


def test_weights_that_are_not_finite_are_one_line_and_leave_nothing(tmp_path):
    folder = copy_of("llama", tmp_path / "nan")
    tensors = {name: np.array(tensor) for name, tensor in safetensors.read(folder / "model.safetensors").items()}
    tensors["lm_head.weight"].flat[0] = np.nan
    safetensors.write(folder / "model.safetensors", tensors)
    with pytest.raises(UserError, match="nan: not all numbers are finite in params/output_kernel"):
        checkpoint.import_folder(folder, tmp_path / "run", defaults=tiny())
    assert [path.name for path in tmp_path.iterdir()] == ["nan"]


def test_the_new_folder_needs_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (".", "", ".."):
        with pytest.raises(UserError, match="give the name of a new folder"):
            checkpoint.import_folder(load("hf/llama").directory, name, defaults=tiny())


def test_mistakes_at_the_command_line(tmp_path, monkeypatch, imported):
    llama, workdir = str(load("hf/llama").directory), f"--workdir={tmp_path / 'run'}"

    def said(*arguments):
        return error_of(monkeypatch, "scripts/import_hf.py", *arguments)

    assert "--workdir" in said(llama)
    assert "there is no folder /no/such" in said("/no/such", workdir)
    (tmp_path / "empty").mkdir()
    assert "no config.json" in said(str(tmp_path / "empty"), workdir)
    pickled = copy_of("llama", tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "pytorch_model.bin" in said(str(pickled), workdir)
    (pickled / "config.json").write_text("{")
    assert "not valid JSON" in said(str(pickled), workdir)
    (pickled / "config.json").write_text("{}")
    assert "no model_type" in said(str(pickled), workdir)
    assert "'bert'" in said(str(copy_of("llama", tmp_path / "bert", model_type="bert")), workdir)
    cut = copy_of("llama", tmp_path / "cut")
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[:-1])
    assert "cut off" in said(str(cut), workdir)
    assert "compute_dtype" in said(llama, workdir, "--compute_dtype=int8")
    assert "--revision" in said(llama, workdir, "--revision=main")
    for place, what in ((imported, "not empty"), (Path("/dev/null"), "no folder")):
        line = said(llama, f"--workdir={place}")
        assert f"is {what}" in line and "delete" not in line
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".run*")), "nothing is left behind"


def test_without_a_network(monkeypatch):
    monkeypatch.setattr(data_hub, "reachable", lambda: False)
    with pytest.raises(UserError, match="no folder nobody/nothing, and the Hugging Face hub cannot be reached"):
        hub.folder("nobody/nothing")
