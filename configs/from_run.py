"""Training on from what another run, or an imported checkpoint, has learnt: ``configs/from_run.py:RUN_FOLDER``.

    python scripts/import_hf.py PATH_OR_ID --workdir=runs/imported
    python train.py --config=configs/from_run.py:runs/imported --workdir=runs/tuned --config.data.source=PATH

Model, data, tokenizer and parameters are that run's; the optimizer, its schedule and the order of the data begin anew.
The peak of the learning rate is a tenth of base.py's.
"""

from pathlib import Path

from configs import base
from seqmodels import config as config_lib
from seqmodels.errors import UserError
from seqmodels.training import run_folder


def get_config(run: str = ""):
    if not run:
        raise UserError("say which run: --config=configs/from_run.py:RUN_FOLDER")
    folder = Path(run).expanduser()
    theirs = config_lib.to_dict(run_folder.read_config(folder))
    config = base.get_config()
    config.model.update(theirs["model"])
    config.data.update(theirs["data"])
    config.data.tokenizer = str(folder / "tokenizer.json")
    config.train.init_from = str(folder)
    config.optim.learning_rate = 2e-4
    return config
