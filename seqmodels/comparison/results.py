"""From what lies in a comparison's folder to results.json: every figure that the report shows, and nothing else."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from seqmodels.comparison import audit, jobs, statistics
from seqmodels.comparison.jobs import DIVERGED, FINISHED, ResultsCache
from seqmodels.comparison.plan import MATCH_NONE, Candidate, Plan, RunPlan
from seqmodels.comparison.scores import Scores
from seqmodels.comparison.sizes import QUANTITIES
from seqmodels.data import TEXT, few_documents
from seqmodels.errors import UserError
from seqmodels.evaluation.perplexity import by_context_length, perplexity
from seqmodels.formats import json_text, metrics_rows

BOOTSTRAP_SEED = 0
BUSY = 2.0  # processes a core; the comparison's own training, just ended, is one or a little more


def gather(plan: Plan, vocab_size: int, about: dict) -> dict:
    """The results so far; candidates that are not complete have no `quality`.

    Args:
        about: command, versions, machine: what a figure means nothing without.
    """
    known = ResultsCache(plan)
    rows = {candidate.label: _candidate(plan, known, candidate, vocab_size) for candidate in plan.candidates}
    control, starts = _add_gains(plan, rows), audit_of_starts(plan, rows)
    validation = _validation(plan, known)
    matched = None
    if plan.compare.match != MATCH_NONE:
        matched = {
            "quantity": plan.compare.match,
            "in_words": QUANTITIES[plan.compare.match],
            "tolerance": plan.compare.tolerance,
            "reference": plan.candidates[0].label,
            "value": plan.candidates[0].matched.counted,
        }
    return _json({
        "about": about,
        "comparison": dataclasses.asdict(plan.compare),
        "base": plan.base,
        "matched": matched,
        "validation": validation,
        "mixers": rows,
        "control": control,
        "audit": starts,
        "rate_search": _rate_search(plan, known),
        "pairs": _pairs(plan, known),
        "warnings": [*_warnings(plan, known), *_unlike(starts), *_few(plan, validation), *_busy(rows)],
    })  # fmt: skip


def read(path: Path) -> dict:
    """A results.json, of today or of an earlier version: what that one did not measure is null or empty in it.

    Raises:
        OSError: it cannot be read.
        json_text.Malformed: it is no JSON object.
    """
    found = {"control": None, "audit": {"differences": [], "spearman": {}}, "rate_search": None} | json_text.read(path)
    found["comparison"] = {"rate_extensions": 0} | found["comparison"]
    found["about"] = {"training_data": "not noted"} | found["about"]
    row = {"is_control": False, "gain": None, "start": None, "rates_at_length": None}
    found["mixers"] = {label: row | each for label, each in found["mixers"].items()}
    pair = {"over_seeds_pooled": None, "significant_pooled": None}
    found["pairs"] = [pair | each for each in found["pairs"]]
    if found["validation"] is not None:
        found["validation"] = {"frequent_pairs": 0} | found["validation"]
    return found


def _add_gains(plan: Plan, rows: dict) -> str | None:
    """Into each row what it gains over the control, in bits per byte; the control's label, None where there is none."""
    control = next((candidate.label for candidate in plan.candidates if candidate.is_control), None)
    for label, row in rows.items():
        pair = [rows[each]["quality"] for each in (control, label)] if control not in (None, label) else [None]
        known = all(quality is not None and "bits_per_byte" in quality for quality in pair)
        row["gain"] = {"bits_per_byte": pair[0]["bits_per_byte"]["mean"] - pair[1]["bits_per_byte"]["mean"]} if known else None
    return control


def audit_of_starts(plan: Plan, rows: dict) -> dict:
    """Whether the mixers start alike, and whether their starts explain the result (`comparison.audit`)."""
    mixers = [candidate.label for candidate in plan.candidates if not candidate.is_control]
    starts = {label: rows[label]["start"]["summary"] for label in mixers if rows[label]["start"] is not None}
    quality = {label: rows[label]["quality"] for label in mixers if rows[label]["quality"] is not None}
    position_1 = {label: each["position_1_loss"]["mean"] for label, each in quality.items() if "position_1_loss" in each}
    losses = {label: each["loss"]["mean"] for label, each in quality.items()}
    figures = {name: {label: each[name] for label, each in starts.items() if name in each} for name in audit.MEANINGS} | {
        "position_1_loss": position_1
    }
    spearman = {}
    for name, values in figures.items():
        both = [label for label in values if label in losses]
        found = statistics.spearman([values[label] for label in both], [losses[label] for label in both])
        if found is not None:
            spearman[name] = {"in_words": audit.MEANINGS[name]} | dataclasses.asdict(found)
    return {"differences": audit.differences(starts, position_1), "spearman": spearman}


