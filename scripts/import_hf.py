"""Make a run folder of a checkpoint that transformers or flash-linear-attention saved.

    python scripts/import_hf.py PATH_OR_ID --workdir=runs/y

PATH_OR_ID is a folder with config.json and model.safetensors (and tokenizer.json, for text), or an id on the Hugging Face hub.
scripts/generate.py and eval.py --data=... then take the run folder as any other.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone, uninstalled, in any directory

if __name__ == "__main__":  # ahead of imports that fail without the packages
    from seqmodels.packages import check_packages

    check_packages()

from configs import base
from seqmodels import command_line, screen
from seqmodels.config import from_config_dict
from seqmodels.escape import say
from seqmodels.interop import checkpoint, hub
from seqmodels.model import COMPUTE_DTYPES


def main() -> None:
    parser = command_line.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="PATH_OR_ID", help="a checkpoint's folder, or an id on the hub")
    parser.add_workdir("the run folder to make", local=True)
    parser.add_argument("--revision", help="of the hub id; default its newest")
    parser.add_argument("--compute_dtype", choices=COMPUTE_DTYPES, default="float32", help="of activations (default float32)")
    options = parser.parse_args()

    source = hub.folder(options.source, options.revision)
    with screen.phase("importing the checkpoint"):
        config = checkpoint.import_folder(
            source, options.workdir, defaults=from_config_dict(base.get_config()), compute_dtype=options.compute_dtype, report=say
        )
    model = config.model
    say(f"{options.workdir}: {model.repeats} x {model.pattern!r}, width {model.d_model}, {model.vocab_size} tokens", sys.stdout)


if __name__ == "__main__":
    command_line.run(main)
