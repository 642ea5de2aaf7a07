"""Tiny models of transformers and flash-linear-attention, trained on a CPU in PyTorch as ``training/optimizer.py`` trains ours."""

import importlib
import os
from pathlib import Path

import numpy as np
import torch
import transformers

from seqmodels.config import RunConfig

WIDTH, LAYERS = 64, 2


class Peer:
    """A model with AdamW: clipping by the global norm, then the update, then decay where the mask says (decoupled)."""

    def __init__(self, model: torch.nn.Module):
        self.model = model.train()

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def start(self, config: RunConfig, decayed: dict[str, np.ndarray]) -> None:
        optim = config.optim
        self.clip_norm, self.weight_decay = optim.clip_norm, optim.weight_decay
        named = dict(self.model.named_parameters())
        assert named.keys() == decayed.keys(), f"tensors of one side alone: {sorted(named.keys() ^ decayed.keys())}"
        self.decayed = {named[name]: torch.from_numpy(mask) for name, mask in decayed.items()}
        betas = optim.beta1, optim.beta2
        self.optimizer = torch.optim.AdamW(named.values(), lr=0.0, betas=betas, eps=optim.eps, weight_decay=0.0)

    def step(self, batch: dict[str, np.ndarray], learning_rate: float) -> float:
        inputs, targets = (torch.from_numpy(batch[name].astype(np.int64)) for name in ("inputs", "targets"))
        logits = self.model(inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            norm = torch.linalg.vector_norm(torch.stack([each.grad.norm() for each in self.decayed]))
            for parameter, mask in self.decayed.items():
                parameter.grad *= min(1.0, self.clip_norm / norm.item())
                parameter -= learning_rate * self.weight_decay * mask * parameter
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        return loss.item()


def build(name: str, vocab_size: int, seed: int) -> Peer:
    """The model that its library calls so, with parameters drawn from the seed."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # transformers would look for compiled kernels
    transformers.logging.set_verbosity_error()  # it warns at length that there are none
    torch.set_num_threads(1)  # small operations: threads would wait for each other
    torch.manual_seed(seed)
    same = {"vocab_size": vocab_size, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "bos_token_id": 0, "eos_token_id": 0}
    return Peer(BUILDERS[name](same))


def _llama(same):
    config = transformers.LlamaConfig(**same, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def _mamba(same):
    return transformers.MambaForCausalLM(transformers.MambaConfig(**same, state_size=8))


def _mamba2(same):
    heads = {"num_heads": 4, "head_dim": 32, "n_groups": 1, "chunk_size": 16}
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**same, **heads, state_size=16, pad_token_id=0))


def _xlstm(same):
    kernels = {"mode": "train", "chunkwise_kernel": "chunkwise--native_autograd", "autocast_kernel_dtype": "float32"}
    config = transformers.xLSTMConfig(**same, **kernels, num_blocks=LAYERS, num_heads=4, chunk_size=16, use_cache=False)
    return transformers.xLSTMForCausalLM(config)


# Without what they fuse, which needs a GPU; the recurrences are replaced below.
UNFUSED = {
    "fuse_norm": False, "fuse_swiglu": False, "fuse_cross_entropy": False, "use_short_conv": False, "intermediate_size": 96
}  # fmt: skip


def _gla(same):
    from fla.models import GLAConfig, GLAForCausalLM

    _use_naive("fla.layers.gla")
    return GLAForCausalLM(GLAConfig(**same, **UNFUSED, num_heads=2, attn_mode="chunk"))


def _hgrn2(same):
    from fla.models import HGRN2Config, HGRN2ForCausalLM

    _use_naive("fla.layers.hgrn2")
    return HGRN2ForCausalLM(HGRN2Config(**same, **UNFUSED, num_heads=2, expand_ratio=WIDTH // 2, attn_mode="chunk"))


def _retnet(same):
    from fla.models import RetNetConfig, RetNetForCausalLM

    _use_naive("fla.layers.multiscale_retention")
    return RetNetForCausalLM(RetNetConfig(**same, **UNFUSED, num_heads=2, attn_mode="chunk"))


BUILDERS = {
    "llama": _llama, "mamba": _mamba, "mamba2": _mamba2, "xlstm": _xlstm, "gla": _gla, "hgrn2": _hgrn2, "retnet": _retnet
}  # fmt: skip


def _use_naive(layer: str) -> None:
    """In this process, what a module of flash-linear-attention's layers calls is PyTorch's, or their own reference."""
    from fla.modules import mlp
    from fla.modules.norm import layernorm
    from fla.modules.rotary import ops as rotary
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.retention.naive import naive_retention

    def gla(q, k, v, g=None, gk=None, **options):
        return naive_recurrent_gla(q, k, v, gk if g is None else g)

    def retention(q, k, v, **options):
        return naive_retention(*(each.transpose(1, 2) for each in (q, k, v))).transpose(1, 2), None

    def norm(self, x, residual=None, prenorm=False, residual_in_fp32=False):
        return layernorm.rms_norm_ref(x, self.weight, self.bias, residual, self.eps, prenorm)

    def norm_linear(x, norm_weight, norm_bias, weight, bias, eps=1e-5):
        return torch.nn.functional.linear(layernorm.rms_norm_ref(x, norm_weight, norm_bias, eps=eps), weight, bias)

    def rotate(x, cos, sin, *rest, **options):
        return rotary.rotary_embedding_ref(x, cos[: x.shape[1]], sin[: x.shape[1]])

    silu = torch.nn.functional.silu
    naive = {
        "chunk_gla": gla, "fused_recurrent_gla": gla, "chunk_retention": retention, "fused_recurrent_retention": retention,
        "rms_norm_linear": norm_linear, "swish": silu, "ACT2FN": {"swish": silu},
    }  # fmt: skip
    module = importlib.import_module(layer)
    for name in naive.keys() & vars(module).keys():
        setattr(module, name, naive[name])
    mlp.swiglu = lambda gate, up: silu(gate) * up
    layernorm.RMSNorm.forward = norm
    rotary.rotary_embedding = rotate