def _rate_search(plan: Plan, known: ResultsCache) -> dict:
    """What the search for the learning rates takes of the whole."""
    per_step = plan.base["data"]["batch_size"] * plan.base["data"]["seq_len"]
    runs = [run for candidate in plan.candidates for run in known.rate_runs(candidate)]
    everything = [run for candidate in plan.candidates for run in known.all_runs(candidate)]
    tokens, of = (per_step * sum(run.steps for run in each) for each in (runs, everything))
    return {
        "runs": len(runs), "tokens": tokens, "share_of_tokens": tokens / of,
        "seconds": sum(over["seconds"] for run in runs if (over := known.outcome(run)) is not None),
    }  # fmt: skip


def _candidate(plan: Plan, known: ResultsCache, candidate: Candidate, vocab_size: int) -> dict:
    matched, rate = candidate.matched, known.best_rate(candidate)
    asked = jobs.asked_cost(plan, candidate, vocab_size)
    row = {
        "sizes": dataclasses.asdict(matched.sizes) | {"in_words": str(matched.sizes)},
        "counted": matched.counted,
        "of_reference": matched.of_reference,
        "rates": _rates(plan, known, candidate),
        "best_rate": rate,
        "rates_at_length": _rates_at_length(plan, known, candidate),
        "is_control": candidate.is_control,
        "start": known.start(candidate),
        "cost": known.cost(candidate, asked),
        "runs": [],
        "diverged": [],
        "quality": None,
    }
    if rate is None:
        return row
    runs = plan.seed_runs(candidate, rate)
    row["runs"] = [
        {"seed": run.seed, "folder": str(run.folder.relative_to(plan.workdir)), "command": over["command"]}
        for run in runs
        if (over := known.outcome(run)) is not None
    ]
    row["diverged"] = [
        {"seed": run.seed, "step": over["step"]}
        for run in runs
        if (over := known.outcome(run)) is not None and over["status"] == DIVERGED
    ]
    if _is_complete(known, runs):
        scored = _finished(known, runs)
        if scored:
            row["quality"] = _quality([score for _, score in scored])
            row["curves"] = [{"seed": run.seed} | _curve(run) for run, _ in scored]
    return row


def _is_complete(known: ResultsCache, runs: Sequence[RunPlan]) -> bool:
    over = [known.outcome(run) for run in runs]
    return all(
        each is not None and (each["status"] == DIVERGED or known.scores(run) is not None) for run, each in zip(runs, over)
    )


def _finished(known: ResultsCache, runs: Sequence[RunPlan]) -> list[tuple[RunPlan, Scores]]:
    """Those of the runs that came to an end, with scores that are numbers."""
    found = [(run, known.scores(run)) for run in runs if (known.outcome(run) or {"status": None})["status"] == FINISHED]
    return [(run, score) for run, score in found if score is not None and np.isfinite(score.loss).all()]


def _quality(scored: Sequence[Scores]) -> dict:
    """On the reported documents, over the seeds."""
    first = scored[0]
    losses = [score.mean("loss", score.reported) for score in scored]
    loss = statistics.mean_interval(losses)
    if first.segment_names:
        return {
            "losses": losses,
            "loss": dataclasses.asdict(loss),
            "accuracy": _share_right(_over_seeds(scored, "errors")),
            "by_segment": _by_segment(scored),
        }
    with np.errstate(invalid="ignore"):  # nan where none of the documents was scored
        nats_to_bits_per_byte = first.tokens[first.reported].sum() / (math.log(2) * first.bytes[first.reported].sum())
        by_position = np.mean([score.by_position() for score in scored], axis=0)
    first_of_window = [float(score.by_position()[0]) for score in scored]
    return {
        "losses": losses,
        "loss": dataclasses.asdict(loss),
        "position_1_loss": dataclasses.asdict(statistics.mean_interval(first_of_window)),
        "perplexity": _scaled(loss, perplexity),
        "bits_per_byte": _scaled(loss, lambda nats: nats * nats_to_bits_per_byte),
        "hit_loss": dataclasses.asdict(_over_seeds(scored, "hit_loss")),
        "rest_loss": dataclasses.asdict(_over_seeds(scored, "rest_loss")),
        "by_position": [[first, last, loss] for (first, last), loss in by_context_length(by_position).items()],
    }


