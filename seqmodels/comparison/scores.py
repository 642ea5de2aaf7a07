"""What a trained run makes of its held-out data, document by document (of a task: example by example), and the two halves of it.

The even-numbered documents choose the learning rate; the odd-numbered ones are what is reported. So a rate that suits one text
by luck is not paid back in the same text.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from seqmodels import model
from seqmodels.comparison import recall
from seqmodels.data import HeldOut, ValidationSet, atomic
from seqmodels.formats import npz
from seqmodels.run import Run
from seqmodels.training.loss import token_losses, token_losses_and_correct

FILE_NAME: Final = "scores.npz"


@dataclasses.dataclass(frozen=True)
class Scores:
    """Sums over each document's tokens that were scored, in float64, and over each window position of the reported half.

    A synthetic task's documents are its test examples, its tokens their labels.
    """

    loss: Float[np.ndarray, " documents"]  # nats
    tokens: Float[np.ndarray, " documents"]
    bytes: Float[np.ndarray, " documents"]  # of text that the tokens stand for
    # nats, of the targets that the same window and story hold the answer to, and that are rare in training (comparison.recall)
    hit_loss: Float[np.ndarray, " documents"]
    hit_tokens: Float[np.ndarray, " documents"]
    errors: Float[np.ndarray, " documents"]  # labels that are not the model's top-1 prediction; of text 0
    segment: Int[np.ndarray, " documents"]  # which of the segments an example is of; of text 0
    segment_names: tuple[str, ...]  # of the task's test; of text ()
    segment_lengths: tuple[int, ...]  # tokens of an example
    position_loss: Float[np.ndarray, " T"]  # nats, reported documents; of a task empty
    position_tokens: Float[np.ndarray, " T"]
    validation_tokens: int  # what was asked for; 0: all
    frequent_pairs: int  # how many pairs of tokens do not count as repeated, being frequent in training

    @property
    def measure(self) -> str:
        """What mixers are ranked by, and learning rates: the loss of text, the share of a task's labels that are wrong."""
        return "errors" if self.segment_names else "loss"

    @property
    def reported(self) -> Bool[np.ndarray, " documents"]:
        """The odd-numbered documents."""
        return np.arange(len(self.loss)) % 2 == 1

    def sums(
        self, name: str, documents: Bool[np.ndarray, " documents"]
    ) -> tuple[Float[np.ndarray, " chosen"], Float[np.ndarray, " chosen"]]:
        """Of some documents: a quantity, and the tokens it is summed over, such that sum / sum is the mean.

        The segments of a test count alike, whatever they hold, as in evaluation.accuracy: a document weighs the more, the
        fewer tokens there are in its segment.

        Args:
            name: `loss`, `errors`, `hit_loss`, or `rest_loss` of all other tokens.
        """
        values, tokens = {
            "loss": (self.loss, self.tokens),
            "errors": (self.errors, self.tokens),
            "hit_loss": (self.hit_loss, self.hit_tokens),
            "rest_loss": (self.loss - self.hit_loss, self.tokens - self.hit_tokens),
        }[name]
        values, tokens, segment = values[documents], tokens[documents], self.segment[documents]
        held = np.bincount(segment, tokens)
        weights = tokens.sum() / np.count_nonzero(held) / np.where(held > 0, held, np.inf) if held.any() else held
        return values * weights[segment], tokens * weights[segment]

    def mean(self, name: str, documents: Bool[np.ndarray, " documents"]) -> float:
        """The mean of a quantity (see `sums`) per token over some documents; nan of nothing."""
        values, tokens = self.sums(name, documents)
        return float(values.sum() / tokens.sum()) if tokens.any() else float("nan")

    def by_position(self) -> Float[np.ndarray, " T"]:
        """Nats per token after so many tokens of the window; nan where nothing was scored."""
        with np.errstate(invalid="ignore"):
            return self.position_loss / np.where(self.position_tokens > 0, self.position_tokens, np.nan)

    def accuracy_by_segment(self) -> list[float]:
        """Top-1 accuracy of each segment's labels, in reported examples; nan of no label."""
        segments = range(len(self.segment_names))
        return [1.0 - self.mean("errors", self.reported & (self.segment == index)) for index in segments]


