"""What a run is made of before its first step: mesh, structure, optimizer, jitted steps, a train state.

The train state is a plain dict of arrays ``{"params", "optimizer", "step"}``: it is what a checkpoint holds.
The keys of dropout and of the data order derive from the seed and the step, so there is nothing else to save.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from seqmodels import model, ops, xla_cpu
from seqmodels.data import HeldOut, ValidationSet
from seqmodels.errors import UserError
from seqmodels.evaluation import accuracy, perplexity
from seqmodels.evaluation.accuracy import LabelEvaluation
from seqmodels.evaluation.perplexity import Evaluation
from seqmodels.training import flops, memory, optimizer, sharding, step

MOST_PARAMETERS_OF_QUICK_INIT = 30_000_000


class Trainer:
    """The compiled parts of a run.

    Args:
      config: a ``seqmodels.config.RunConfig``.
      pieces: how many tokens the data have; None: that is not known, and ``config.model.vocab_size`` says L.
      devices: which devices to use; default all; a number: so many that are not there, to lower steps for.

    Attributes:
      mesh: the device mesh.
      graphdef: the model's structure; ``nnx.merge(graphdef, params)`` is the model.
      schedule: step -> learning rate.
      eval_step: ``(params, batch) -> {"loss": [T], "weight": [T]}``, sums over the batch by position; on a synthetic
        task with "correct".

    Raises:
      UserError: sizes that do not fit together, or a mesh that does not fit the devices.
    """

    def __init__(self, config, pieces: int | None, devices: list[jax.Device] | int | None = None):
        xla_cpu.warn_of_wrong_fusions()
        self.config = config
        self.vocab_size = model.vocabulary_size(config.model, pieces)
        self.mesh = sharding.make_mesh(config.mesh, devices)
        self._check_batch()
        self.graphdef = model.graphdef(config.model, self.vocab_size)
        self.schedule = optimizer.learning_rate_schedule(config.optim, config.train.steps)
        self._decayed = model.weight_decay_mask(config.model, self.vocab_size)
        on_mesh = ops.on_mesh(self.mesh)
        self._init = on_mesh(self._new_state)
        shapes = jax.eval_shape(self._train_state, model.param_shapes(config.model, self.vocab_size))
        self.shardings = sharding.tree_shardings(shapes, self.mesh)
        self._shapes = shapes
        self.whole = NamedSharding(self.mesh, PartitionSpec())
        self.batch_sharding = NamedSharding(self.mesh, sharding.BATCH)
        self._untraced_step = on_mesh(self._step)
        self._compiled_step = jax.jit(
            self._untraced_step,
            in_shardings=(self.shardings, self.batch_sharding, self.whole),
            out_shardings=(self.shardings, self.whole),
            donate_argnums=0,
        )
        self.eval_step = jax.jit(
            on_mesh(functools.partial(step.eval_step, self.graphdef, labelled=self._labelled)),
            in_shardings=(self.shardings["params"], self.batch_sharding),
            out_shardings=self.whole,
        )

    def check_memory(self) -> memory.Memory:
        """What a training step needs on each device.

        Raises:
          UserError: more than there is.
        """
        return memory.check(self.config, self.graphdef, self._shapes, self.mesh)

    def init(self) -> dict:
        """A fresh train state from the config's seed, placed on the mesh."""
        # The forward pass that scales the branches (LanguageModel) runs once, on a few tokens: compiling it took 29 s of CPU
        # time for a hybrid of 14 layers, and takes 6 so. What unoptimised code would be slow at is drawing many random numbers.
        quick = self.num_parameters <= MOST_PARAMETERS_OF_QUICK_INIT and self.mesh.devices.flat[0].platform == "cpu"
        options = xla_cpu.quick_compiler_options() if quick else {}
        init = jax.jit(self._init, out_shardings=self.shardings, compiler_options=options)
        return init(jax.random.key(self.config.seed))

    def abstract_state(self) -> dict:
        """Shapes, dtypes and shardings of the train state: what a checkpoint is restored into."""
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            self._shapes,
            self.shardings,
        )

    def train_step(self, state: dict, batch: dict[str, jax.Array]) -> tuple[dict, dict[str, jax.Array]]:
        """One step of training by the compiled program; donates the train state.

        Returns:
          The next train state, and metrics as device scalars: loss (nats per token), gradient_norm, learning_rate, accuracy on
          a synthetic task, and skipped with train.skip_nonfinite.
        """
        return self._compiled_step(state, batch, self.peak_rate)

    def untraced_train_step(self, state: dict, batch: dict[str, jax.Array]) -> tuple[dict, dict[str, jax.Array]]:
        """`train_step`, not compiled and without donation."""
        return self._untraced_step(state, batch, self.peak_rate)

    def trace(self, batch: dict[str, jax.Array | jax.ShapeDtypeStruct]) -> jax.stages.Traced:
        """The program of `train_step` for such a batch. Compiled, it takes a train state, a batch and `peak_rate`."""
        rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=self.whole)
        return self._compiled_step.trace(self.abstract_state(), batch, rate)

    def lower(self, rows_of_batch: Callable[[slice], dict[str, np.ndarray]]) -> tuple[jax.stages.Lowered, list[str]]:
        """The training step, which once compiled is what `train_step` runs on such a batch; and what each of its ops resolves to.

        Args:
          rows_of_batch: as in `put_rows`.

        Returns:
          The program, and lines for a person: the form of each op, and why not a faster one.
        """
        with ops.record_choices() as choices:
            traced = self.trace(self.put_rows(rows_of_batch))
        return traced.lower(), list(choices)

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A numpy batch (the same on every process) as arrays split over data and fsdp."""
        return {
            name: jax.make_array_from_callback(array.shape, self.batch_sharding, array.__getitem__)
            for name, array in batch.items()
        }

    def put_rows(self, rows_of_batch: Callable[[slice], dict[str, np.ndarray]]) -> dict[str, jax.Array]:
        """A training batch as `put` makes it, of which every process reads only the rows of its own devices.

        Args:
          rows_of_batch: gives the rows of a slice of the batch.
        """
        size = self.config.data.batch_size
        shards = self.batch_sharding.addressable_devices_indices_map((size, self.config.data.seq_len)).values()
        bounds = [shard[0].indices(size) for shard in shards]
        first, end = min(begin for begin, _, _ in bounds), max(end for _, end, _ in bounds)

        def part(array: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
            begin, stop, _ = index[0].indices(size)
            return array[begin - first : stop - first, *index[1:]]

        return {
            name: jax.make_array_from_callback((size, *array.shape[1:]), self.batch_sharding, functools.partial(part, array))
            for name, array in rows_of_batch(slice(first, end)).items()
        }

    @functools.cached_property
    def peak_rate(self) -> jax.Array:
        """The highest learning rate: an argument of the compiled step, so that a search of rates compiles once."""
        rate = np.asarray(self.config.optim.learning_rate, np.float32)
        return jax.make_array_from_callback((), self.whole, lambda _: rate)

    @functools.cached_property
    def num_parameters(self) -> int:
        """How many numbers are trained (a tied head counts once)."""
        return sum(leaf.size for leaf in jax.tree.leaves(self._shapes["params"]))

    @functools.cached_property
    def flops_per_token(self) -> float:
        """Floating point operations of one training step (`flops.training_flops_per_token`)."""
        return flops.training_flops_per_token(self.graphdef, self._shapes["params"], self.config.data.seq_len)

    def evaluate(
        self,
        params: dict,
        validation: ValidationSet | HeldOut,
        *,
        seq_len: int | None = None,
        max_tokens: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Evaluation | LabelEvaluation:
        """Score parameters on text, in windows of ``seq_len`` (default: the training length), or on a synthetic task's test.

        Args:
          max_tokens: score only the first so many; of a test, read about so many.
          progress: called with the number of tokens done.
        """
        if isinstance(validation, HeldOut):
            return accuracy.evaluate(
                self.eval_step, params, validation,
                batch_size_for=self.batch_size_for, max_tokens=max_tokens, put=self.put, progress=progress,
            )  # fmt: skip
        seq_len = seq_len or self.config.data.seq_len
        return perplexity.evaluate(
            self.eval_step, params, validation, batch_size=self.batch_size_for(seq_len), seq_len=seq_len,
            max_tokens=max_tokens, put=self.put, progress=progress,
        )  # fmt: skip

    def batch_size_for(self, length: int) -> int:
        """Rows of a batch of this length that has about as many tokens as a training batch, at most as many rows."""
        data = self.config.data
        parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return max(parts, min(data.batch_size, data.batch_size * data.seq_len // length) // parts * parts)

    def _new_state(self, key):
        return self._train_state(model.init_params(self.config.model, self.vocab_size, key))

    def _train_state(self, params):
        adamw = optimizer.make_optimizer(self.config.optim, self.schedule, self._decayed)
        return {"params": params, "optimizer": adamw.init(params), "step": jnp.zeros((), jnp.int32)}

    def _step(self, state, batch, peak_rate):
        config = self.config
        schedule = optimizer.learning_rate_schedule(config.optim, config.train.steps, peak_rate)
        return step.train_step(
            self.graphdef, optimizer.make_optimizer(config.optim, schedule, self._decayed), schedule, state, batch,
            accumulation_steps=config.optim.accumulation_steps,
            dropout_seed=config.seed if config.model.dropout > 0 else None, labelled=self._labelled,
            skip_nonfinite=config.train.skip_nonfinite,
        )  # fmt: skip

    @property
    def _labelled(self) -> bool:
        return self.config.data.synthetic_task is not None

    def _check_batch(self):
        data, accumulation = self.config.data, self.config.optim.accumulation_steps
        if data.batch_size % accumulation:
            raise UserError(f"data.batch_size={data.batch_size} is not a multiple of optim.accumulation_steps={accumulation}")
        parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        if (data.batch_size // accumulation) % parts:
            raise UserError(
                f"data.batch_size={data.batch_size} in {accumulation} accumulation step(s) does not divide over "
                f"the {parts} devices of mesh.data x mesh.fsdp"
            )
        if data.seq_len % self.mesh.shape["sequence"]:
            raise UserError(
                f"data.seq_len={data.seq_len} does not divide over the {self.mesh.shape['sequence']} devices of mesh.sequence"
            )