def _share_right(wrong: statistics.Estimate) -> dict:
    """What is left of 1: an accuracy, of an estimate of errors; its interval does not go beyond 0 and 1."""
    low, high = (None if end is None else min(max(1.0 - end, 0.0), 1.0) for end in (wrong.high, wrong.low))
    return {"mean": 1.0 - wrong.mean, "low": low, "high": high, "values": wrong.values}


def _by_segment(scored: Sequence[Scores]) -> list[list]:
    """Name, length and accuracy of each segment of the test."""
    accuracies = np.mean([score.accuracy_by_segment() for score in scored], axis=0)
    return [list(each) for each in zip(scored[0].segment_names, scored[0].segment_lengths, accuracies.tolist())]


def _over_seeds(scored: Sequence[Scores], name: str) -> statistics.Estimate:
    return statistics.mean_interval([score.mean(name, score.reported) for score in scored])


def _scaled(estimate: statistics.Estimate, function) -> dict:
    """An estimate and its ends, each put through a growing function."""
    ends = {name: None if value is None else function(value) for name, value in
            (("mean", estimate.mean), ("low", estimate.low), ("high", estimate.high))}  # fmt: skip
    return ends | {"values": estimate.values}


def _rates(plan: Plan, known: ResultsCache, candidate: Candidate) -> list[dict]:
    """Of each learning rate that was tried to the end, the mean loss on the documents that choose; of a task, the accuracy too."""
    found = []
    by_rate: dict[float, list[RunPlan]] = {}
    for run in known.rate_runs(candidate):
        by_rate.setdefault(run.learning_rate, []).append(run)
    for rate, runs in by_rate.items():
        if not _is_complete(known, runs):
            continue
        finished = [score for _, score in _finished(known, runs)]
        losses, errors = ([score.mean(name, ~score.reported) for score in finished] for name in ("loss", "errors"))
        diverged = [known.outcome(run)["step"] for run in runs if known.outcome(run)["status"] == DIVERGED]
        row = {"rate": rate, "loss": float(np.mean(losses)) if losses else None, "diverged_at": diverged}
        if finished and finished[0].segment_names:
            row["accuracy"] = 1.0 - float(np.mean(errors))
        found.append(row)
    return found


def _rates_at_length(plan: Plan, known: ResultsCache, candidate: Candidate) -> dict | None:
    """Where every rate was trained at full length too: what each comes to there, and what the choice by short runs loses.

    In the measure that chooses, on the documents that choose; `regret` is the chosen rate's mean less the best one's, `spread`
    the standard deviation between seeds, pooled over the rates (None of single seeds).
    """
    best = known.best_rate(candidate)
    if not plan.compare.check_rates or best is None:
        return None
    found = {}
    for rate in known.rates(candidate):
        runs = plan.seed_runs(candidate, rate)
        if not _is_complete(known, runs):
            return None
        finished = [score for _, score in _finished(known, runs)] if len(_finished(known, runs)) == len(runs) else []
        found[rate] = [score.mean(score.measure, ~score.reported) for score in finished]
    means = {rate: float(np.mean(values)) for rate, values in found.items() if values}
    if best not in means:
        return None
    several = [values for values in found.values() if len(values) > 1]
    spread = math.sqrt(np.mean([np.var(values, ddof=1) for values in several])) if several else None
    winner = min(means, key=means.__getitem__)
    return {
        "rates": [{"rate": rate, "values": values} for rate, values in found.items()],
        "best": winner, "regret": means[best] - means[winner], "spread": spread,
    }  # fmt: skip


