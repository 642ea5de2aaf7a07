"""What a trained run makes of the validation text, document by document, and the two halves of it.

The even-numbered documents choose the learning rate; the odd-numbered ones are what is reported. So a rate that suits one text
by luck is not paid back in the same text.
"""

import dataclasses
import functools
import zipfile
from pathlib import Path
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from seqmodels import model
from seqmodels.data import ValidationSet, atomic
from seqmodels.evaluation import recall
from seqmodels.run import Run
from seqmodels.training.loss import token_losses

FILE_NAME: Final = "scores.npz"


@dataclasses.dataclass(frozen=True)
class Scores:
    """Sums over each document's tokens that were scored, in float64, and over each window position of the reported half."""

    loss: Float[np.ndarray, "documents"]  # nats
    tokens: Float[np.ndarray, "documents"]
    bytes: Float[np.ndarray, "documents"]  # of text that the tokens stand for
    hit_loss: Float[np.ndarray, "documents"]  # nats, of the targets that the same window and story hold the answer to
    hit_tokens: Float[np.ndarray, "documents"]
    position_loss: Float[np.ndarray, "T"]  # nats, reported documents
    position_tokens: Float[np.ndarray, "T"]
    validation_tokens: int  # what was asked for; 0: all

    @property
    def reported(self) -> Bool[np.ndarray, "documents"]:
        """The odd-numbered documents."""
        return np.arange(len(self.loss)) % 2 == 1

    def mean(self, name: str, documents: Bool[np.ndarray, "documents"]) -> float:
        """Nats per token over some documents: `loss`, `hit_loss`, or `rest_loss` of what is no hit; nan of nothing."""
        loss = self.loss - self.hit_loss if name == "rest_loss" else getattr(self, name)
        tokens = {"loss": self.tokens, "hit_loss": self.hit_tokens, "rest_loss": self.tokens - self.hit_tokens}[name]
        counted = tokens[documents].sum()
        return float(loss[documents].sum() / counted) if counted else float("nan")

    def by_position(self) -> Float[np.ndarray, "T"]:
        """Nats per token after so many tokens of the window; nan where nothing was scored."""
        with np.errstate(invalid="ignore"):
            return self.position_loss / np.where(self.position_tokens > 0, self.position_tokens, np.nan)


def score(run: Run, validation_tokens: int = 0) -> Scores:
    """Score a run on its own validation text, in windows of the training length, as eval.py does.

    Args:
        validation_tokens: only so many of the first tokens; 0: all.
    """
    validation, of = run.validation(), run.config.data
    limit = validation_tokens or None
    places, inputs, targets, losses, text_bytes = [], [], [], [], []
    in_flight, size = None, of.batch_size * of.seq_len
    for index, batch in enumerate(validation.batches(of.batch_size, of.seq_len, limit)):
        counted = batch["weights"] > 0
        places.append(index * size + np.flatnonzero(counted))
        inputs.append(batch["inputs"][counted])
        targets.append(batch["targets"][counted])
        text_bytes.append(batch["bytes"][counted])
        if in_flight is not None:
            losses.append(np.asarray(in_flight[0])[in_flight[1]])
        on_device = run.setup.put({name: array for name, array in batch.items() if name != "bytes"})
        in_flight = _losses(run.setup.graphdef, run.params, on_device), counted
    losses.append(np.asarray(in_flight[0])[in_flight[1]])
    places, inputs, targets, losses, text_bytes = map(np.concatenate, (places, inputs, targets, losses, text_bytes))
    losses = losses.astype(np.float64)

    documents = document_of(validation, places)
    windows = places // of.seq_len
    hits = recall.hits(inputs, targets, documents * (windows[-1] + 1) + windows)
    by_document = functools.partial(np.bincount, documents, minlength=documents[-1] + 1)
    reported = documents % 2 == 1
    positions = places % of.seq_len
    return Scores(
        loss=by_document(losses),
        tokens=by_document().astype(np.float64),
        bytes=by_document(text_bytes),
        hit_loss=by_document(losses * hits),
        hit_tokens=by_document(hits.astype(np.float64)),
        position_loss=np.bincount(positions[reported], losses[reported], minlength=of.seq_len),
        position_tokens=np.bincount(positions[reported], minlength=of.seq_len).astype(np.float64),
        validation_tokens=validation_tokens,
    )


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
        with np.load(folder / FILE_NAME, allow_pickle=False) as saved:
            fields = {field.name: saved[field.name] for field in dataclasses.fields(Scores)}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    found = Scores(**(fields | {"validation_tokens": int(fields["validation_tokens"])}))
    return found if found.validation_tokens == validation_tokens else None


@functools.partial(jax.jit, static_argnums=0)
def _losses(graphdef, params, batch) -> Float[jax.Array, "B T"]:
    network = model.merge(graphdef, params)
    hidden, _ = network.features(batch["inputs"], reset=batch.get("reset"))
    return token_losses(
        hidden, network.head_kernel(), batch["targets"], logit_cap=network.config.logit_cap
    ).astype(jnp.float32)
