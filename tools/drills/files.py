"""Files: made to do harm, and damaged by chance, those of a run folder, of its checkpoints and of the token cache."""

import contextlib
import dataclasses
import io
import json
import random
import resource
import shutil
from pathlib import Path

import numpy as np

import train
from seqmodels import config as config_lib
from seqmodels import data
from seqmodels.data.text import tokenizer as tokenizers
from seqmodels.errors import UserError
from seqmodels.formats import json_text, limits, npz, tokenizer_json, yaml_texts
from seqmodels.interop import safetensors
from tools.drills import hostile
from tools.drills.interruptions import reference
from tools.drills.trials import Count, Place, in_child

STEPS_OF_AN_EPOCH = 3000  # of 300 built-in stories, in batches of 2 x 16 bytes


def use_tokenizer(path: Path) -> str:
    """Reading is not all: what was read is used."""
    loaded = tokenizers.from_json(limits.read_text(path, tokenizer_json.MOST_BYTES))
    for text in ("ab aé ba\n", "a" * 100, ""):
        loaded.decode(loaded.encode(text))
    loaded.encode_batch(["ab a", "bé"])
    return loaded.to_json()


def use_tensors(path: Path) -> dict[str, float]:
    return {name: float(np.sum(tensor.astype(np.float32))) for name, tensor in safetensors.read(path).items()}


READERS = {
    "json": json_text.read, "npz": npz.read, "safetensors": use_tensors, "yaml": yaml_texts.read, "tokenizer": use_tokenizer,
}  # fmt: skip


def hostile_files(place: Place) -> Count:
    """Files made to do harm, and good ones with changed bytes and odd values: one line, or read; no other error, no abort."""
    count, path = Count(), place.new("hostile") / "file"
    trials = [(kind, name, content) for kind, files in hostile.HOSTILE.items() for name, content in files().items()]
    for kind, good in hostile.good_files().items():
        for seed in range(place.some(40, 1000)):
            content = hostile.damaged(good, seed)
            if kind in ("json", "tokenizer") and seed % 2:
                content = hostile.odd_json(json.loads(good), seed).encode("utf-8", "surrogatepass")
            trials.append((kind, f"seed {seed}", content))

    def read_all(begin: int) -> None:
        for number in range(begin, len(trials)):
            kind, _, content = trials[number]
            path.write_bytes(content)
            print(number, flush=True)
            try:
                READERS[kind](path)
            except UserError as error:
                assert "\n" not in str(error), error

    begin = 0
    while begin < len(trials):  # an abort ends the child, and the next one goes on behind the file that did it
        ended = in_child(lambda begin=begin: read_all(begin), limit=(resource.RLIMIT_AS, 4 << 30), seconds=3600)
        done = int(ended.out.split()[-1]) + 1 if ended.out.split() else len(trials)
        count.tried += done - begin - (ended.code != 0)
        if ended.code != 0:
            kind, name, _ = trials[done - 1]
            count.record(False, f"{kind}: {name}: exit status {ended.code}: {ended.err[-200:]}")
        begin = done
    return count


def damaged_runs(place: Place) -> Count:
    """A changed byte, or a cut, in any file of a run folder: what is read of it is what was written, or the damage is said."""
    reference(place)
    count, trials = Count(), place.some(40, 400)
    seeds = [place.draw.randrange(1 << 30) for _ in range(trials)]

    def try_all() -> None:
        whole = read_run(place.folder / "reference")
        for seed in seeds:
            draw, copy = random.Random(seed), place.new("damaged") / "run"
            shutil.copytree(place.folder / "reference", copy)
            path = draw.choice([path for path in sorted(copy.rglob("*")) if path.is_file() and path.stat().st_size])
            what = damage(path, draw)
            name = str(path.relative_to(copy))
            try:
                found = read_run(copy)
                said = bool(found.pop("said")) or found == {key: value for key, value in whole.items() if key != "said"}
                print(json.dumps([said, f"{name}, {what}: read as something else, silently"]), flush=True)
            except UserError:
                print(json.dumps([True, ""]), flush=True)
            except Exception as error:
                print(json.dumps([False, f"{name}, {what}: {type(error).__name__}: {error}"]), flush=True)
            shutil.rmtree(copy.parent)

    ended = in_child(try_all, seconds=3600)
    for line in ended.out.splitlines():
        count.record(*json.loads(line))
    if ended.code != 0:
        count.record(False, f"exit status {ended.code}: {ended.err[-200:]}")
    return count


def damage(path: Path, draw) -> str:
    """Change one byte of a file, or cut it off."""
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    if draw.random() < 0.2:
        path.write_bytes(content[:at])
        return f"cut off at byte {at} of {len(content)}"
    content[at] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return f"a bit of byte {at} of {len(content)}"


def read_run(run: Path) -> dict:
    """All that a run folder holds, as its readers give it, and what they say of damage on the way."""
    from seqmodels.run import load_run

    said: list[str] = []
    opened = load_run(run, report=said.append)
    validation = data.load_validation(run, opened.trainer.vocab_size)
    return {
        "config": config_lib.to_dict(opened.config), "params": opened.fingerprint, "step": opened.step,
        "tokenizer": opened.tokenizer.to_json(), "said": said,
        "validation": {name: np.asarray(value).tolist() for name, value in vars(validation).items()},
    }  # fmt: skip


def damaged_token_caches(place: Place) -> Count:
    """A changed byte, or a cut, in any file of the token cache: the tokens of an undisturbed run, or an error in one line."""
    config, _ = train.parse(place.flags(place.folder / "none", data__toy_documents=300))

    def tokens(cache: Path) -> list[list[int]]:
        dataset = data.prepare(dataclasses.replace(config.data, cache_dir=str(cache)), seed=0)
        # Every batch of an epoch: all of the tokens are read.
        batches = [dataset.train_batch(step)["inputs"].tolist() for step in range(STEPS_OF_AN_EPOCH)]
        return [np.asarray(dataset.validation.tokens).tolist(), batches]

    count, whole = Count(), place.new("whole")
    expected = tokens(whole)
    for _ in range(place.some(30, 300)):
        cache = place.new("damaged") / "cache"
        shutil.copytree(whole, cache)
        paths = [path for path in sorted(cache.rglob("*")) if path.is_file() and path.stat().st_size]
        path = place.draw.choice(paths)
        what = f"{path.name}, {damage(path, place.draw)}"
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                count.record(tokens(cache) == expected, f"{what}: other tokens, silently")
        except UserError:
            count.record(True, "")
        except Exception as error:
            count.record(False, f"{what}: {type(error).__name__}: {error}")
        shutil.rmtree(cache.parent)
    return count
