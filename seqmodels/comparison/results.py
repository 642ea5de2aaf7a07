"""From what lies in a comparison's folder to results.json: every figure that the report shows, and nothing else."""

import dataclasses
import json
import math
from collections.abc import Sequence

import numpy as np

from seqmodels.comparison import jobs, statistics
from seqmodels.comparison.jobs import DIVERGED, FINISHED, ResultsCache
from seqmodels.comparison.plan import MATCH_NONE, Candidate, Plan, RunPlan
from seqmodels.comparison.scores import Scores
from seqmodels.comparison.sizes import QUANTITIES
from seqmodels.evaluation.perplexity import by_context_length, perplexity

BOOTSTRAP_SEED = 0
SIGNIFICANT = 0.05
BUSY = 2.0  # processes a core; the comparison's own training, just ended, is one or a little more


def gather(plan: Plan, vocab_size: int, about: dict) -> dict:
    """The results so far; candidates that are not complete have no `quality`.

    Args:
        about: command, versions, machine: what a figure means nothing without.
    """
    known = ResultsCache(plan)
    rows = {candidate.label: _candidate(plan, known, candidate, vocab_size) for candidate in plan.candidates}
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
        "validation": _validation(plan, known),
        "mixers": rows,
        "pairs": _pairs(plan, known),
        "warnings": [
            *(warning for candidate in plan.candidates for warning in _warnings(plan, known, candidate)), *_busy(rows)
        ],
    })  # fmt: skip


def _candidate(plan: Plan, known: ResultsCache, candidate: Candidate, vocab_size: int) -> dict:
    matched, rate = candidate.matched, known.best_rate(candidate)
    asked = jobs.asked_cost(plan, candidate, vocab_size)
    row = {
        "sizes": dataclasses.asdict(matched.sizes) | {"in_words": str(matched.sizes)},
        "counted": matched.counted,
        "of_reference": matched.of_reference,
        "rates": _rates(plan, known, candidate),
        "best_rate": rate,
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
    nats_to_bits_per_byte = first.tokens[first.reported].sum() / (math.log(2) * first.bytes[first.reported].sum())
    with np.errstate(invalid="ignore"):
        by_position = np.mean([score.by_position() for score in scored], axis=0)
    return {
        "losses": losses,
        "loss": dataclasses.asdict(loss),
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
    for run in plan.rate_runs(candidate):
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


def _curve(run: RunPlan) -> dict:
    """Validation losses of a run by tokens; of a task, the accuracies too."""
    lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == "validation" and row["loss"] is not None]
    names = ("tokens", "loss", *(("accuracy",) if rows and "accuracy" in rows[0] else ()))
    return {name: [row[name] for row in rows] for name in names}


def _validation(plan: Plan, known: ResultsCache) -> dict | None:
    """What was scored; None before anything was."""
    for candidate in plan.candidates:
        for _, score in _finished(known, plan.rate_runs(candidate)):
            reported = score.reported
            return {
                "choosing_documents": int((~reported).sum()),
                "choosing_tokens": int(score.tokens[~reported].sum()),
                "documents": int(reported.sum()),
                "tokens": int(score.tokens[reported].sum()),
                "bytes": float(score.bytes[reported].sum()),
                "hit_tokens": int(score.hit_tokens[reported].sum()),
            }
    return None


def _pairs(plan: Plan, known: ResultsCache) -> list[dict]:
    """Every two candidates that are complete, the better one first: two paired tests of the difference of their losses.

    Of a task, of the shares of labels that are wrong.
    """
    complete = []
    for candidate in plan.candidates:
        rate = known.best_rate(candidate)
        if rate is not None and _is_complete(known, plan.seed_runs(candidate, rate)):
            scored = _finished(known, plan.seed_runs(candidate, rate))
            if scored:
                complete.append((candidate.label, {run.seed: score for run, score in scored}))
    if len(complete) < 2:
        return []
    first = next(iter(complete[0][1].values()))
    reported, measure = first.reported, first.measure
    means = {
        label: float(np.mean([score.mean(measure, reported) for score in by_seed.values()])) for label, by_seed in complete
    }
    complete.sort(key=lambda item: means[item[0]])
    _, tokens = first.sums(measure, reported)
    by_document = np.array([
        np.mean([score.sums(measure, reported)[0] for score in by_seed.values()], axis=0) for _, by_seed in complete
    ])  # fmt: skip
    resamples = statistics.resamples_for(len(complete) * (len(complete) - 1) // 2)
    drawn = statistics.resampled_means(by_document, tokens, seed=BOOTSTRAP_SEED, resamples=resamples)
    found = []
    for i, (better, by_seed) in enumerate(complete):
        for j in range(i + 1, len(complete)):
            worse, others = complete[j]
            both = sorted(by_seed.keys() & others.keys())
            pair = {"better": better, "worse": worse, "difference": means[better] - means[worse]}
            over_documents = statistics.paired_over_documents(pair["difference"], drawn[i], drawn[j])
            pair["over_documents"] = dataclasses.asdict(over_documents)
            over_seeds = statistics.paired_over_seeds(
                *([of[seed].mean(measure, reported) for seed in both] for of in (by_seed, others))
            ) if both else None  # fmt: skip
            pair["over_seeds"] = None if over_seeds is None or over_seeds.p_value is None else dataclasses.asdict(over_seeds)
            found.append(pair)
    for name in ("over_documents", "over_seeds"):
        tested = [pair[name] for pair in found if pair[name] is not None]
        for test, corrected in zip(tested, statistics.holm([test["p_value"] for test in tested])):
            test["corrected_p_value"] = corrected
    for pair in found:
        tests = [pair[name] for name in ("over_documents", "over_seeds")]
        pair["significant"] = all(test is not None and test["corrected_p_value"] < SIGNIFICANT for test in tests)
    return found


def _warnings(plan: Plan, known: ResultsCache, candidate: Candidate) -> list[str]:
    """What a reader should know before believing a row."""
    found, rates, best = [], sorted(plan.compare.learning_rates), known.best_rate(candidate)
    tried = {each["rate"]: each for each in _rates(plan, known, candidate)}
    if len(tried) == len(rates) and best is None:
        found.append(f"{candidate.label} diverged at every learning rate ({_listed(rates)}): add lower ones")
    diverged = [rate for rate in rates if rate in tried and tried[rate]["diverged_at"]]
    if best is None:
        return found
    if diverged:
        found.append(f"{candidate.label} diverged at a learning rate of {_listed(diverged)}")
    if len(rates) == 1:
        found.append(f"{candidate.label}: one learning rate was tried, {best:g}; another may be better")
    elif best in (rates[0], rates[-1]) and tried[best].get("accuracy") != 1.0:
        side, more = ("lowest", "lower") if best == rates[0] else ("highest", "higher")
        found.append(
            f"{candidate.label}: the best learning rate, {best:g}, is the {side} that was tried; a {more} one may be better "
            "(--config.learning_rates)"
        )
    runs = plan.seed_runs(candidate, best)
    lost = [run.seed for run in runs if (over := known.outcome(run)) is not None and over["status"] == DIVERGED]
    if lost:
        found.append(f"{candidate.label}: {len(lost)} of {len(runs)} seeds diverged ({_listed(lost)}); the figures are of the rest")
    return found


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
