#!/usr/bin/env bash
# Builds the wheel and tries it in an environment that has nothing of the clone: `seqmodels` trains on built-in text in an empty
# folder, and a Python beside it opens the run. The packages are those of the Python that is given, so that none is installed twice.
set -euo pipefail
python=$(realpath --no-symlinks "${1:-.venv/bin/python}")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$work" .
"$python" -m venv --without-pip "$work/venv"
clean=$work/venv/bin/python
site=$("$clean" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -m pip --python "$clean" install --quiet --disable-pip-version-check --no-deps "$work"/seqmodels-*.whl
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/packages.pth"
mkdir "$work/empty" && cd "$work/empty"
export PATH="$work/venv/bin:$PATH" JAX_PLATFORMS=cpu
seqmodels --version
seqmodels --help
seqmodels train --config=configs/demo.py:attention --workdir=run --config.data.toy_documents=100 --config.data.tokenizer=bytes \
	--config.data.seq_len=32 --config.data.batch_size=2 --config.model.repeats=1 --config.model.d_model=32 --config.train.steps=2 \
	--config.train.eval_tokens=64 --config.train.sample_every_steps=0 --config.data.cache_dir=cache --config.train.compilation_cache_dir=
seqmodels generate --workdir=run --prompt="Once upon a time" --max_tokens=4 --compilation_cache_dir=
"$clean" - <<'PYTHON'
import pathlib

import seqmodels

assert pathlib.Path(seqmodels.__file__).is_relative_to(pathlib.Path.cwd().parent), seqmodels.__file__
assert seqmodels.load_run("run").logits([[1, 2, 3]]).shape == (1, 3, seqmodels.load_run("run").trainer.vocab_size)
try:
    import configs
except ModuleNotFoundError:
    print("the wheel works, and claims no name but its own")
PYTHON
