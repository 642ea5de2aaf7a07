"""Streamed text is the decoded text, for every kind of tokenizer and wherever the stream is cut."""

import random

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from seqmodels.data.text.incremental import IncrementalText
from seqmodels.data.text.tokenizer import BytesTokenizer, LibraryTokenizer, from_json, train_bpe
from seqmodels.errors import UserError

HAN = "你好世界天地人和山水火木"
TEXT = f"the cat {HAN[:4]} café 😀👨‍👩 the � end� don't."
BYTES = {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}


def byte_level():
    return train_bpe([TEXT.replace(HAN[:4], "") * 20], 300)


def byte_level_with_added_words():
    library = tokenizers.Tokenizer.from_str(byte_level().to_json())
    library.add_tokens(["the cat", "café"])
    return LibraryTokenizer(library)


def byte_level_without_the_first_space():
    library = tokenizers.Tokenizer.from_str(byte_level().to_json())
    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return LibraryTokenizer(library)


def byte_level_with_a_replacement():
    library = tokenizers.Tokenizer.from_str(byte_level().to_json())
    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("the", "THE")])
    return LibraryTokenizer(library)


def with_byte_fallback(model, decoder):
    library = tokenizers.Tokenizer(model)
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoder
    library.add_special_tokens(["<s>", "</s>", "<unk>"])
    return LibraryTokenizer(library)


def llama_decoder():
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return decoders.Sequence(steps)


def fallback_bpe(decoder=None):
    pieces = {"<unk>": 0, "<s>": 1, "</s>": 2} | BYTES
    for piece in ["▁", *"theca s", "▁t", "▁th", "▁the"]:
        pieces.setdefault(piece, len(pieces))
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    model = models.BPE(vocab=pieces, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    return with_byte_fallback(model, decoder or llama_decoder())


def fallback_bpe_whose_decoder_names_bytes():
    return fallback_bpe(decoders.Metaspace())


def fallback_unigram():
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((name, -9.0) for name in BYTES)]
    pieces += [(piece, -2.0) for piece in ["▁the", "▁", *"thecas", "at"]]
    return with_byte_fallback(models.Unigram(pieces, unk_id=0, byte_fallback=True), llama_decoder())


