"""``--help`` lists a command's flags, ``--help=GROUP`` the fields of a group as their declarations have them."""

import contextlib
import dataclasses
import io

import pytest

import train
from configs import base
from scripts import compare, generate, plan
from seqmodels import config_help, packages, ranges
from seqmodels.config import flatten
from seqmodels.errors import UserError


def shown(command, *flags):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        command.main(["command.py", *flags])
    return printed.getvalue()


def test_a_switch_that_is_misspelt():
    with pytest.raises(UserError, match="--lowr is not a flag; did you mean --lower?"):
        shown(plan, "--config=configs/tinystories.py:gla", "--devices=v5e:4", "--lowr")


@pytest.mark.parametrize("installed", [False, True])
def test_the_examples_can_be_typed(monkeypatch, installed):
    """An installed package has no ``python FILE``."""
    monkeypatch.setattr(packages, "IS_INSTALLED", installed)
    text = shown(train, "--help")
    assert ("\n    seqmodels train --config=" in text) == installed and ("python train.py" in text) != installed
    monkeypatch.setattr("sys.argv", [str(packages.ROOT / "scripts" / "generate.py"), "--help"])
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        generate.main()
    text = printed.getvalue()
    assert text.startswith("usage: seqmodels generate " if installed else "usage: generate.py ")
    assert ("\n    seqmodels generate --workdir=" in text) == installed and ("python scripts/" in text) != installed


@pytest.mark.parametrize("command", [train, compare, plan])
def test_every_flag_is_listed(command):
    text = shown(command, "--help")
    assert text == shown(command, "-h") and command.__doc__.strip() in text
    assert all(f"\n  --{name} " in text for name in (*command.FLAGS, "config.FIELD=VALUE", "help=GROUP"))
    assert "optim" in text.splitlines()[-1]


def test_every_field_of_the_config_is_on_the_page_with_its_default():
    page = config_help.page("all")
    fields = flatten(base.get_config().copy_and_resolve_references().to_dict())
    for name, value in fields.items():
        if name != "seed":  # it is in no group
            assert f"\n  --config.{name}={value}\n" in page, name
    meanings = [line for line in page.splitlines() if line.startswith("      ")]
    assert all(line.endswith("]") or "--help=" in line for line in meanings)


def test_a_field_has_its_meaning_and_range():
    clip = "  --config.optim.clip_norm=1.0\n      global gradient norm above which gradients are scaled down [float, positive]"
    assert clip in shown(train, "--help=optim")
    assert "--config.base.model.mixers.gla.num_heads=4\n      H; divides" in shown(compare, "--help=gla")
    assert "--config.seeds=3\n      seeds at the best rate" in shown(compare, "--help=comparison")


@pytest.mark.parametrize(("asked", "near"), [("modle", "'model'"), ("model.mixers.gal", "gla"), ("optimizer", "optim")])
def test_an_unknown_group_names_the_nearest(asked, near):
    with pytest.raises(UserError, match=f"no such group of fields; did you mean .*{near}"):
        shown(train, f"--help={asked}")


def test_ranges_in_words():
    @dataclasses.dataclass(frozen=True)
    class Example:
        a: ranges.Size | None
        b: tuple[ranges.Count, ...]

    a, b = ranges.declared(Example).values()
    assert ranges.describe_type(a) == "int, at least 1 and at most 1048576, or None"
    assert ranges.describe_type(b) == "tuple of int, at least 1"
