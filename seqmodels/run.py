"""A finished or running run, opened from its folder alone: scores, logits, text."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from seqmodels import config as config_lib
from seqmodels import data, device_memory, model, object_store, ops, ranges, xla_cpu
from seqmodels.config import DEFAULT_CACHE_DIR, MeshConfig, RunConfig
from seqmodels.data import atomic
from seqmodels.data.text import hub
from seqmodels.data.text.incremental import IncrementalText
from seqmodels.decoding import generate, session
from seqmodels.decoding.sampling import Sampler, Sampling
from seqmodels.decoding.session import DecodingState
from seqmodels.errors import UserError
from seqmodels.escape import html_table, say
from seqmodels.evaluation.accuracy import LabelEvaluation
from seqmodels.evaluation.perplexity import Evaluation, state_bytes
from seqmodels.model import LanguageModel
from seqmodels.training import checkpoint, remote_folder
from seqmodels.training.run_folder import known_vocab_size, read_config, read_tokenizer
from seqmodels.training.state import Trainer


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A model out of a run folder, at the step of one checkpoint.

    `config` is the run's own, but for its caches, which are the reader's; `trainer` holds the same model on one device of this
    machine, or those that `load_run` was given.
    """

    workdir: Path
    config: RunConfig
    # None: a synthetic task has none, nor has a checkpoint imported from a folder without one
    tokenizer: data.Tokenizer | None
    step: int
    params: dict
    # of the parameters: a saved state fits only those that made it
    fingerprint: str
    trainer: Trainer
    # of the text that was held out, `ValidationSet.digest`; None where the checkpoint does not say
    held_out_digest: str | None = None

    def __repr__(self) -> str:
        model = self.config.model
        size = f"{self.trainer.num_parameters:,} parameters"
        return f"Run({str(self.workdir)!r}, step {self.step:,}, {model.repeats} x {model.pattern!r}, {size})"

    def _repr_html_(self) -> str:
        of = self.config
        return html_table(str(self.workdir), {
            "step": f"{self.step:,} of {of.train.steps:,}",
            "model": f"{of.model.repeats} x {of.model.pattern}, width {of.model.d_model}",
            "parameters": f"{self.trainer.num_parameters:,}",
            "state": f"{self.state_bytes():,} bytes a sequence at {of.data.seq_len:,} tokens",
            "data": of.data.source if of.data.synthetic_task is None else f"the task {of.data.task}",
            "tokenizer": "none" if self.tokenizer is None else f"{self.tokenizer.name}, {self.tokenizer.vocab_size:,} tokens",
        })  # fmt: skip

    def logits(self, tokens: Int[np.ndarray, "B T"]) -> Float[Array, "B T L"]:
        """Next-token logits after each token, float32, each row read from an empty state.

        Raises:
            ValueError: tokens are not [B, T] integers of the vocabulary.
            UserError: they are more than the device has room for.
        """
        tokens = self._checked(tokens)
        self._check_room(
            4 * tokens.size * self.trainer.vocab_size // self.trainer.mesh.size, f"logits of {tokens.size:,} tokens need"
        )
        split = generate.split_rows(tokens, self._mesh)
        return _logits(self.trainer.graphdef, self.params, split, mesh=self._mesh)[: len(tokens)]

    def attention_weights(self, tokens: str | Int[np.ndarray, "B T"]) -> Float[Array, "layers B H T T"]:
        """How each head of each attention layer spreads over the tokens so far, float32, each row summing to 1.

        Layers are in the order of depth, other mixers' left out; `evaluation.plots.attention_weights` draws it. A text is a batch
        of one.

        Raises:
            ValueError: tokens are not [B, T] integers of the vocabulary.
            UserError: the model has no attention, or the weights are more than the device has room for.
        """
        model.check_attention(self.config.model.pattern)
        batch = self._checked([self.prompt_tokens(tokens)] if isinstance(tokens, str) else tokens)
        weights = _attention_weights.eval_shape(self.trainer.graphdef, self.params, batch)
        self._check_room(
            weights.size * weights.dtype.itemsize, f"the weights of {batch.shape[1]:,} tokens, all pairs of them, need"
        )
        return _attention_weights(self.trainer.graphdef, self.params, batch)

    def _check_room(self, needed: int, wanted: str) -> None:
        device_memory.check(needed, self.trainer.mesh.devices.flatten(), wanted, "take fewer at a time")

    @property
    def _mesh(self) -> Mesh | None:
        """Of the devices, where there are several."""
        return self.trainer.mesh if self.trainer.mesh.size > 1 else None

    def _checked(self, tokens: Int[np.ndarray, "B T"], *, may_be_empty: bool = False) -> Int[np.ndarray, "B T"]:
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens must be integers of shape [B, T], not {tokens.dtype} of shape {tokens.shape}")
        if 0 in tokens.shape[: 1 if may_be_empty else 2]:
            raise ValueError(f"tokens must be at least one row of at least one token, not of shape {tokens.shape}")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.trainer.vocab_size:
            raise ValueError(f"tokens must be in 0..{self.trainer.vocab_size - 1}, the model's vocabulary")
        return tokens.astype(np.int32)

    def model(self) -> LanguageModel:
        """The model with its parameters, to call and look into."""
        return model.merge(self.trainer.graphdef, self.params)

    def generate(self, prompt: str, **options: Any) -> str:
        """The model's continuation of `prompt`, up to the end of the text; options as in `stream`."""
        return self.generate_batch([prompt], **options)[0]

    def stream(
        self,
        prompt: str,
        *,
        after: DecodingState | None = None,
        max_tokens: int = 200,
        seed: int = 0,
        on_token: Callable[[int], None] = lambda token: None,
        **sampling: Any,
    ) -> Iterator[str]:
        """Pieces of the continuation as they come.

        Args:
            after: what was read before the prompt, which may then be empty.
            max_tokens: the continuation has at most so many.
            seed: the same seed gives the same text.
            on_token: called with each token, of which a piece of text may take several; the one that ends the text is the last.
            sampling: temperature, top_k, top_p, min_p, as in `seqmodels.decoding.sampling.Sampling`.
        """
        sampler = self.sampler(seed, **sampling)  # ahead of reading, which compiles
        generate.check_max_tokens(max_tokens)
        state = self.read(prompt, after, extra_capacity=max_tokens)
        tokens = session.stream(self.trainer.graphdef, self.params, state, sampler, max_tokens=max_tokens)
        text = IncrementalText(self.tokenizer, context=state.tokens)

        def pieces():
            for token in tokens:
                on_token(token)
                if piece := text.push(token):
                    yield piece
            yield text.flush()

        return pieces()

    def generate_batch(
        self,
        prompts: list[str],
        *,
        max_tokens: int = 200,
        seed: int = 0,
        first_row: int = 0,
        **sampling: Any,
    ) -> list[str]:
        """The continuation of every prompt, decoded together; options as in `stream`.

        Args:
            first_row: place of the first prompt, where the batch is a part of a longer list.
        """
        if isinstance(prompts, str):  # each of its letters would be a prompt
            raise UserError("prompts are a list of texts; of one text, `generate` is the call")
        prompt_tokens = [self.prompt_tokens(prompt) for prompt in prompts]
        continuations = generate.generate(
            self.trainer.graphdef, self.params, prompt_tokens, self.sampler(seed, first_row, **sampling), max_tokens=max_tokens,
            mesh=self._mesh,
        )  # fmt: skip
        return [self._text(new, after) for new, after in zip(continuations, prompt_tokens)]

    def read(self, text: str | Sequence[int], after: DecodingState | None = None, *, extra_capacity: int = 256) -> DecodingState:
        """The state of the model when it has read a text (or tokens): a value, to go on from as often as you like.

        Args:
            after: what was read before; where there is none, an empty text is the end of the text before.
            extra_capacity: tokens that may come later without reading everything again, where a state has to have room for them.

        Raises:
            UserError: `after` is of another model, or `extra_capacity` is out of range.
        """
        _check_number("extra_capacity", extra_capacity, ranges.CountOrZero)
        if isinstance(text, str):
            text = self.prompt_tokens(text) if after is None else self.text_tokenizer().encode(text)
        tokens = self._checked(np.asarray([text]) if len(text) else np.zeros((1, 0), np.int32), may_be_empty=True)[0]
        self._check_made_here(after)
        return session.read(
            self.trainer.graphdef,
            self.params,
            tokens,
            params_fingerprint=self.fingerprint,
            after=after,
            extra_capacity=extra_capacity,
        )

    def continue_from(
        self, state: DecodingState, *, max_tokens: int = 200, seed: int = 0, **sampling: Any
    ) -> tuple[str, DecodingState]:
        """A text that may follow, up to its end, and the state that has read it, too; options as in `stream`.

        Raises:
            UserError: the state is of another model, or the run has no tokenizer.
        """
        sampler = self.sampler(seed, **sampling)
        self._check_made_here(state)
        tokens, after = session.continue_from(self.trainer.graphdef, self.params, state, sampler, max_tokens=max_tokens)
        return self._text(tokens, state.tokens), after

    def load_state(self, path: str | Path) -> DecodingState:
        """What `state.save(path)` wrote.

        Raises:
            UserError: there is no such file, it is damaged, or is of another model.
        """
        return session.load(path, self.trainer.graphdef, self.params, params_fingerprint=self.fingerprint)

    def sampler(self, seed: int = 0, first_row: int = 0, **sampling: Any) -> Sampler:
        """What draws tokens of the run's tokenizer, ids without a token never; `sampling` as in `stream`.

        Raises:
            UserError: an option is out of range, or the run has no tokenizer.
        """
        _check_number("seed", seed, ranges.Seed)
        _check_number("first_row", first_row, ranges.CountOrZero)
        tokenizer = self.text_tokenizer()
        is_token = data.token_mask(tokenizer, self.trainer.vocab_size)
        return Sampler(Sampling(**sampling), jax.random.key(seed), tokenizer.ends, is_token, first_row)

    def _check_made_here(self, state: DecodingState | None) -> None:
        if state is not None and state.params_fingerprint != self.fingerprint:
            raise UserError(f"this state is of other parameters than those of {self.workdir}, step {self.step}")

    def _text(self, tokens: Sequence[int], after: Sequence[int]) -> str:
        """Tokens as text, in the place where they stand."""
        text = IncrementalText(self.tokenizer, context=after)
        return "".join([*map(text.push, tokens), text.flush()])

    def prompt_tokens(self, prompt: str) -> list[int]:
        """A prompt as the model reads it; an empty one is at least the end of the text before.

        Raises:
            UserError: it is no text, or the run has no tokenizer.
        """
        if not isinstance(prompt, str):
            raise UserError(f"a prompt is a text (str), not {type(prompt).__name__}")
        return data.prompt_tokens(self.text_tokenizer(), prompt)

    def text_tokenizer(self) -> data.Tokenizer:
        """The tokenizer.

        Raises:
            UserError: the run has none.
        """
        if self.config.data.synthetic_task is not None:
            raise UserError(f"{self.workdir} is a run on data.task={self.config.data.task}, which has no text")
        if self.tokenizer is None:
            raise UserError(
                f"{self.workdir} has no tokenizer.json, so it reads and writes no text (logits of tokens it has); copy the "
                "one its model was trained with there, and its tokenizer_config.json"
            )
        return self.tokenizer

    def validation(self, source: str | None = None) -> data.ValidationSet | data.HeldOut:
        """The run's own validation tokens, or other text: a path, a hub id or `toy`, by the run's tokenizer.

        Of a run on a synthetic task its test, which its config alone decides.

        Raises:
            UserError: the source cannot be read, or the run folder has no validation tokens (an imported one) or has
                lost them.
        """
        task = self.config.data.synthetic_task
        if task is not None:
            if source is not None:
                raise UserError(f"--data={source}: {self.workdir} is a run on data.task={self.config.data.task}, not on text")
            return data.held_out(task, task.test_segments(self.config.data.seq_len))
        if source is None and self.step == 0 and not (self.workdir / "validation.npz").exists():
            raise UserError(f"{self.workdir} is imported and has no validation tokens; give --data (a path, a hub id, or toy)")
        if source is None:
            validation = data.load_validation(self.workdir, self.trainer.vocab_size)
            if data.is_another(self.held_out_digest, validation.digest):
                say(f"{self.workdir / 'validation.npz'} is not the text that the run held out: it was replaced, or is damaged")
            return validation
        of = self.config.data
        # The folder's record names the revision of its own source; of another it is what configs/base.py has.
        revision = of.revision if source == of.source else hub.TINYSTORIES_REVISION
        return data.validation_from_source(
            source, self.text_tokenizer(), cache_dir=of.cache_dir, revision=revision, packing=of.packing,
            trained_on=data.read_record(self.workdir),
        )  # fmt: skip

    def evaluate(
        self,
        validation: data.ValidationSet | data.HeldOut | None = None,
        *,
        max_tokens: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Evaluation | LabelEvaluation:
        """Score `validation` (default: the run's own), text in windows of the training length.

        Args:
            max_tokens: score only the first so many.
            progress: called with the number of tokens done.

        Raises:
            UserError: as `validation`; `max_tokens` is below 1.
        """
        _check_number("max_tokens", max_tokens, ranges.Count | None)
        validation = self.validation() if validation is None else validation
        return self.trainer.evaluate(self.params, validation, max_tokens=max_tokens, progress=progress)

    def evaluate_lengths(
        self,
        lengths: Sequence[int],
        source: str | data.ValidationSet | data.HeldOut | None = None,
        *,
        max_tokens: int | None = None,
    ) -> dict[int, Evaluation]:
        """How the model fares at other lengths than that of its training.

        Text (`source` as in `validation`, or what that returned) is read in windows of each length, at most `max_tokens` of
        it; of a synthetic task the test has examples of each length, and about `max_tokens` of all are read.

        Raises:
            UserError: as `validation`; a length below 1, that the task does not have, or that is more than the text.
        """
        if not len(lengths):
            raise UserError("lengths are none; give at least one, such as [256]")
        _check_number("max_tokens", max_tokens, ranges.Count | None)
        for length in lengths:
            _check_number("length", length, ranges.Count)
        validation = self.validation(source) if source is None or isinstance(source, str) else source
        if isinstance(validation, data.HeldOut):
            task = self.config.data.synthetic_task
            test = data.held_out(task, tuple(task.segment(length, task.test_examples) for length in lengths))
            scored = self.evaluate(test, max_tokens=max_tokens).segments.values()
        else:
            if max(lengths) > len(validation):
                raise UserError(f"a length of {max(lengths):,} tokens is more than the {len(validation):,} that the text has")
            scored = [self.trainer.evaluate(self.params, validation, seq_len=length, max_tokens=max_tokens) for length in lengths]
        return dict(zip(lengths, scored, strict=True))

    def state_bytes(self, max_len: int | None = None) -> int:
        """Bytes of one sequence's decoding state at a capacity of `max_len` tokens (default: the training length).

        Raises:
            UserError: `max_len` is below 1.
        """
        _check_number("max_len", max_len, ranges.Count | None)
        return state_bytes(self.trainer.graphdef, self.params, self.config.data.seq_len if max_len is None else max_len)


def load_run(
    workdir: str | Path,
    step: int | None = None,
    *,
    cache_dir: str = DEFAULT_CACHE_DIR,
    report: Callable[[str], None] = say,
    devices: int | Sequence[jax.Device] = 1,
    mesh: MeshConfig | None = None,
) -> Run:
    """Open the run folder `workdir` at its newest checkpoint, or at the one of `step`.

    Of gs://BUCKET/PATH or s3://BUCKET/PATH a copy is read, below `cache_dir`; `Run.workdir` is that copy.

    Needs nothing but the folder, changes nothing in it, and runs on one device unless told otherwise, whatever the run was
    trained on.

    Args:
        cache_dir: where tokens of other text are kept (`Run.validation`); whatever the folder's config.json says.
        report: called with one line for each thing a person should know, such as a damaged checkpoint.
        devices: over which batches are split in evaluation, in `logits` and in `generate_batch`: so many of JAX's, or these.
        mesh: how they are arranged; default all along `mesh.data`, each with all parameters.

    Raises:
        UserError: `workdir` is not a run folder, holds no checkpoint, or none of `step`; there are fewer devices.
    """
    xla_cpu.warn_of_wrong_fusions()
    if object_store.is_url(workdir):
        url, folder = str(workdir), remote_folder.local_folder(str(workdir), cache_dir, read=True)
        with remote_folder.named(folder, url), atomic.disk_errors_as_user_errors("data.cache_dir", folder):
            folder = remote_folder.opened(url, cache_dir, step=step, report=report)
            return load_run(folder, step, cache_dir=cache_dir, report=report, devices=devices, mesh=mesh)
    workdir = atomic.expanded(workdir)
    config = read_config(workdir, cache_dir=cache_dir, report=report)
    if not checkpoint.steps(workdir / "checkpoints"):
        raise UserError(f"{workdir} holds no checkpoint yet; train.py saves one every train.checkpoint_every_steps")
    tokenizer = read_tokenizer(workdir, config)
    devices = jax.devices()[:devices] if isinstance(devices, int) and 1 <= devices <= len(jax.devices()) else devices
    if isinstance(devices, int) or not devices:
        raise UserError(f"{devices or 'no'} devices are asked for and there are {len(jax.devices())}")
    mesh = MeshConfig(data=len(devices), fsdp=1, tensor=1, sequence=1) if mesh is None else mesh
    trainer = Trainer(_on_mesh(config, mesh), known_vocab_size(config, tokenizer), devices=list(devices))
    restored = checkpoint.restore(
        workdir / "checkpoints", {"params": trainer.abstract_state()["params"]}, step=step, report=report
    )
    if restored is None:
        raise UserError(f"the checkpoints of {workdir} were deleted while it was opened")
    if tokenizer is not None and restored.record.get("tokenizer") not in (None, data.tokenizer_digest(tokenizer)):
        report(f"{workdir / 'tokenizer.json'} is not the one that the run was trained with: it was replaced, or is damaged")
    other = config_lib.other_options(restored.record.get("model"), config)
    if other:
        report(
            f"{workdir / 'config.json'} has another model than the checkpoint of step {restored.step} was made by "
            f"({', '.join(other[:5])}): it was replaced"
        )
    held_out = (restored.record.get("digests") or {}).get("validation")
    return Run(workdir, config, tokenizer, restored.step, restored.state["params"], restored.fingerprint, trainer, held_out)


def _check_number(name: str, value: Any, hint: Any) -> None:
    """Raises UserError where a value is not in the range of a declared type (seqmodels.ranges)."""
    why = ranges.problem(hint, value, str)
    if why is not None:
        raise UserError(f"{name}={ranges.short_repr(value)} {why}")


def _on_mesh(config: RunConfig, mesh: MeshConfig) -> RunConfig:
    """The config on another mesh, its batches a little larger where they did not divide over it."""
    parts = mesh.data * mesh.fsdp
    of_data = dataclasses.replace(config.data, batch_size=-(-config.data.batch_size // parts) * parts)
    optim = config.optim if parts == 1 else dataclasses.replace(config.optim, accumulation_steps=1)
    return dataclasses.replace(config, mesh=mesh, data=of_data, optim=optim)


@functools.partial(jax.jit, static_argnums=0, static_argnames="mesh")
def _logits(graphdef, params, tokens, mesh):
    with contextlib.nullcontext() if mesh is None else ops.on_mesh(mesh):
        return model.merge(graphdef, params)(tokens)[0]


@functools.partial(jax.jit, static_argnums=0)
def _attention_weights(graphdef, params, tokens):
    return model.merge(graphdef, params).attention_weights(tokens)