def word_piece():
    words = ["[UNK]", "[SEP]", "the", "cat", "end", ".", "don", "'", "t", "caf", "##é", "##s", "##at", ",", "c"]
    library = tokenizers.Tokenizer(models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    return LibraryTokenizer(library)


def word_level():
    words = ["[UNK]", "the", "cat", "end", "café", HAN[:4], "</s>"]
    library = tokenizers.Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return LibraryTokenizer(library)


def metaspace():
    library = tokenizers.Tokenizer(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.train_from_iterator([TEXT] * 20, trainers.UnigramTrainer(vocab_size=90, special_tokens=["</s>"], show_progress=False))
    return LibraryTokenizer(library)


def suffixes():
    library = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(vocab_size=90, end_of_word_suffix="</w>", special_tokens=["</s>"], show_progress=False)
    library.train_from_iterator([TEXT] * 20, trainer)
    return LibraryTokenizer(library)


def repeated_letters():
    pieces = {piece: place for place, piece in enumerate(["<pad>", "|", *"thecansd", "</s>"])}
    library = tokenizers.Tokenizer(models.WordLevel(pieces, unk_token="|"))
    library.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    library.decoder = decoders.CTC()
    return LibraryTokenizer(library)


# Kinds whose every text of whole characters comes back.
LOSSLESS = [BytesTokenizer, byte_level, byte_level_with_added_words, byte_level_without_the_first_space,
            fallback_bpe, fallback_unigram,
            fallback_bpe_whose_decoder_names_bytes]  # fmt: skip
KINDS = [*LOSSLESS, byte_level_with_a_replacement, word_piece, word_level, metaspace, suffixes, repeated_letters]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def tokenizer(request):
    return request.param()


def streamed(tokenizer, before, after):
    text = IncrementalText(tokenizer, before)
    return "".join([*map(text.push, after), text.flush()])


def test_the_pieces_add_up_wherever_the_stream_begins(tokenizer):
    ids = tokenizer.encode(TEXT)
    whole = tokenizer.decode(ids)
    if tokenizer.name != "bytes" and "<0x" not in tokenizer._library.decode(ids):
        assert whole == tokenizer._library.decode(ids)
    assert len(ids) > 5 and streamed(tokenizer, [], ids) == whole
    for cut in range(len(ids) + 1):
        before, after = ids[:cut], ids[cut:]
        said, more = tokenizer.decode(before), streamed(tokenizer, before, after)
        # The character that the tokens before left unfinished is the first of what follows.
        assert said + more == whole or said.endswith("\ufffd") and said[:-1] + more == whole, cut


@pytest.mark.parametrize("kind", LOSSLESS, ids=lambda kind: kind.__name__)
def test_a_prompt_of_whole_characters_of_any_length(kind):
    """Longer than any window, and written in bytes alone."""
    tokenizer = kind()
    for length in range(1, len(HAN)):
        before = tokenizer.encode(HAN[:length])
        after = tokenizer.encode(HAN)[len(before) :]
        assert streamed(tokenizer, before, after) == HAN[length:]


def test_any_sequence_of_ids_is_text(tokenizer):
    """Decoding never raises, and streaming is decoding: of special tokens, of ids that are none, of broken characters."""
    draw = random.Random(0)
    ids = [draw.choice([*tokenizer.ids, -1, tokenizer.vocab_size, 10**6, 2**31, 2**63]) for _ in range(400)]
    ids = list(map(int, ids))
    for begin in range(0, 400, 8):
        part = ids[begin : begin + 8]
        assert streamed(tokenizer, [], part) == tokenizer.decode(part)
        assert isinstance(streamed(tokenizer, ids[:begin], part), str)
    assert tokenizer.decode([-1, 10**9, 2**70]) == ""


def test_what_is_not_broken_stays_whole_beside_what_is():
    """The library's own decoder makes a U+FFFD of every byte of a run in which one is wrong."""
    tokenizer = fallback_bpe()
    han = [BYTES[f"<0x{byte:02X}>"] for byte in "你".encode()]
    assert tokenizer.decode([*han, *han[:2], tokenizer.encode("the")[0]]) == "你\ufffd the"
    assert tokenizer.decode([*han, *han[:2]]) == "你\ufffd"


def test_a_character_comes_out_with_its_last_token():
    for kind in (BytesTokenizer, fallback_bpe):
        tokenizer = kind()
        text = IncrementalText(tokenizer, tokenizer.encode("s"))
        pieces = [text.push(token) for token in tokenizer.encode("好")[-3:]]
        assert pieces == ["", "", "好"] and text.flush() == ""


def test_a_space_ends_the_character_before_it():
    """Of a decoder that takes away the space that a text begins with, too."""
    tokenizer = fallback_bpe()
    broken, space, other = BYTES["<0xE9>"], tokenizer._library.token_to_id("▁"), BYTES["<0xC1>"]
    assert tokenizer.decode([broken, space]) == "\ufffd " and streamed(tokenizer, [broken, space], [other]) == "\ufffd"


@pytest.mark.parametrize("content", [" ", "t"])
@pytest.mark.parametrize("start", [0, 1, 2, 3, 64])
@pytest.mark.parametrize("kind", ["bytes", "fused", "words"])
def test_what_a_text_begins_with_is_stripped_over_several_tokens(kind, start, content):
    strip = decoders.Strip(content, start, 0)
    if kind == "bytes":
        library = tokenizers.Tokenizer.from_str(byte_level().to_json())
        library.decoder = decoders.Sequence([decoders.ByteLevel(), strip])
        tokenizer = LibraryTokenizer(library)
    else:
        fuse = [decoders.Fuse()] if kind == "fused" else []
        tokenizer = fallback_bpe(decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), *fuse, strip]))
    draw, library = random.Random(start), tokenizer._library
    some = [library.token_to_id(name) for name in ("▁", "Ġ", "<0x20>", "<0x74>", "t", "▁t", "Ġt", "th", "e", "</s>")]
    some = [token for token in some if token is not None]
    assert len(some) > 2
    for _ in range(150):
        ids = draw.choices(some, k=draw.randrange(12))
        whole = library.decode(ids)
        if kind != "words" or not any(len(library.id_to_token(token)) > 3 for token in ids):  # a byte's space is stripped alone
            assert tokenizer.decode(ids) == whole == streamed(tokenizer, [], ids)
        cut = draw.randrange(len(ids) + 1)
        assert tokenizer.decode(ids[:cut]) + streamed(tokenizer, ids[:cut], ids[cut:]) == tokenizer.decode(ids)


@pytest.mark.parametrize("content", ["é", "▁"])
def test_a_character_of_several_bytes_is_not_stripped(content):
    library = tokenizers.Tokenizer.from_str(byte_level().to_json())
    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(content, 1, 0)])
    with pytest.raises(UserError, match=f"{content}.*not one character of ASCII"):
        from_json(library.to_str())


def test_half_of_a_surrogate_is_no_character_that_the_context_leaves_unfinished():
    """Python's decoder waits for its third byte."""
    tokenizer = BytesTokenizer()
    for half in (b"\xed\xa0", b"\xed\xbf"):
        assert tokenizer.decode(half) == "\ufffd\ufffd" and streamed(tokenizer, half, b"a") == "a"
    assert streamed(tokenizer, b"\xed\x9f", b"\xbf") == "\ud7ff"


def test_a_long_context_without_text_is_looked_at_once():
    """Words that the tokenizer does not know, each a special token."""

    class Counting(BytesTokenizer):
        asked = 0

        def token_bytes(self, token, *before):
            self.asked += 1
            return super().token_bytes(token, *before)

    tokenizer, unknown = Counting(), [256] * 1000
    assert streamed(tokenizer, [*b"a", *"好".encode()[:2], *unknown], "好".encode()[2:]) == "好"
    assert tokenizer.asked < 2 * len(unknown)


def test_a_context_that_breaks_off_says_nothing_by_itself():
    tokenizer = BytesTokenizer()
    assert streamed(tokenizer, "好".encode()[:2], []) == ""
    assert streamed(tokenizer, "好".encode()[:2], [tokenizer.end_of_text]) == ""
    assert streamed(tokenizer, "好".encode()[:2], b"a") == "\ufffda"