def _curve(run: RunPlan) -> dict:
    """Validation losses of a run by tokens; of a task, the accuracies too."""
    path = run.folder / "metrics.jsonl"
    rows = list(map(metrics_rows.row, path.read_text(encoding="utf-8").splitlines()))
    if None in rows:
        raise UserError(
            f"{path} is damaged: line {rows.index(None) + 1} is no row of metrics; the command that trained it mends it"
        )
    rows = [row for row in rows if row["split"] == "validation" and row["loss"] is not None]
    names = ("tokens", "loss", *(("accuracy",) if rows and "accuracy" in rows[0] else ()))
    return {name: [row.get(name) for row in rows] for name in names}


def _validation(plan: Plan, known: ResultsCache) -> dict | None:
    """What was scored; None before anything was."""
    for candidate in plan.candidates:
        for _, score in _finished(known, known.rate_runs(candidate)):
            reported = score.reported
            return {
                "choosing_documents": int((~reported).sum()),
                "choosing_tokens": int(score.tokens[~reported].sum()),
                "documents": int(reported.sum()),
                "tokens": int(score.tokens[reported].sum()),
                "bytes": float(score.bytes[reported].sum()),
                "hit_tokens": int(score.hit_tokens[reported].sum()),
                "frequent_pairs": score.frequent_pairs,
                "position_1_tokens": int(score.position_tokens[0]) if len(score.position_tokens) else 0,
            }
    return None


def _pairs(plan: Plan, known: ResultsCache) -> list[dict]:
    """Every two candidates that are complete, the better one first: two paired tests of the difference of their losses.

    Of a task, of the shares of labels that are wrong. None where nothing was scored of what is reported on.
    """
    complete = _complete(plan, known)
    if len(complete) < 2 or not any(score.tokens[score.reported].any() for score in next(iter(complete.values())).values()):
        return []
    measured = _Measured(complete)
    found = [measured.pair(i, j) for i, j in itertools.combinations(range(len(complete)), 2)]
    for name in ("over_documents", "over_seeds", "over_seeds_pooled"):
        tested = [pair[name] for pair in found if pair[name] is not None]
        for test, corrected in zip(tested, statistics.holm([test["p_value"] for test in tested])):
            test["corrected_p_value"] = corrected
    for pair in found:
        for name, seeds in (("significant", "over_seeds"), ("significant_pooled", "over_seeds_pooled")):
            tests = [pair["over_documents"], pair[seeds]]
            pair[name] = all(test is not None and test["corrected_p_value"] < statistics.SIGNIFICANT for test in tests)
    return found


def _complete(plan: Plan, known: ResultsCache) -> dict[str, dict[int, Scores]]:
    """Of each candidate whose runs at its best rate are all over, the scores of those that finished, by seed."""
    complete = {}
    for candidate in plan.candidates:
        rate = known.best_rate(candidate)
        if rate is not None and _is_complete(known, plan.seed_runs(candidate, rate)):
            scored = _finished(known, plan.seed_runs(candidate, rate))
            if scored:
                complete[candidate.label] = {run.seed: score for run, score in scored}
    return complete


class _Measured:
    """Candidates by what their runs measured on the reported documents, the best first, and tests between two of them."""

    def __init__(self, complete: dict[str, dict[int, Scores]]):
        first = next(iter(next(iter(complete.values())).values()))
        self._measure, self._reported = first.measure, first.reported
        means = {label: float(np.mean([self._mean(score) for score in by_seed.values()])) for label, by_seed in complete.items()}
        self._labels = sorted(complete, key=means.__getitem__)
        self._means = [means[label] for label in self._labels]
        self._by_seed = [complete[label] for label in self._labels]
        self._drawn = self._resampled(first)
        self._pooled = self._pooled_over_seeds()

    def pair(self, i: int, j: int) -> dict:
        """The difference of two candidates, and what each test says of it; None where it cannot be made."""
        difference = self._means[i] - self._means[j]
        over_documents = statistics.paired_over_documents(difference, self._drawn[i], self._drawn[j])
        return {
            "better": self._labels[i],
            "worse": self._labels[j],
            "difference": difference,
            "over_documents": dataclasses.asdict(over_documents),
            "over_seeds": self._over_seeds(i, j),
            "over_seeds_pooled": None if self._pooled is None else dataclasses.asdict(self._pooled(i, j)),
        }

    def _mean(self, score: Scores) -> float:
        return score.mean(self._measure, self._reported)

    def _resampled(self, first: Scores) -> np.ndarray:
        """Means over documents that were drawn again, of each candidate."""
        _, tokens = first.sums(self._measure, self._reported)
        by_document = np.array([
            np.mean([score.sums(self._measure, self._reported)[0] for score in by_seed.values()], axis=0)
            for by_seed in self._by_seed
        ])  # fmt: skip
        resamples = statistics.resamples_for(math.comb(len(self._by_seed), 2))
        return statistics.resampled_means(by_document, tokens, seed=BOOTSTRAP_SEED, resamples=resamples)

    def _pooled_over_seeds(self):
        shared = sorted(set.intersection(*map(set, self._by_seed)))
        if not shared:
            return None
        return statistics.pooled_over_seeds(
            np.array([[self._mean(by_seed[seed]) for seed in shared] for by_seed in self._by_seed])
        )

    def _over_seeds(self, i: int, j: int) -> dict | None:
        both = sorted(self._by_seed[i].keys() & self._by_seed[j].keys())
        if not both:
            return None
        test = statistics.paired_over_seeds(*([self._mean(self._by_seed[at][seed]) for seed in both] for at in (i, j)))
        return None if test.p_value is None else dataclasses.asdict(test)


