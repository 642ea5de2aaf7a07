"""Tokenizers give back every text, treat text as text only, and survive saving."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from seqmodels import data
from seqmodels.data.text import tokenizer, toy
from seqmodels.data.text.word_cache import WordCache
from seqmodels.errors import UserError

REPOSITORY = Path(__file__).parents[3]
TEXTS = [
    "Once upon a time, there was a dog.",
    "  two  spaces, a\ttab\n\nand lines \r\n ",
    "café “quoted” 😀 日本語 \x00 \x7f",
    "it's we'll they'd I'm you've 'tis 1234 a1b2 !!!??? ...",
    "<|endoftext|> is only text here <|endoftext|>",
    "",
]


def training_text():
    """Stories, and the short forms that the cutting into words has rules for."""
    return [*toy.stories("train", 300), *["we're they've I'm he'll she'd it's don't WE'RE"] * 100]


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.train_bpe(training_text(), 600)


@pytest.fixture(params=["bytes", "bpe"])
def any_tokenizer(request):
    return tokenizer.BytesTokenizer() if request.param == "bytes" else request.getfixturevalue("bpe")


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_comes_back(any_tokenizer, text):
    ids = any_tokenizer.encode(text)
    assert any_tokenizer.decode(ids) == text
    assert any_tokenizer.decode(np.array(ids, np.uint16)) == text
    assert all(0 <= i < any_tokenizer.vocab_size for i in ids)


def test_no_text_becomes_the_separator(any_tokenizer):
    for text in TEXTS:
        assert any_tokenizer.end_of_text not in any_tokenizer.encode(text)
    one = any_tokenizer.encode("one")
    assert any_tokenizer.decode([*one, any_tokenizer.end_of_text, *one]) == "oneone"


def test_a_batch_is_its_texts(any_tokenizer):
    batch = any_tokenizer.encode_batch(TEXTS)
    assert [list(ids) for ids in batch] == [any_tokenizer.encode(text) for text in TEXTS]


def test_a_broken_character_decodes_to_the_replacement(any_tokenizer):
    first, second = any_tokenizer.encode("é")
    assert any_tokenizer.decode([first]) == any_tokenizer.decode([second]) == "\ufffd"


def test_saving_keeps_everything(any_tokenizer, tmp_path):
    any_tokenizer.save(tmp_path / "tokenizer.json")
    loaded = data.load_tokenizer(tmp_path / "tokenizer.json")
    assert type(loaded) is type(any_tokenizer)
    assert (loaded.name, loaded.vocab_size, loaded.end_of_text) == (
        any_tokenizer.name,
        any_tokenizer.vocab_size,
        any_tokenizer.end_of_text,
    )
    assert [loaded.encode(text) for text in TEXTS] == [any_tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.digest(loaded) == tokenizer.digest(any_tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_other_programs_read_the_file(any_tokenizer, tmp_path):
    any_tokenizer.save(tmp_path / "tokenizer.json")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = TEXTS[2]
    assert library.encode(text).ids == any_tokenizer.encode(text)
    assert library.token_to_id("<|endoftext|>") == any_tokenizer.end_of_text


def test_names_say_kind_and_size(bpe):
    assert tokenizer.BytesTokenizer().name == "bytes"
    assert bpe.name == "bpe-600" and bpe.vocab_size == 600
    assert data.load_tokenizer("bytes").vocab_size == 257


def test_training_is_deterministic_in_any_number_of_threads(bpe):
    program = (
        "from seqmodels.data.text import tokenizer\n"
        "from tests.data.text.test_tokenizer import training_text\n"
        "print(tokenizer.digest(tokenizer.train_bpe(training_text(), 600)))"
    )
    for threads in ("1", "4"):
        run = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == tokenizer.digest(bpe)


def test_a_small_text_trains_fewer_pieces():
    small = tokenizer.train_bpe(["one two one two"], 4096)
    assert tokenizer.MIN_BPE_SIZE <= small.vocab_size < 300
    assert small.decode(small.encode("three é")) == "three é"


def test_training_stops_at_its_limit_of_text(monkeypatch):
    monkeypatch.setattr(tokenizer, "BPE_TRAINING_BYTES", 1000)
    read = []

    def documents():
        for story in toy.stories("train", 1000):
            read.append(story)
            yield story

    tokenizer.train_bpe(documents(), 300)
    assert sum(map(len, read)) < 5000


def test_remembered_words_are_the_library_s_words(bpe):
    library = tokenizers.Tokenizer.from_str(bpe.to_json())
    library.encode_special_tokens = True
    assert WordCache.serves(library)
    cache = WordCache(library)
    draw = random.Random(0)
    # Every ASCII character, and the ones the pattern is about more often.
    alphabet = [chr(i) for i in range(128)] + list("   \n\n\t'''sdmtrevl 0 9 a z ..") * 4
    texts = ["".join(draw.choices(alphabet, k=draw.randint(0, 40))) for _ in range(3000)]
    assert any("'re" in word for word in json.loads(bpe.to_json())["model"]["vocab"])
    for text in [*texts, *training_text()[-1:], *filter(str.isascii, TEXTS), *toy.stories("validation", 20)]:
        assert cache.encode(text) == library.encode(text).ids, repr(text)


def test_the_word_cache_forgets_before_it_grows_too_large(bpe, monkeypatch):
    monkeypatch.setattr("seqmodels.data.text.word_cache._MOST_WORDS", 10)
    fresh = tokenizer.from_json(bpe.to_json())
    for story in toy.stories("validation", 5):
        assert fresh.encode_batch([story])[0].tolist() == bpe.encode(story)
        assert len(fresh._words._ids) <= 10


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Prepend", "prepend": "_"}},
        {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            }
        },
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
    ],
)
def test_the_word_cache_leaves_other_tokenizers_to_the_library(bpe, change):
    changed = tokenizer.from_json(json.dumps(json.loads(bpe.to_json()) | change))
    library = tokenizers.Tokenizer.from_str(changed.to_json())
    library.encode_special_tokens = True
    for text in TEXTS:
        assert changed.encode_batch([text])[0].tolist() == library.encode(text).ids == changed.encode(text)


def word_level(words):
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return library


def test_anybody_s_tokenizer(tmp_path):
    library = word_level(["?", "one", "two", "</s>"])
    library.add_special_tokens(["</s>"])
    library.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 3)])
    library.enable_truncation(1)
    library.enable_padding(length=50)
    library.save(str(tmp_path / "other.json"))
    loaded = data.load_tokenizer(tmp_path / "other.json")
    # Neither its separator nor its padding nor its truncation are of the text.
    assert loaded.encode("one two three") == [1, 2, 0]
    assert loaded.encode_batch(["one two three"])[0].tolist() == [1, 2, 0]
    assert (loaded.end_of_text, loaded.vocab_size, loaded.name) == (3, 4, "wordlevel-4")


def test_a_tokenizer_of_characters(tmp_path):
    library = word_level(["?", *"onetw ", "</s>"])
    library.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    library.decoder = tokenizers.decoders.Fuse()
    library.save(str(tmp_path / "other.json"))
    loaded = data.load_tokenizer(tmp_path / "other.json")
    assert loaded.decode(loaded.encode("one two")) == "one two" and len(loaded.encode("one two")) == 7


def test_a_tokenizer_without_a_separator_gets_one(tmp_path):
    word_level(["?", "one", "two"]).save(str(tmp_path / "other.json"))
    loaded = data.load_tokenizer(tmp_path / "other.json")
    assert (loaded.end_of_text, loaded.vocab_size) == (3, 4)
    word_level(["?", "one", "<eos>"]).save(str(tmp_path / "ordinary.json"))
    ordinary = data.load_tokenizer(tmp_path / "ordinary.json")
    assert (ordinary.end_of_text, ordinary.vocab_size) == (2, 3)
    assert 2 not in ordinary.encode("one <eos> one") and ordinary.decode([1, 2]) == "one"
    loaded.save(tmp_path / "again.json")
    assert data.load_tokenizer(tmp_path / "again.json").end_of_text == 3


def test_a_folder_with_a_tokenizer_json(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    assert data.load_tokenizer(tmp_path).name == bpe.name


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[1]", b'{"model": {"type": "Magic"}}', b"\xff\xfe", b"text"])
def test_what_is_not_a_tokenizer(tmp_path, content):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(UserError, match="is not a tokenizer.json") as error:
        data.load_tokenizer(tmp_path / "t.json")
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_is_not_there(tmp_path):
    for name in (tmp_path / "none.json", tmp_path, "bqe"):
        with pytest.raises(UserError, match="no tokenizer at"):
            data.load_tokenizer(name)


def test_a_bpe_smaller_than_its_bytes():
    with pytest.raises(UserError, match="at least 257"):
        tokenizer.train_bpe(["text"], 256)


def test_what_a_text_begins_with_is_read_from_the_file(bpe):
    """Llama's template puts a token before each text; BERT's one after it, too, which is no beginning."""
    assert bpe.beginning == () == tokenizer.BytesTokenizer().beginning
    for template, beginning in (("<s> $A", (0,)), ("<s> $A </s>", (0,)), ("$A </s>", ())):
        library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="<s>"))
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        found = tokenizer.LibraryTokenizer(library)
        assert found.beginning == beginning and found.encode("a") == [2]
        assert tokenizer.from_json(found.to_json()).beginning == beginning


def another(description, **token):
    description["added_tokens"].append(description["added_tokens"][0] | token)


BYTES_AND_MORE = {
    "another token": lambda d: another(d, id=257, content="<x>"),
    "another end": lambda d: d["added_tokens"][0].update(content="</s>"),
    "no end": lambda d: d.update(added_tokens=[]),
    "lower case": lambda d: d.update(normalizer={"type": "Lowercase"}),
    "a space before": lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
    "a token before": lambda d: d.update(post_processor={
        "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [65], "tokens": ["A"]}},
    }),
}  # fmt: skip


@pytest.mark.parametrize("change", BYTES_AND_MORE)
def test_a_file_of_the_bytes_and_more_is_read_as_what_it_is(change, tmp_path):
    description = json.loads(tokenizer.BytesTokenizer().to_json())
    BYTES_AND_MORE[change](description)
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    loaded = data.load_tokenizer(tmp_path)
    library = tokenizers.Tokenizer.from_str(json.dumps(description))
    library.encode_special_tokens = True
    assert loaded.encode("A bé") == library.encode("A bé", add_special_tokens=False).ids
    assert [*loaded.beginning, *loaded.encode("A bé")] == library.encode("A bé").ids
    assert set(library.get_vocab(with_added_tokens=True)) <= set(json.loads(loaded.to_json())["model"]["vocab"]) | {
        token["content"] for token in json.loads(loaded.to_json())["added_tokens"]
    }


def test_the_bytes_end_a_text_with_what_the_files_beside_them_say(tmp_path):
    description = json.loads(tokenizer.BytesTokenizer().to_json())
    another(description, id=257, content="<turn>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    (tmp_path / "config.json").write_text('{"eos_token_id": [257, 256]}')
    assert data.load_tokenizer(tmp_path).ends == (257, 256)
    tokenizer.BytesTokenizer().save(tmp_path / "tokenizer.json")
    (tmp_path / "config.json").write_text('{"eos_token_id": 256}')
    assert isinstance(data.load_tokenizer(tmp_path), tokenizer.BytesTokenizer)
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    assert data.load_tokenizer(tmp_path).ends == (0,)


@pytest.mark.parametrize("dropout", [0.5, 1.0])
def test_a_text_has_the_same_tokens_whatever_dropout_the_file_asks_for(bpe, dropout, tmp_path):
    description = json.loads(bpe.to_json())
    description["model"]["dropout"] = dropout
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    lines = []
    loaded = data.load_tokenizer(tmp_path, lines.append)
    for text in TEXTS:
        assert loaded.encode(text) == loaded.encode_batch([text])[0].tolist() == bpe.encode(text)
    assert len(lines) == 1 and "dropout" in lines[0] and loaded.to_json() == bpe.to_json()


@pytest.mark.parametrize("ids", [(2, 3), (3, 2), (7, 5), (40, 41)])
def test_added_tokens_have_the_ids_that_the_file_says(ids, tmp_path):
    description = json.loads(word_level(["?", "one"]).to_str())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    description["added_tokens"] = [
        {"id": number, "content": content, "special": True} | flags
        for number, content in zip(ids, ("<end>", "<turn>"), strict=True)
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": list(ids)}))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    lines = []
    loaded = data.load_tokenizer(tmp_path, lines.append)
    assert (loaded.ends, loaded.vocab_size, lines) == (ids, max(ids) + 1, [])
    assert loaded.encode("one <end>") == [1, 0, 0, 0] and loaded.decode([1, *ids, 1]) == "one one"
    loaded.save(tmp_path / "run.json")
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "run.json")).token_to_id("<end>") == ids[0]


def test_a_text_on_which_the_library_panics_is_a_line(bpe):
    description = json.loads(bpe.to_json())
    description["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    loaded = tokenizer.from_json(json.dumps(description))
    for encode in (loaded.encode, lambda text: loaded.encode_batch(["a", text])):
        with pytest.raises(UserError, match="cannot read a text: .*retry-limit"):
            encode("a" * 40 + "!")


def test_a_tokenizer_that_leaves_characters_out_is_said(bpe, tmp_path):
    vocab = {"a": 0, "b": 1, "</s>": 2}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    lines = []
    assert data.load_tokenizer(tmp_path, lines.append).encode("aéb") == [0, 1]
    assert len(lines) == 1 and "is left out of a text" in lines[0]
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab | {"?": 3}, merges=[], unk_token="?"))
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "bpe").mkdir()
    bpe.save(tmp_path / "bpe" / "tokenizer.json")
    lines.clear()
    assert data.load_tokenizer(tmp_path, lines.append).encode("aéb") == [0, 3, 1]
    data.load_tokenizer(tmp_path / "bpe", lines.append)
    assert lines == []
