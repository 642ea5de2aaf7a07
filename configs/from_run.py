"""Training on from what another run, or an imported checkpoint, has learnt: ``configs/from_run.py:RUN_FOLDER``.

    python scripts/import_hf.py PATH_OR_ID --workdir=runs/imported
    python train.py --config=configs/from_run.py:runs/imported --workdir=runs/tuned --config.data.source=PATH

Model, tokenizer, parameters and how the data are cut are that run's; the optimizer, its schedule and the order of the data
begin anew. What to train on, and where things are kept, is not that folder's to say: give --config.data.source.
The peak of the learning rate is a tenth of base.py's.
"""

from configs import base
from seqmodels import config as config_lib
from seqmodels import object_store
from seqmodels.data import TEXT
from seqmodels.errors import UserError
from seqmodels.training import run_folder


def get_config(run: str = ""):
    if not run:
        raise UserError("say which run: --config=configs/from_run.py:RUN_FOLDER")
    folder = object_store.local(run, "--config=configs/from_run.py:")
    theirs = config_lib.to_dict(run_folder.read_config(folder))
    config = base.get_config()
    config.model.update(theirs["model"])
    config.data.update({name: value for name, value in theirs["data"].items() if f"data.{name}" not in config_lib.PLACE_FIELDS})
    config.data.source, config.data.streaming = "", False
    config.data.tokenizer = str(folder / "tokenizer.json")
    if theirs["data"]["task"] != TEXT:
        config.train.sample_every_steps = 0
    config.train.init_from = str(folder)
    config.optim.learning_rate = 2e-4
    return config
