"""The PyTorch model that benchmark.py measures against: the same Transformer, written the usual PyTorch way.

RMSNorm after the embedding and before each layer, attention with rotary positions through
``F.scaled_dot_product_attention``, a gated MLP, tied embeddings, AdamW with clipping. Same widths, so the same number of
parameters and of multiplications.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from seqmodels.circumstances import num_cores


class Attention(nn.Module):
    def __init__(self, d_model, num_heads, seq_len):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.output = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        num_pairs = d_model // num_heads // 2
        frequencies = 10000.0 ** (-torch.arange(num_pairs) / num_pairs)
        angles = torch.arange(seq_len)[:, None] * frequencies
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotate(self, x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * self.cos - b * self.sin, a * self.sin + b * self.cos], dim=-1)

    def forward(self, x):
        batch, time, width = x.shape
        q, k, v = (
            project(x).view(batch, time, self.num_heads, -1).transpose(1, 2) for project in (self.query, self.key, self.value)
        )
        o = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.output(o.transpose(1, 2).reshape(batch, time, width))


class GatedMLP(nn.Module):
    def __init__(self, d_model, hidden):
        super().__init__()
        self.gate, self.up = (nn.Linear(d_model, hidden, bias=False) for _ in range(2))
        self.output = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x):
        return self.output(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, d_model, num_heads, hidden, seq_len):
        super().__init__()
        self.attention_norm, self.mlp_norm = (nn.RMSNorm(d_model, eps=1e-5) for _ in range(2))
        self.attention = Attention(d_model, num_heads, seq_len)
        self.mlp = GatedMLP(d_model, hidden)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    def __init__(self, d_model, repeats, num_heads, hidden, seq_len, vocab_size):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(d_model, num_heads, hidden, seq_len) for _ in range(repeats))
        self.embedding_norm, self.norm = (nn.RMSNorm(d_model, eps=1e-5) for _ in range(2))

    def forward(self, inputs, targets):
        x = self.embedding_norm(self.embedding(inputs))
        for block in self.blocks:
            x = block(x)
        return self.loss(self.norm(x), targets)

    def loss(self, hidden, targets):
        logits = F.linear(hidden, self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Trainer:
    """A model with its optimizer on one batch: ``step()`` is one training step."""

    def __init__(self, model, inputs, targets, *, compiled: bool):
        self.model = model
        self.batch = torch.from_numpy(inputs).long(), torch.from_numpy(targets).long()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
        self.forward = torch.compile(model) if compiled else model

    def step(self):
        self.forward(*self.batch).backward()
        self.update()
        self.optimizer.zero_grad()

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def by_threads(name: str, step: Callable[[], None]) -> dict[str, Callable[[], None]]:
    """A step with a thread for each core, and with one: PyTorch's threads wait for each other busily."""

    def contender(count):
        def run():
            torch.set_num_threads(count)
            step()

        return run

    counts = sorted({num_cores(), 1}, reverse=True)
    return {f"{name}, {count} thread{'s' if count > 1 else ''}": contender(count) for count in counts}