def score(run: Run, validation_tokens: int = 0, frequent_pairs: Integer[np.ndarray, "pairs 2"] | None = None) -> Scores:
    """Score a run on its own validation data as eval.py does: text in windows of the training length, a task's examples.

    Args:
        validation_tokens: only so many of the first tokens; 0: all. Of a task, about so many.
        frequent_pairs: of the training split (`recall.frequent_pairs`), which do not count as repeated.
    """
    validation, limit = run.validation(), validation_tokens or None
    if isinstance(validation, HeldOut):
        scored = _score_task(run, validation, limit)
    else:
        scored = _score_text(run, validation, limit, frequent_pairs)
    left_out = 0 if frequent_pairs is None else len(frequent_pairs)
    return Scores(**scored, validation_tokens=validation_tokens, frequent_pairs=left_out)


def _score_text(
    run: Run, validation: ValidationSet, limit: int | None, frequent_pairs: Integer[np.ndarray, "pairs 2"] | None
) -> dict:
    of = run.config.data
    places, inputs, targets, losses, text_bytes = [], [], [], [], []
    size = of.batch_size * of.seq_len
    for index, done in enumerate(_scored(run, validation.batches(of.batch_size, of.seq_len, limit))):
        places.append(index * size + np.flatnonzero(done.counted))
        inputs.append(done.batch["inputs"][done.counted])
        targets.append(done.batch["targets"][done.counted])
        text_bytes.append(done.batch["bytes"][done.counted])
        losses.append(done.losses[done.counted])
    places, inputs, targets, losses, text_bytes = map(np.concatenate, (places, inputs, targets, losses, text_bytes))

    documents = document_of(validation, places)
    windows = places // of.seq_len
    repeated = recall.is_repeated_bigram(inputs, targets, documents * (windows[-1] + 1) + windows, frequent_pairs)
    by_document = functools.partial(np.bincount, documents, minlength=documents[-1] + 1)
    reported = documents % 2 == 1
    positions = places % of.seq_len
    count = documents[-1] + 1
    return {
        "loss": by_document(losses),
        "tokens": by_document().astype(np.float64),
        "bytes": by_document(text_bytes),
        "hit_loss": by_document(losses * repeated),
        "hit_tokens": by_document(repeated.astype(np.float64)),
        "errors": np.zeros(count),
        "segment": np.zeros(count, np.int64),
        "segment_names": (),
        "segment_lengths": (),
        "position_loss": np.bincount(positions[reported], losses[reported], minlength=of.seq_len),
        "position_tokens": np.bincount(positions[reported], minlength=of.seq_len).astype(np.float64),
    }


def _score_task(run: Run, test: HeldOut, limit: int | None) -> dict:
    share = None if limit is None else limit // len(test.segments)
    loss, tokens, errors, segment = [], [], [], []
    for index, held_out in enumerate(test.segments.values()):
        length = held_out.segment.length
        for done in _scored(run, held_out.batches(run.trainer.batch_size_for(length), length, share)):
            examples = done.counted.any(axis=1)
            loss.append(np.where(done.counted, done.losses, 0.0).sum(axis=1)[examples])
            tokens.append(done.counted.sum(axis=1).astype(np.float64)[examples])
            errors.append((done.counted & ~done.correct).sum(axis=1).astype(np.float64)[examples])
            segment.append(np.full(np.count_nonzero(examples), index))
    loss, tokens, errors, segment = map(np.concatenate, (loss, tokens, errors, segment))
    nothing = np.zeros(len(loss))
    return {
        "loss": loss, "tokens": tokens, "errors": errors, "segment": segment,
        "bytes": nothing, "hit_loss": nothing, "hit_tokens": nothing,
        "segment_names": tuple(test.segments),
        "segment_lengths": tuple(held_out.segment.length for held_out in test.segments.values()),
        "position_loss": np.zeros(0), "position_tokens": np.zeros(0),
    }  # fmt: skip


