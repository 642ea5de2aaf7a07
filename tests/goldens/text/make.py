"""Makes tests/goldens/text/llama: a checkpoint with a tokenizer, and what transformers writes with it.

    pip install torch transformers
    python tests/goldens/text/make.py

The tokenizer is of Llama's kind: it falls back to bytes, a space stands before the first word, and `<s>` before the first token. Its
end of text has a name of its own, the model stops at two tokens, and its embedding has rows that are no token's.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

FOLDER = Path(__file__).parent / "llama"
SPECIAL = ["<unk>", "<s>", "<end>", "<turn>"]
WORDS = ["▁the", "▁cat", "▁dog", "▁sat", "▁ran", "▁on", "▁mat", "▁and", "."]
ROWS = 320
PROMPTS = ["the cat sat on", "the café 你好"]


def tokenizer() -> PreTrainedTokenizerFast:
    pieces = {piece: place for place, piece in enumerate(SPECIAL)}
    for piece in [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *"abcdefghijklmnopqrstuvwxyz."]:
        pieces.setdefault(piece, len(pieces))
    merges = []
    for word in WORDS:
        for end in range(1, len(word)):
            if (pair := (word[:end], word[end])) not in merges:
                merges.append(pair)
            pieces.setdefault(word[: end + 1], len(pieces))
    assert len(pieces) < ROWS - 3
    library = Tokenizer(models.BPE(vocab=pieces, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(steps)
    library.add_special_tokens(SPECIAL)
    library.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<s>", eos_token="<end>", unk_token="<unk>")


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3,
        max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.get_input_embeddings().weight.data[len(tokenizer()) :] = 0  # or transformers would write ids that are no tokens
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[3, 2])
    model.save_pretrained(FOLDER)
    tokenizer().save_pretrained(FOLDER)

    model, reader = AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    written = []
    for prompt in PROMPTS:
        tokens = reader(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(tokens).logits[0, -1]
            new = model.generate(tokens, do_sample=False, max_new_tokens=12)[0, tokens.shape[1] :]
        rounded = [round(float(value), 5) for value in logits]
        written.append({"prompt": prompt, "tokens": tokens[0].tolist(), "next": rounded, "new": new.tolist()})
    (FOLDER / "written.json").write_text(json.dumps(written) + "\n")
    print([(each["new"], reader.decode(each["new"])) for each in written])


if __name__ == "__main__":
    main()
