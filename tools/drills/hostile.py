"""Files made to do harm, and files damaged by chance: by format, as names and bytes."""

import base64
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np


def damaged(content: bytes, seed: int) -> bytes:
    """A file with some of its bytes changed, left out, doubled or cut off."""
    draw = random.Random(seed)
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = draw.randrange(len(changed) + 1)
        length = draw.choice((1, 1, 4, 64))
        match draw.randrange(5):
            case 0:
                changed[place : place + 1] = draw.randbytes(1)
            case 1:
                del changed[place : place + length]
            case 2:
                changed[place:place] = changed[place : place + length] * draw.choice((1, 3))
            case 3:
                changed[place : place + length] = draw.choice((b"\0", b"\xff")) * length
            case 4 if draw.random() < 0.3:
                del changed[place:]
    return bytes(changed)


ODD_VALUES: Final = (
    None, True, 0, -1, 1, 7, 2**31, 2**32 - 1, 2**53, 2**63, 10**18, 10**30, -(10**18), 0.5, -1e308, "", "a", "é" * 40, "\0",
    "\ud800", [], [[]], [1, 2], {}, {"": 0}, {"type": "Sequence"}, ["a", 1], "a b",
)  # fmt: skip


def odd_json(value: Any, seed: int) -> str:
    """A JSON document with one of its values replaced by an odd one, taken away, or put elsewhere."""
    draw = random.Random(seed)
    value = json.loads(json.dumps(value))
    places = list(_places(value))
    for _ in range(draw.choice((1, 1, 2, 3))):
        container, key = draw.choice(places)
        if draw.random() < 0.15 and isinstance(container, dict):
            container.pop(key, None)
        elif draw.random() < 0.2:
            other, name = draw.choice(places)
            if (name in other) if isinstance(other, dict) else name < len(other):
                _put(container, key, json.loads(json.dumps(other[name])))
        else:
            _put(container, key, draw.choice(ODD_VALUES))
    return json.dumps(value)


