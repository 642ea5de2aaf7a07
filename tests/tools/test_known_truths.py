"""The verdicts of known_truths.py follow from the rows; the picture can be drawn from part of them."""

import shlex

import train
from tools import known_truths


def row(*accuracies, segments, state_bytes=64):
    return {
        "accuracy": sum(accuracies) / len(accuracies), "accuracy_by_segment": dict(zip(segments, accuracies)),
        "state_bytes": state_bytes,
    }  # fmt: skip


PAIRS, TOKENS = [f"length 64, {pairs} pairs" for pairs in (2, 16)], ["length 20", "length 40"]


def test_verdicts(tmp_path):
    rows = {
        "mqar_small": row(0.999, segments=["length 32, 4 pairs"]),
        "pairs_attention": row(1.0, 0.9, segments=PAIRS),
        "pairs_linear_attention_16_heads": row(0.9, 0.8, segments=PAIRS),
        "pairs_linear_attention_4_heads": row(0.9, 0.95, segments=PAIRS),
        "parity_lstm": row(1.0, 1.0, segments=TOKENS),
        "parity_mamba": row(0.99, 0.76, segments=TOKENS),
    }
    assert list(known_truths.verdicts(rows).values()) == [True, False, False, True, None, False, None]
    guesses = rows | {"pairs_linear_attention_16_heads": row(0.5, 1 / 16, segments=PAIRS)}
    assert list(known_truths.verdicts(guesses).values())[1:3] == [False, True], "one of K is no recall"
    binds = rows | {"pairs_linear_attention_16_heads": row(0.9, 0.2, segments=PAIRS)}
    assert list(known_truths.verdicts(binds).values())[1:3] == [True, True]
    assert list(known_truths.verdicts({}).values()) == [None] * 7
    for rows_there in (rows, {}):
        known_truths.draw(rows_there, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_every_run_has_a_config_that_train_takes(tmp_path):
    """And the command that is written down is the one that is run."""
    for probe in known_truths.RUNS.values():
        argv = ["train.py", f"--config={probe.config}", *probe.flags, f"--workdir={tmp_path}"]
        config, _ = train.parse(argv)
        assert shlex.split(f"{probe.command} --workdir={tmp_path}")[1:] == argv
        assert config.data.synthetic_task is not None
