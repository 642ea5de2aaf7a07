"""A Llama checkpoint, as transformers saves it, loaded into our model: the same logits, whole and token by token."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels import model
from seqmodels.mixers import attention
from tests.goldens import load, read_safetensors

# Our kernels are [input, output], torch's weights [output, input].
NAMES = {
    ("0_attention", "norm", "scale"): "input_layernorm.weight",
    ("0_attention", "layer", "query_kernel"): "self_attn.q_proj.weight",
    ("0_attention", "layer", "key_kernel"): "self_attn.k_proj.weight",
    ("0_attention", "layer", "value_kernel"): "self_attn.v_proj.weight",
    ("0_attention", "layer", "output_kernel"): "self_attn.o_proj.weight",
    ("1_mlp", "norm", "scale"): "post_attention_layernorm.weight",
    ("1_mlp", "layer", "gate_kernel"): "mlp.gate_proj.weight",
    ("1_mlp", "layer", "up_kernel"): "mlp.up_proj.weight",
    ("1_mlp", "layer", "output_kernel"): "mlp.down_proj.weight",
}


@functools.cache
def llama():
    """(model, golden arrays)."""
    golden = load("hf/llama")
    theirs = json.loads((golden.directory / "config.json").read_text())
    assert not theirs["attention_bias"] and not theirs["mlp_bias"]
    mixer = attention.Config(
        num_heads=theirs["num_attention_heads"],
        num_kv_heads=theirs["num_key_value_heads"],
        head_dim=theirs["head_dim"],
        rope_base=theirs["rope_parameters"]["rope_theta"],
    )
    config = model.ModelConfig(
        d_model=theirs["hidden_size"],
        pattern="attention mlp",
        repeats=theirs["num_hidden_layers"],
        mixers=(("attention", mixer),),
        mlp_kind="gated",
        mlp_hidden=theirs["intermediate_size"],
        mlp_activation=theirs["hidden_act"],
        tie_embeddings=theirs["tie_word_embeddings"],
        norm_eps=theirs["rms_norm_eps"],
        dropout=theirs["attention_dropout"],
        remat=False,
        compute_dtype=theirs["dtype"],
    )
    tensors = read_safetensors(golden.directory / "model.safetensors")
    params = {
        "embedding": tensors.pop("model.embed_tokens.weight"),
        "final_norm": {"scale": tensors.pop("model.norm.weight")},
        "output_kernel": tensors.pop("lm_head.weight").T,
        "layers": {},
    }
    for (position, module, kernel), name in NAMES.items():
        layers = [tensors.pop(f"model.layers.{layer}.{name}").T for layer in range(config.repeats)]
        params["layers"].setdefault(position, {}).setdefault(module, {})[kernel] = np.stack(layers)
    assert not tensors, f"weights without a place: {tensors.keys()}"
    definition = model.graphdef(config, theirs["vocab_size"])
    expected = jax.eval_shape(
        functools.partial(model.init_params, config, theirs["vocab_size"]), jax.random.key(0)
    )
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)
    return model.merge(definition, jax.tree.map(jnp.asarray, params)), golden.arrays


def assert_close(logits, expected):
    worst = np.abs(np.asarray(logits, np.float64) - expected).max() / np.abs(expected).max()
    assert worst <= 5e-5, f"relative error {worst:.1e}"


def test_logits_of_the_whole_text():
    network, arrays = llama()
    tokens = jnp.asarray(arrays["input_ids"], jnp.int32)
    logits, _ = jax.jit(network)(tokens)
    assert_close(logits, arrays["logits"])
    assert_close(logits, arrays["logits_f64run"])


def test_logits_token_by_token():
    network, arrays = llama()
    tokens = jnp.asarray(arrays["input_ids"], jnp.int32)

    def step(state, token):
        logits, state = network(token[:, None], state)
        return state, logits[:, 0]

    _, logits = jax.jit(lambda state: jax.lax.scan(step, state, tokens.T))(network.init_state(*tokens.shape))
    assert_close(jnp.moveaxis(logits, 0, 1), arrays["logits_step"])


def test_a_long_text_after_a_prefill():
    """Twenty tokens at once, then the rest on top of the cache."""
    network, arrays = llama()
    tokens = jnp.asarray(arrays["input_ids"], jnp.int32)
    call = jax.jit(network)
    first, state = call(tokens[:, :20], network.init_state(*tokens.shape))
    second, _ = call(tokens[:, 20:], state)
    assert_close(jnp.concatenate([first, second], axis=1), arrays["logits"])