def _put(container: Any, key: Any, value: Any) -> None:
    if isinstance(container, dict) or key < len(container):
        container[key] = value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(min(len(value), 40)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def json_files() -> dict[str, bytes]:
    deep = 100_000
    return {
        "nothing": b"", "not_utf8": b'{"a": "\xff"}', "cut_off": b'{"a": [1, 2',
        "deep_lists": b"[" * deep + b"]" * deep,
        "deep_objects": b'{"a":' * deep + b"1" + b"}" * deep, "unclosed": b"[" * deep,
        "digits": b'{"a": ' + b"9" * 5000 + b"}",
        "many_digits": b"1" * 100, "nan": b"[NaN]", "infinity": b"[-Infinity]", "overflow": b"[1e999]",
        "negative_overflow": b"[-1e999]",
        "twice": b'{"a": 1, "a": 2}', "two_documents": b"{} {}", "comment": b"{} // x",
        "many": b"[" + b"0," * 5_000_000 + b"0]",
        "an_open_string_of_quotes": b"[" * 65 + b'"' + b'\\"' * 500_000, "ends_in_a_backslash": b"[" * 65 + b'"\\',
        "the_last_of_many_twice": b"{%s}" % b",".join(b'"%060d":0' % (i % 99_999) for i in range(100_000)),
    }  # fmt: skip


def npz(members: dict[str, bytes], **options: Any) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def npy(dtype: str, shape: str, content: bytes = b"") -> bytes:
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


def npz_files() -> dict[str, bytes]:
    good = npz({"a": npy("'<f4'", "(2,)", bytes(8))})
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as archive:
        archive.writestr("a.npy", npy("'<f4'", "(2,)", bytes(8)))
        archive.writestr("b.npy", npy("'<f4'", "(2,)", bytes(8)))
    return {
        "nothing": b"", "text": b"hello", "cut_off": good[:-30],
        "one_name_twice": twice.getvalue().replace(b"b.npy", b"a.npy"),
        "bomb": npz({"a": npy("'<f4'", "(2500000,)", bytes(10_000_000))}, compression=zipfile.ZIP_DEFLATED),
        "shape_of_terabytes": npz({"a": npy("'<f4'", "(1000000000000,)", bytes(8))}),
        "shape_that_overflows": npz({"a": npy("'<f4'", "(4611686018427387904, 4, 2)", bytes(8))}),
        "shape_of_nothing_and_all": npz({"a": npy("'<f4'", "(0, 9000000000000000000)")}),
        "negative_shape": npz({"a": npy("'<f4'", "(-2,)", bytes(8))}),
        "many_axes": npz({"a": npy("'|u1'", "(" + "1, " * 60 + ")", b"0")}),
        "too_short": npz({"a": npy("'<f4'", "(3,)", bytes(8))}),
        "too_long": npz({"a": npy("'<f4'", "(2,)", bytes(12))}),
        "pickle": npz({"a": npy("'|O'", "(1,)", b"cos\nsystem\n(S'true'\ntR.")}),
        "structured": npz({"a": npy("[('x', '<f4')]", "(2,)", bytes(8))}),
        "code": npz({"a": npy("__import__('os')", "(2,)", bytes(8))}),
        "deep_header": npz({"a": npy("(" * 9000, "(2,)", bytes(8))}),
        "no_unicode": npz({"a": npy("'<U1'", "()", b"\xff\xff\xff\x7f")}),
        "no_array": npz({"a": b"PK"}),
        "a_wrong_checksum": good.replace(struct.pack("<I", zlib.crc32(npy("'<f4'", "(2,)", bytes(8)))), b"\1\2\3\4"),
        "itemsize": npz({"a": npy("'<V999999999'", "(1,)", bytes(8))}),
        **{f"no_such_type_{i}": npz({"a": npy(f"'{dtype}'", "(1,)", bytes(3))})
           for i, dtype in enumerate(("<f3", "<i0", "<c7", "<f32", "<U999999999"))},
        **{f"terabytes_of_nothing_{i}": npz({"a": npy(f"'{dtype}'", "(1000000000000,)")})
           for i, dtype in enumerate(("<U0", "|S0", "|V0"))},
        "large_directory": good[:-10] + (1 << 31).to_bytes(4, "little") + good[-6:],
    }  # fmt: skip


def safetensors(header: Any, content: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + content


def tensor(first: int, end: int, shape: Any = None, dtype: Any = "F32") -> dict:
    return {"dtype": dtype, "shape": [(end - first) // 4] if shape is None else shape, "data_offsets": [first, end]}


def safetensors_files() -> dict[str, bytes]:
    return {
        "nothing": b"", "short": b"\0" * 7, "header_beyond_the_end": safetensors({}, length=1 << 40),
        "a_list": safetensors([]),
        "overlap": safetensors({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)),
        "shared": safetensors({"a": tensor(0, 8), "b": tensor(0, 8)}, bytes(8)),
        "hole": safetensors({"a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12)),
        "begins_late": safetensors({"a": tensor(4, 8)}, bytes(8)), "rest": safetensors({"a": tensor(0, 4)}, bytes(8)),
        "beyond": safetensors({"a": tensor(0, 4000)}, bytes(8)),
        "backwards": safetensors({"a": tensor(8, 4, [])}, bytes(8)),
        "negative": safetensors({"a": tensor(-4, 0)}, bytes(8)),
        "negative_shape": safetensors({"a": tensor(0, 4, [-1, -1])}, bytes(4)),
        "huge_shape": safetensors({"a": tensor(0, 4, [2**62, 4])}, bytes(4)),
        "no_bytes": safetensors({"a": tensor(0, 0, [0, 2**63])}),
        "no_bytes_of_an_overflow": safetensors({"a": tensor(0, 0, [2**59, 2**59, 0])}),
        "many_axes": safetensors({"a": tensor(0, 4, [1] * 64)}, bytes(4)),
        "texts": safetensors({"a": tensor(0, 4, ["1"])}, bytes(4)),
        "fractions": safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}}, bytes(4)),
        "true": safetensors({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(4)),
        "dtype": safetensors({"a": tensor(0, 4, dtype="F8_E4M3")}, bytes(4)),
        "dtype_list": safetensors({"a": tensor(0, 4, dtype=[])}, bytes(4)),
        "twice": safetensors(b'{"a":%b,"a":%b}' % ((json.dumps(tensor(0, 4)).encode(),) * 2), bytes(4)),
        "digits": safetensors(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', bytes(4)),
        "more": safetensors({"a": tensor(0, 4) | {"file": "/etc/passwd"}}, bytes(4)),
        "deep": safetensors(b"[" * 100_000),
        "not_utf8": safetensors(b'{"\xff": 1}'),
    }  # fmt: skip


def yaml_files() -> dict[str, bytes]:
    laughs = b"".join(b"- &x%d [%b]\n" % (i, b", ".join([b"*x%d" % (i - 1)] * 9) if i else b"lol") for i in range(9))
    return {
        "nothing": b"", "a_mapping": b"a: b\n", "a_number": b"- a\n- 5\n", "laughs": laughs,
        "merge": b"- &a {b: 1}\n- {<<: *a}\n",
        "code": b"- !!python/object/apply:os.system ['true']\n", "name": b"- !!python/name:os.system\n",
        "binary": b"- !!binary aGVsbG8=\n",
        "deep": b"- " * 300 + b"x\n", "deep_flow": b"[" * 1000, "digits": b"- " + b"9" * 5000 + b"\n",
        "date": b"- 2001-02-30\n",
        "set": b"- !!set {a}\n", "two": b"- a\n---\n- b\n", "not_utf8": b"- \xff\xfe\n", "control": b"- \x01\n",
        "tab": b"\t- a\n",
        "nul": b"- \0\n", "unknown_alias": b"- *a\n", "infinity": b"- .inf\n", "truth": b"- yes\n", "null": b"- ~\n",
    }  # fmt: skip


def tokenizer(model: dict | None = None, **parts: Any) -> dict:
    """The description of a byte-pair encoding of three tokens."""
    small = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None, "decoder": None, "model": small | (model or {}),
    } | parts  # fmt: skip


def replace(pattern: dict, content: str, times: int = 1) -> dict:
    return {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": pattern, "content": content}] * times}


def added(number: int, content: str) -> dict:
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    return {"id": number, "content": content, "special": True} | dict.fromkeys(flags, False)


def template(ids: list[int]) -> dict:
    """What puts tokens of these ids before a text."""
    sequences = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, sequences[0]], "pair": sequences,
        "special_tokens": {"<s>": {"id": "<s>", "ids": ids, "tokens": ["<s>"] * len(ids)}},
    }  # fmt: skip


def tokenizer_files() -> dict[str, bytes]:
    charsmaps = (
        b"",
        b"AAAA",
        base64.b64encode(b"\xff" * 8),
        base64.b64encode((1 << 30).to_bytes(4, "little") + bytes(16)),
        b"!!",
    )
    described = {
        "doubled_until_memory_ends": tokenizer(normalizer=replace({"String": "a"}, "aa", 40)),
        "doubled_by_an_expression": tokenizer(normalizer=replace({"Regex": "a"}, "aa", 40)),
        "decoder_doubles": tokenizer(
            decoder={"type": "Sequence", "decoders": replace({"String": "a"}, "aaaa", 20)["normalizers"]}
        ),
        "an_empty_pattern": tokenizer(normalizer=replace({"String": ""}, "a" * 200)),
        "prepended": tokenizer(normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 99}] * 9}),
        "an_id_of_billions": tokenizer({"vocab": {"a": 4_000_000_000, "b": 1}, "merges": []}),
        "an_added_id_of_billions": tokenizer(added_tokens=[{
            "id": 4_000_000_000, "content": "<x>", "special": True, "single_word": False, "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }]),
        "an_id_that_is_none": tokenizer({"vocab": {"a": -1}, "merges": []}),
        "a_long_prefix": tokenizer({"continuing_subword_prefix": "#" * 11}),
        "a_prefix_inside_a_character": tokenizer(
            {"continuing_subword_prefix": "abc", "vocab": {"a": 0, "é": 1, "aé": 2}, "merges": [["a", "é"]]}
        ),
        "an_unknown_merge": tokenizer({"merges": [["q", "z"]]}), "dropout": tokenizer({"dropout": 5.0}),
        "an_unknown_token": tokenizer({"unk_token": "zz"}), "a_large_cache": tokenizer({"cache_capacity": 10**18}),
        "strip_more_than_there_is": tokenizer(decoder={"type": "Strip", "content": "a", "start": 10**18, "stop": 10**18}),
        "strip_of_an_empty_text": tokenizer(decoder={"type": "Sequence", "decoders": [
            {"type": "Fuse"}, {"type": "Strip", "content": "a", "start": 0, "stop": 1},
        ]}),
        "strip_from_both_ends": tokenizer(decoder={"type": "Strip", "content": "a", "start": 1, "stop": 1}),
        "pieces_of_no_length": tokenizer(pre_tokenizer={"type": "FixedLength", "length": 0}),
        "counted_repeats": tokenizer(normalizer=replace({"Regex": "(((a{1,1000}){1,1000}){1,1000}){1,1000}"}, "c")),
        "many_groups": tokenizer(normalizer=replace({"Regex": "(" * 1500 + ")" * 1500}, "c")),
        "unigram_of_nothing": tokenizer() | {"model": {"type": "Unigram", "unk_id": None, "vocab": []}},
        "unigram_without_unknown": tokenizer() | {"model": {"type": "Unigram", "unk_id": 7, "vocab": [["a", -1.0]]}},
        "words_without_unknown": tokenizer() | {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "x"}},
        "words_that_take_hours": tokenizer() | {"model": {
            "type": "WordPiece", "vocab": {"[UNK]": 0, "a": 1, "##a": 2}, "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 1 << 20,
        }},
        "an_added_token_with_a_word_s_id": tokenizer(added_tokens=[added(0, "<x>")]),
        "two_added_tokens_with_one_id": tokenizer(added_tokens=[added(3, "<x>"), added(3, "<y>")]),
        "a_beginning_that_is_no_token": tokenizer(post_processor=template([4_000_000])),
        "a_beginning_of_thousands": tokenizer(added_tokens=[added(3, "<s>")], post_processor=template([3] * 5000)),
        "no_model": {}, "a_list": [], "another_model": tokenizer() | {"model": {"type": "Magic"}},
        "another_part": tokenizer(normalizer={"type": "Magic"}), "a_part_of_text": tokenizer(decoder="ByteLevel"),
        **{f"a_table_cut_off_{i}": tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": table.decode()})
           for i, table in enumerate(charsmaps)},
    }  # fmt: skip
    for depth in (10, 60):
        nested: Any = {"type": "NFC"}
        for _ in range(depth):
            nested = {"type": "Sequence", "normalizers": [nested, nested] if depth == 10 else [nested]}
        described[f"nested_{depth}"] = tokenizer(normalizer=nested)
    files = {name: json.dumps(each).encode() for name, each in described.items()}
    deep = b'{"type":"Sequence","normalizers":[' * 5000 + b'{"type":"NFC"}' + b"]}" * 5000
    return files | {"nested_5000": json.dumps(tokenizer()).encode().replace(b'"normalizer": null', b'"normalizer": ' + deep)}


HOSTILE: Final[dict[str, Callable[[], dict[str, bytes]]]] = {
    "json": json_files, "npz": npz_files, "safetensors": safetensors_files, "yaml": yaml_files, "tokenizer": tokenizer_files,
}  # fmt: skip


def good_files() -> dict[str, bytes]:
    """One of each format that is read, to be damaged."""
    arrays = io.BytesIO()
    np.savez(arrays, a=np.arange(12, dtype="<i4").reshape(3, 4), text=np.asarray("hello"), none=np.zeros((0, 3), "<f4"))
    return {
        "json": json.dumps({"a": [1, 2.5, "é"], "b": {"c": None}, "d": [True] * 5}, indent=1).encode(),
        "npz": arrays.getvalue(),
        "safetensors": safetensors({"__metadata__": {}, "a": tensor(0, 8), "b": tensor(8, 16, [2, 1])}, bytes(range(16))),
        "yaml": b"- Once upon a time\n- 'a \"quoted\" one'\n- |\n  two\n  lines\n",
        "tokenizer": json.dumps(tokenizer(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                                                         "use_regex": True}, decoder={"type": "Fuse"})).encode(),
    }  # fmt: skip
