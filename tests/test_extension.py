"""What a new field of the model takes, and a new mixer whose decay weight decay leaves alone: both added to a copy of the package."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MIXER = '''
"""Fading: a decayed sum of values, for a test.

    s_t = sigmoid(x_t W_f) s_{t-1} + x_t W_v

Table 1 of arXiv 2312.06635: G_t = a vector of this test

State: s, D. Numerical trap: none. Deviations from the paper: it has none.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from seqmodels.layers import NoWeightDecay, Weight, dense, normal_init
from seqmodels.ops.dispatch import Implementation
from seqmodels.ops.linear_recurrence import linear_recurrence
from seqmodels.ranges import Checked


@dataclasses.dataclass(frozen=True)
class Config(Checked, where="model.mixers.fading"):
    implementation: Implementation | None = None  # of linear_recurrence


class Mixer(nnx.Module):
    def __init__(self, config, d_model, *, rngs):
        self.config, self.d_model = config, d_model
        self.fade_kernel = NoWeightDecay(normal_init(rngs.params(), (d_model, d_model)))
        self.value_kernel = Weight(normal_init(rngs.params(), (d_model, d_model)))
        self.output_kernel = Weight(normal_init(rngs.params(), (d_model, d_model)))

    def init_state(self, batch_size, max_len):
        return jnp.zeros((batch_size, self.d_model), jnp.float32)

    def __call__(self, x, state=None, *, reset=None):
        fade = jax.nn.sigmoid(dense(x, self.fade_kernel[...]))
        values = dense(x, self.value_kernel[...])
        s, state = linear_recurrence(fade, values, state=state, reset=reset, implementation=self.config.implementation)
        return dense(s.astype(x.dtype), self.output_kernel[...]), state
'''
FIELD = "    head_scale: Positive = 2.0  # what logits are multiplied by, in this test\n"
MIGRATION = """

def _scale_the_head(values):
    _add(values, {"model.head_scale": 1.0})


MIGRATIONS = (*MIGRATIONS, _scale_the_head)
VERSION = len(MIGRATIONS)
"""
USE = """
    import json, sys
    from tools.pages import base_config
    old_run = sys.argv.pop()
    base_config.main()  # before configs.base is imported
    from configs import base
    from tools.pages import mixers as page
    from seqmodels import config as config_lib, migrations, mixers, model

    values = base.get_config()
    assert values.model.head_scale == 2.0 and "implementation" in values.model.mixers.fading
    values.model.pattern, values.model.head_scale = "fading mlp", 3.0
    made = config_lib.from_config_dict(values)
    config_lib.save(made, "new.json")
    assert config_lib.load("new.json") == made and made.model.head_scale == 3.0
    assert json.load(open("new.json"))["version"] == migrations.VERSION
    assert config_lib.load(old_run).model.head_scale == 1.0

    mask = model.weight_decay_mask(made.model, 50)["layers"]["0_fading"]["layer"]
    assert mask == {"fade_kernel": False, "value_kernel": True, "output_kernel": True}, mask
    mixers.names = lambda: ("fading",)
    assert "| fading | a vector of this test |" in page.mixers_page()
"""


@pytest.mark.tools
def test_a_field_and_a_mixer_are_added_in_one_or_two_places(tmp_path):
    """A field: its declaration, and what older runs did. A mixer: its file. configs/base.py and docs/mixers.md are written."""
    for folder in ("seqmodels", "configs", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "seqmodels" / "mixers" / "fading.py").write_text(MIXER.lstrip())
    edit(tmp_path / "seqmodels" / "model.py", "    remat: bool", FIELD + "    remat: bool")
    edit(tmp_path / "seqmodels" / "migrations.py", "VERSION = len(MIGRATIONS)\n", "VERSION = len(MIGRATIONS)\n" + MIGRATION)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(USE), str(ROOT / "tests" / "run_configs" / "2026-11-26.json")],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
