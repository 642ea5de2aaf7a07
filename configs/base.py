"""The one complete config: every field with its meaning and unit. Other configs state only differences.

    python train.py --config=configs/tinystories.py:attention --workdir=runs/attention --config.train.steps=2000

Written by `python -m tools.pages.base_config` from the dataclasses that declare the fields; the options of a layer or a task come
from its file.
"""

from ml_collections import config_dict
from ml_collections.config_dict import ConfigDict

from seqmodels import channel_layers, mixers
from seqmodels.config import options
from seqmodels.data import tasks


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # decides initialisation, data order and dropout

    config.data = ConfigDict()
    config.data.source = "roneneldan/TinyStories"  # a hub id, a local folder or file (parquet, txt, jsonl), or "toy"
    config.data.revision = "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"  # of the hub id; ignored for local data and toy
    config.data.streaming = False  # read the hub id over the network as tokens are made, with no copy of its text on the disk
    config.data.validation_source = config_dict.placeholder(str)  # what is held out: a split, path or hub id (docs/data.md)
    config.data.tokenizer = "bpe"  # "bpe" (byte-level, trained on the train split), "bytes", or a tokenizer.json
    config.data.vocab_size = 4096  # tokens of the bpe tokenizer; ignored by the others
    config.data.seq_len = 256  # T, tokens the model reads at once
    config.data.batch_size = 16  # B, sequences per optimizer step (over all devices and accumulation steps)
    config.data.packing = "windows"  # "windows" (contiguous, no padding) or "documents" (whole, with reset marks)
    config.data.cache_dir = "~/.cache/seqmodels/data"  # where tokens are kept, written once per source and tokenizer
    config.data.max_train_documents = 0  # use only the first so many documents of the train split; 0: all
    config.data.toy_documents = 4000  # stories that the "toy" source generates for training
    config.data.task = "text"  # or a synthetic task: its name in config.data.tasks; of the above, it asks seq_len and batch_size
    config.data.tasks = ConfigDict({name: options(task) for name, task in tasks.TASKS.items()})

    config.model = ConfigDict()
    config.model.vocab_size = config_dict.placeholder(int)  # rows of the embedding; None: as many as the tokenizer has tokens
    config.model.d_model = 128  # D, width of the residual stream
    config.model.pattern = "attention mlp"  # layers in order, of config.model.mixers and channel_layers
    config.model.repeats = 4  # R, how often the pattern is repeated
    config.model.short_conv = "own"  # short convolutions: mixers' "own", "none", or "all": x + conv(x) before mixers without one
    config.model.tie_embeddings = True  # the head is the embedding's transpose
    config.model.embedding_norm = True  # a norm on the embedding: each token enters the residual stream with rms 1
    config.model.branch_rms = config_dict.placeholder(float)
    config.model.branch_rms = 0.3  # each of n layers starts by adding rms branch_rms / sqrt(n); None: as initialised
    config.model.norm = "rms"  # between layers: "rms" (RMSNorm) or "layer" (LayerNorm with a bias)
    config.model.norm_eps = 1e-5  # epsilon of the norms between layers
    config.model.logit_cap = config_dict.placeholder(float)  # logits go through cap tanh(. / cap); None: as they are
    config.model.readout = "each"  # logits at "each" position; "last": all from the last one's vector, for the task "compression"
    config.model.dropout = 0.0  # on what a layer adds to the residual stream
    config.model.remat = False  # recompute each repeat (of one: each layer) in the backward pass: less memory, more time
    config.model.compute_dtype = "float32"  # of activations (float32, bfloat16, float16); parameters stay float32
    config.model.channel_layers = ConfigDict({name: options(channel_layers.load(name).Config) for name in channel_layers.names()})
    config.model.mixers = ConfigDict({name: options(mixers.load(name).Config) for name in mixers.names()})

    config.optim = ConfigDict()
    config.optim.learning_rate = 2e-3  # peak
    config.optim.schedule = "cosine"  # after warm-up: cosine, linear or constant
    config.optim.warmup_steps = 50  # linear from 0 to the peak, in optimizer steps
    config.optim.decay_steps = config_dict.placeholder(int)  # step at which the decay ends; None: train.steps
    config.optim.final_fraction = 0.1  # of the peak, where the decay ends
    config.optim.weight_decay = 0.1  # AdamW's, on kernels and embeddings; never on norms, biases, gates, SSM parameters
    config.optim.beta1 = 0.9  # decay of the gradient's mean
    config.optim.beta2 = 0.95  # decay of the gradient's square
    config.optim.eps = 1e-8  # AdamW's epsilon
    config.optim.clip_norm = 1.0  # global gradient norm above which gradients are scaled down
    config.optim.accumulation_steps = 1  # micro-batches per optimizer step; data.batch_size is their sum
    config.optim.rate_changes = ()  # (step, factor) of --resume_learning_rate, which writes them into the run folder

    config.train = ConfigDict()
    config.train.init_from = config_dict.placeholder(str)  # run folder whose parameters this run begins with; None: random ones
    config.train.steps = 1000  # optimizer steps
    config.train.skip_nonfinite = False  # leave out and count steps whose loss or gradient is not finite, instead of stopping
    config.train.log_every_steps = 10  # a row of metrics.jsonl and TensorBoard
    config.train.eval_every_steps = 100  # loss on the validation split
    config.train.eval_tokens = 131072  # validation tokens scored (of a task: read) during training; eval.py takes all
    config.train.checkpoint_every_steps = 100  # between two saves
    config.train.keep_checkpoints = 2  # newest ones kept, beside the best
    config.train.sample_every_steps = 250  # a text written by the model; 0: never
    config.train.sample_prompt = config_dict.placeholder(str)  # how it begins; None: as the data do (docs/training.md)
    config.train.compilation_cache_dir = "~/.cache/seqmodels/xla"  # compiled programs; "" keeps none
    config.train.loggers = "tensorboard"  # beside metrics.jsonl, commas between them: tensorboard, wandb; "" for none
    config.train.profile_steps = ""  # FIRST:END, steps (from 0) that a profile is written of, for XProf; "" for none

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices along the batch; -1: all that the other axes leave
    config.mesh.fsdp = 1  # devices that share parameters and optimizer state, and split the batch too
    config.mesh.tensor = 1  # devices that split heads, the layers' widths and the vocabulary
    config.mesh.sequence = 1  # devices that split time; data.seq_len is a multiple of them
    return config