def _warnings(plan: Plan, known: ResultsCache) -> list[str]:
    """What a reader should know before believing a row; one line for each kind, naming all whom it is about."""
    nowhere, somewhere, low, high, lost = [], [], [], [], []
    for candidate in plan.candidates:
        label, best, rates = candidate.label, known.best_rate(candidate), list(known.rates(candidate))
        tried = {each["rate"]: each for each in _rates(plan, known, candidate)}
        diverged = [rate for rate in rates if rate in tried and tried[rate]["diverged_at"]]
        if best is None:
            if len(tried) == len(rates):
                nowhere.append(f"{label} ({_listed(rates)})")
            continue
        if diverged:
            somewhere.append(f"{label} ({_listed(diverged)})")
        if len(rates) > 1 and best in (rates[0], rates[-1]) and tried[best].get("accuracy") != 1.0:
            (low if best == rates[0] else high).append(f"{label} ({best:g})")
        runs = plan.seed_runs(candidate, best)
        seeds = [run.seed for run in runs if (over := known.outcome(run)) is not None and over["status"] == DIVERGED]
        if seeds:
            lost.append(f"{label} ({len(seeds)} of {len(runs)})")
    ends = (
        (nowhere, "diverged at every learning rate: {}; add lower ones to config.learning_rates"),
        (somewhere, "diverged at a learning rate: {}"),
        (low, "the best learning rate is the lowest that was tried: {}; a lower one may be better (config.learning_rates, "
              "config.rate_extensions)"),
        (high, "the best learning rate is the highest that was tried: {}; a higher one may be better (config.learning_rates, "
               "config.rate_extensions)"),
        (lost, "seeds diverged at the best learning rate: {}; the figures are of the rest"),
    )  # fmt: skip
    found = [text.format(", ".join(whom)) for whom, text in ends if whom]
    if len(plan.rates()) == 1:
        found.append(
            f"one learning rate was tried, {plan.rates()[0]:g}; another may be better, for one mixer more than for another"
        )
    return found


def _few(plan: Plan, validation: dict | None) -> list[str]:
    """Of text: documents too few for what the report says of them."""
    if validation is None or plan.base["data"]["task"] != TEXT:
        return []
    halves = (("documents", "reported on"), ("choosing_documents", "learning rates chosen on"))
    return [warning for name, what in halves if (warning := few_documents(validation[name], what)) is not None]


def _unlike(starts: dict) -> list[str]:
    """That the mixers' starts differ, if they do."""
    return [f"the mixers start unlike: {'; '.join(starts['differences'])}"] if starts["differences"] else []


def _busy(rows: dict) -> list[str]:
    """Whose speeds were measured beside other work."""
    loads = {label: row["cost"]["load_per_core"] for label, row in rows.items() if row["cost"] is not None}
    busy = [label for label, load in loads.items() if load > BUSY]
    if not busy:
        return []
    return [
        f"the machine was busy with other work (up to {max(loads.values()):.1f} processes a core) when the speeds of "
        f"{', '.join(busy)} were measured; delete their cost.json and start the same command again on a quiet one"
    ]


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _json(value):
    """The same with null for what is not finite, which JSON has no number for."""
    if isinstance(value, dict):
        return {str(name): _json(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