class _Done(NamedTuple):
    """A batch, and what the model makes of it."""

    batch: dict[str, np.ndarray]
    counted: Bool[np.ndarray, "B T"]
    losses: Float[np.ndarray, "B T"]  # nats
    correct: Bool[np.ndarray, "B T"] | None  # the target has the largest logit; of text None


def _scored(run: Run, batches: Iterable[dict[str, np.ndarray]]) -> Iterator[_Done]:
    """Each batch with its losses, while the next one is on its way."""

    labelled = run.config.data.synthetic_task is not None

    def done(batch, losses, correct=None):
        return _Done(
            batch, batch["weights"] > 0, np.asarray(losses, np.float64), correct if correct is None else np.asarray(correct)
        )

    in_flight = None
    for batch in batches:
        on_device = run.trainer.put({name: array for name, array in batch.items() if name != "bytes"})
        begun = batch, *_losses(run.trainer.graphdef, run.params, on_device, labelled)
        if in_flight is not None:
            yield done(*in_flight)
        in_flight = begun
    if in_flight is not None:
        yield done(*in_flight)


def document_of(validation: ValidationSet, places: np.ndarray) -> np.ndarray:
    """The number of the document that each target belongs to."""
    return np.searchsorted(np.asarray(validation.document_ends), places, side="right")


def save(scores: Scores, folder: Path) -> None:
    """Write them into the run's folder, whole or not at all."""
    values = {name: np.asarray(value) for name, value in vars(scores).items()}
    atomic.write_whole(folder / FILE_NAME, lambda file: np.savez(file, **values))


def load(folder: Path, validation_tokens: int) -> Scores | None:
    """The scores in a run's folder; None if there are none, of other tokens, or a damaged file."""
    try:
        saved = npz.read(folder / FILE_NAME)
        fields = {field.name: saved[field.name] for field in dataclasses.fields(Scores)}
        plain = {
            "segment_names": tuple(map(str, fields["segment_names"])),
            "segment_lengths": tuple(map(int, fields["segment_lengths"])),
            "validation_tokens": int(fields["validation_tokens"]),
            "frequent_pairs": int(fields["frequent_pairs"]),
        }
        _check(fields)
    except (FileNotFoundError, npz.Malformed, KeyError, ValueError, TypeError):
        return None
    found = Scores(**(fields | plain))
    return found if found.validation_tokens == validation_tokens else None


def _check(fields: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError where arrays are not as `save` writes them."""
    documents = ("loss", "tokens", "bytes", "hit_loss", "hit_tokens", "errors", "segment")
    for names in (documents, ("position_loss", "position_tokens")):
        count = len(fields[names[0]])
        for name in names:
            if fields[name].shape != (count,) or fields[name].dtype.kind not in ("iu" if name == "segment" else "iuf"):
                raise ValueError(f"{name} is {fields[name].dtype} of shape {fields[name].shape}")
    segments = max(1, len(fields["segment_names"]))
    if not len(fields["loss"]) or not 0 <= fields["segment"].min() <= fields["segment"].max() < segments:
        raise ValueError("segment has other numbers than there are segments")


@functools.partial(jax.jit, static_argnums=(0, 3))
def _losses(graphdef, params, batch, labelled: bool) -> tuple[jax.Array, ...]:
    """Losses [B, T] in nats and, if labelled, correct [B, T]."""
    network = model.merge(graphdef, params)
    hidden, _ = network.features(batch["inputs"], reset=batch.get("reset"))
    arguments = hidden, network.head_kernel(), batch["targets"]
    if labelled:
        return token_losses_and_correct(*arguments, logit_cap=network.config.logit_cap)
    return (token_losses(*arguments, logit_cap=network.config.logit_cap),)
