"""The text of a report, from results.json alone, whatever its format: sentences, tables, circumstances, methods."""

import math
from collections.abc import Mapping, Sequence

from seqmodels import references, screen
from seqmodels.comparison import audit, statistics
from seqmodels.comparison import metric as metrics
from seqmodels.comparison.report.columns import ALL, EMPTY, QUALITY, diverged, number, shown_columns

MOST_NAMED = 12  # mixers in one sentence


def headline(results: Mapping) -> str:
    """What the evidence allows to say, first; then who has the best mean, and what that is worth over no mixer."""
    metric = metrics.of(results)
    scored = [(label, row) for label, row in ranked(results) if is_scored(row, metric) and not row["is_control"]]
    if not scored:
        return " ".join(["No mixer has figures.", *_without_figures(results)])
    best, row = scored[0]
    value = number(row["quality"][metric.name]["mean"], metric.digits)
    mean = f"{value} {metric.title}" if metric.is_text else f"{metric.title} {value}"
    parts = []
    if len(scored) > 1:
        parts.append(_evidence(results, [label for label, _ in scored]))
        of_seeds = "" if results["comparison"]["seeds"] == 1 else " mean"
        parts.append(f"{'Lowest' if metric.is_text else 'Highest'}{of_seeds} of {len(scored)}: {best}, {mean}.")
        against = [pair for pair in results["pairs"] if pair["better"] == best and pair["worse"] != results["control"]]
        worse, open_ = ([pair["worse"] for pair in against if pair["significant"] is real] for real in (True, False))
        if worse:
            parts.append(f"Worse than it by both tests below: {_named(worse)}.")
            parts += [f"Not shown to be worse: {_named(open_)}."] if open_ else []
    else:
        parts.append(f"{best} has {mean}.")
    parts.append(_over_no_mixer(results, [label for label, _ in scored]))
    return " ".join(filter(None, [*parts, *_without_figures(results)]))


def is_scored(row: Mapping, metric: metrics.Metric) -> bool:
    """Whether a mixer has figures of what is reported on."""
    return row["quality"] is not None and row["quality"][metric.name]["mean"] is not None


def _without_figures(results: Mapping) -> list[str]:
    """Sentences on the mixers without figures, by why they have none."""
    metric, seeds = metrics.of(results), results["comparison"]["seeds"]
    everywhere, at_best, unscored, due = [], [], [], []
    for label, row in results["mixers"].items():
        if is_scored(row, metric):
            continue
        if row["quality"] is not None:
            unscored.append(label)
        elif diverged(results, row) == ALL:
            everywhere.append(label)
        elif row["best_rate"] is not None and len(row["diverged"]) == seeds:
            at_best.append(label)
        else:
            due.append(label)
    reasons = (
        (everywhere, "Diverged at every learning rate"),
        (at_best, "Diverged with every seed at its best learning rate"),
        (unscored, f"Too few {metric.documents}, none of those that are reported on was scored"),
        (due, "No figures yet"),
    )
    return [f"{reason}: {_named(whom)}." for whom, reason in reasons if whom]


def _named(labels: Sequence[str]) -> str:
    """Their names, or the first of them and how many more there are."""
    more = f" and {len(labels) - MOST_NAMED} more" if len(labels) > MOST_NAMED + 1 else ""
    return ", ".join(labels[:MOST_NAMED] if more else labels) + more


def _evidence(results: Mapping, labels: Sequence[str]) -> str:
    """Whether the tests show that any two mixers differ."""
    pairs = [pair for pair in results["pairs"] if {pair["better"], pair["worse"]} <= set(labels)]
    sure = sum(pair["significant"] for pair in pairs)
    seeds = results["comparison"]["seeds"]
    if seeds == 1:
        return "One seed cannot show a difference between mixers."
    pooled = [pair["significant_pooled"] for pair in pairs]
    if_alike = (
        "" if None in pooled  # earlier versions have no such test
        else f" If the noise between seeds is alike for all mixers, {sum(pooled)} of {len(pairs)} pairs differ."
    )  # fmt: skip
    if not sure:
        return f"{seeds} seeds do not show a difference between any two of these mixers.{if_alike}"
    return f"The tests show {sure} of {len(pairs)} pairs of mixers to differ.{if_alike}"


def _over_no_mixer(results: Mapping, labels: Sequence[str]) -> str:
    """What mixing tokens is worth: against the same model without a mixer."""
    control = results["control"]
    gains = {label: results["mixers"][label]["gain"] for label in labels}
    gains = {
        label: gain["bits_per_byte"] for label, gain in gains.items() if gain is not None and gain["bits_per_byte"] is not None
    }
    if control is None or not gains:
        return ""
    shown = {pair["better"] for pair in results["pairs"] if pair["worse"] == control and pair["significant"]}
    low, high = min(gains, key=gains.__getitem__), max(gains, key=gains.__getitem__)
    worse = [label for label, gain in gains.items() if gain <= 0]
    over = f"Over {control} (the same model of MLPs alone)"
    if len(gains) == 1:
        said = f"{over} {low} gains {gains[low]:.4f} bits per byte"
    else:
        said = f"{over} mixers gain {gains[low]:.4f} ({low}) to {gains[high]:.4f} ({high}) bits per byte"
    said += f"; no better than none: {_named(worse)}." if worse else "."
    if results["comparison"]["seeds"] == 1:
        return f"{said} One seed cannot show that gain." if len(gains) == 1 else said
    return f"{said} The tests show that gain for {len(shown & set(gains))} of {len(gains)}."


def terminal(results: Mapping, room: int | None = None) -> str:
    """The main figures as an aligned table of plain text, the best first, the control last.

    Args:
        room: columns of the terminal.
    """
    metric = metrics.of(results)
    titles = {metric.title, "gain over no mixer", "loss at position 1", "learning rate", "diverged"}
    shown = [column for column in shown_columns(results, QUALITY) if column.title in titles]
    rows = [[label, *(column.text(row) for column in shown)] for label, row in ranked(results)]
    return screen.table(["mixer", *(column.title for column in shown)], rows, left=["mixer"], room=room)


def circumstances(results: Mapping) -> list[tuple[str, str]]:
    """Name and text of each fact that a reader needs to make the comparison again."""
    about, compare, base = results["about"], results["comparison"], results["base"]
    tokens = base["train"]["steps"] * base["data"]["batch_size"] * base["data"]["seq_len"]
    source = base["data"]["source"] if metrics.of(results).is_text else f"the task {base['data']['task']}"
    grid = _listed(sorted(compare["learning_rates"]))
    several = len(compare["learning_rates"]) > 1
    cost = next(
        (row["cost"] for row in results["mixers"].values() if row["cost"]), {"device": None, "peak_flops_per_second": None}
    )
    device, peak, machine = cost["device"], cost["peak_flops_per_second"], about["machine"]
    return [
        ("Matched", _matched(results["matched"])),
        ("Training", f"{source}, {tokens:,} tokens ({base['train']['steps']:,} steps of {base['data']['batch_size']} x "
                     f"{base['data']['seq_len']}), {compare['seeds']} seed(s) from {base['seed']} on"),
        ("Training data", f"{about['training_data']}: a digest, equal for equal text, split and tokenizer"),
        ("Learning rates", f"{grid} and beyond, each mixer its own (see below)" if several else f"{grid}, for every mixer"),
        *([] if results["validation"] is None else [("Reported on", _reported_on(results))]),
        ("Device", f"{device or 'not measured yet'}; {machine['processor']}, {machine['cores']} cores"),
        ("Utilisation", f"of {peak / 1e12:,.0f} TFLOP/s, the data sheet's dense bfloat16 peak" if peak else
                        "empty: no data sheet gives this device's peak"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in about["versions"].items())),
        ("Commit", f"{about['commit']}, {about['date']}"),
        ("Command", about["command"]),
    ]  # fmt: skip


def _matched(matched: Mapping | None) -> str:
    if matched is None:
        return "nothing: every mixer has the sizes of the base"
    return f"{matched['in_words']}, within {matched['tolerance']:.1%} of {matched['reference']}'s {matched['value']:,.0f}"


def _reported_on(results: Mapping) -> str:
    validation = results["validation"]
    if not metrics.of(results).is_text:
        return (
            f"the odd-numbered test examples: {validation['documents']:,} examples, {validation['tokens']:,} labels; the mean over "
            "the test's lengths, each counting once"
        )
    return (
        f"the odd-numbered validation documents: {validation['documents']:,} documents, {validation['tokens']:,} tokens, "
        f"{validation['bytes']:,.0f} bytes; {validation['hit_tokens']:,} of the tokens are repeated bigrams, "
        f"{validation['frequent_pairs']:,} pairs of tokens being left out as frequent in training"
    )


def main_table(results: Mapping, part: str) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of a part, the best first; a mixer without figures is last, its cells empty."""
    shown = shown_columns(results, part)
    rows = [[label, *(column.text(row) for column in shown)] for label, row in ranked(results)]
    return ["mixer", *(column.title for column in shown)], rows


def papers(results: Mapping, label: str) -> list[references.Reference]:
    """Of the mixers in a row's pattern."""
    found = map(references.of_mixer, mixers_of(results, label))
    return [reference for reference in found if reference is not None]


def mixers_of(results: Mapping, label: str) -> list[str]:
    """Those in a row's pattern that this repository has."""
    return references.mixers_in(results["mixers"][label]["sizes"]["pattern"])


def ranked(results: Mapping) -> list[tuple[str, Mapping]]:
    """The mixers, the best first; after them the control, which is not ranked."""
    metric = metrics.of(results)

    def key(item):
        """Of two that are alike in the metric, the smaller loss is first."""
        quality, last = item[1]["quality"], item[1]["is_control"]
        if not is_scored(item[1], metric):
            return last, math.inf, math.inf
        return last, quality[metric.name]["mean"] * (1 if metric.is_text else -1), quality["loss"]["mean"]

    return sorted(results["mixers"].items(), key=key)


def paragraph_on_pairs(results: Mapping) -> list[str]:
    seeds, metric = results["comparison"]["seeds"], metrics.of(results)
    if not results["pairs"]:
        return ["Nothing: there are no two mixers with figures."]
    lines = [
        f"By how much the mixer of a row is better than that of a column: the difference of the {metric.compared}. Two paired tests "
        f"are made of it. Over {metric.documents}: a bootstrap that draws the same reported {metric.documents} for both, of the "
        f"means over the seeds; it says what other {metric.documents} of the kind might give. Over seeds: Student's paired test, a "
        "seed being the same order of the data for both; it says what training again might give. p-values are Holm's, corrected for "
        f"the number of pairs. A star: both are below {statistics.SIGNIFICANT}. A plus: so they are if the second takes its noise "
        "from all mixers, as if it were alike for all of them (the residuals of an additive model of mixer and seed). results.json "
        "has all of them."
    ]
    tests = len(results["pairs"])
    ratio = statistics.least_ratio(seeds, tests)
    if ratio is None:
        lines += ["", "There is one seed, so nothing is known of training again, and no difference is shown."]
    else:
        lines += [
            "",
            f"With {seeds} seeds and {tests} pairs, the first difference to be shown over seeds must be {ratio:,.1f} times its own "
            "standard deviation between seeds. Without a star a difference is not shown; that is no sign of equality.",
        ]  # fmt: skip
    return lines


def pair_matrix(results: Mapping) -> tuple[list[str], list[list[str]]]:
    """The upper triangle, best to worst: how much better the row is, and whether the tests show it."""
    by_pair = {(pair["better"], pair["worse"]): pair for pair in results["pairs"]}
    order = order_of_pairs(results)
    rows = []
    for better in order[:-1]:
        cells = [by_pair[better, worse] if (better, worse) in by_pair else None for worse in order[1:]]
        rows.append([better, *(EMPTY if pair is None else _better_by(pair) for pair in cells)])
    return ["better by", *order[1:]], rows


def _better_by(pair: Mapping) -> str:
    """Nothing where none of the documents that are reported on was scored: there is no difference then."""
    return EMPTY if pair["difference"] is None else number(abs(pair["difference"]), 3) + mark(pair)


def mark(pair: Mapping) -> str:
    return "*" if pair["significant"] else "+" if pair["significant_pooled"] else ""


def order_of_pairs(results: Mapping) -> list[str]:
    """Best first, the control among the others: the order in which `pairs` lists the better ones."""
    wins: dict[str, int] = {}
    for pair in results["pairs"]:
        wins[pair["better"]] = wins[pair["better"]] + 1 if pair["better"] in wins else 1
        wins[pair["worse"]] = wins[pair["worse"]] if pair["worse"] in wins else 0
    return sorted(wins, key=lambda label: -wins[label])


def describe_pair(pair: Mapping) -> str:
    """A difference with everything the tests say of it."""
    documents, seeds = pair["over_documents"], pair["over_seeds"]
    if pair["difference"] is None:
        return f"{pair['better']} and {pair['worse']}: nothing was scored that tells them apart"
    said = (
        f"{pair['better']} less {pair['worse']}: {number(pair['difference'], 4)} [{number(documents['low'], 4)}, "
        f"{number(documents['high'], 4)}], p {probability(documents['corrected_p_value'])}"
    )
    if seeds is None:
        return said
    said += f"; over seeds p {probability(seeds['corrected_p_value'])}"
    pooled = pair["over_seeds_pooled"]
    return said if pooled is None else f"{said}, of pooled noise p {probability(pooled['corrected_p_value'])}"


def paragraph_on_starts(results: Mapping) -> list[str]:
    found = results["audit"]
    lines = [
        "Of the untrained models, on tokens of the training data: the token's share is the part of the residual stream's variance "
        "that a multiple of the token's own embedding explains (squared correlation over positions and features), after the first and "
        "the last layer; rms of the stream after the last layer and of what the mixers add to it; norms of the loss's gradient. "
        "Where mixers start unlike, their order may be that of their starts."
    ]
    if found["differences"]:
        lines += ["", "The mixers start unlike: " + "; ".join(found["differences"]) + "."]
    elif any(row["start"] for row in results["mixers"].values()):
        lines += ["", "The mixers start alike, within the bounds of seqmodels/comparison/audit.py."]
    return lines


def start_tables(results: Mapping) -> list[tuple[list[str], list[list[str]]]]:
    """Each mixer's start beside its result; then what goes with the result over the mixers."""
    names = [name for name in audit.MEANINGS if name != "position_1_loss"]
    rows = [(label, row["start"]["summary"]) for label, row in ranked(results) if row["start"] is not None]
    names = [name for name in names if any(name in summary for _, summary in rows)]
    tables = []
    if rows:
        cells = [[EMPTY if summary.get(name) is None else f"{summary[name]:.3g}" for name in names] for _, summary in rows]
        heads = ["mixer", *(audit.MEANINGS[name] for name in names)]
        tables.append((heads, [[label, *row] for (label, _), row in zip(rows, cells)]))
    spearman = results["audit"]["spearman"]
    if spearman:
        tables.append(
            (
                ["figure", "Spearman with the loss over the mixers", "p", "mixers"],
                [
                    [each["in_words"], f"{each['rho']:+.2f}", probability(each["p_value"]), str(each["values"])]
                    for each in spearman.values()
                ],
            )
        )
    return tables


def paragraph_on_rates(results: Mapping) -> list[str]:
    compare, search = results["comparison"], results["rate_search"]
    length = (
        f"runs of {compare['rate_steps']:,} of {results['base']['train']['steps']:,} steps, in which warm-up and decay take the same "
        "part of the run" if compare["rate_steps"] else "runs of full length"
    )  # fmt: skip
    rates = _listed(sorted(compare["learning_rates"]))
    if len(compare["learning_rates"]) == 1:
        return [f"There was none: every mixer has {rates}."]
    whom = "validation documents" if metrics.of(results).is_text else "test examples"
    beyond = (
        f", and where the best lies at an end twice or half that rate, up to {compare['rate_extensions']} times"
        if compare["rate_extensions"] else ""
    )  # fmt: skip
    lines = [f"{rates}{beyond}; by {length}, {compare['rate_seeds']} seed(s) each, on the even-numbered {whom}."]
    if search is not None:
        lines[0] += (
            f" The search is {search['runs']} runs and {search['tokens']:,} tokens, {search['share_of_tokens']:.0%} of all that is "
            f"trained here; it took {search['seconds'] / 3600:.2f} hours so far."
        )
    grid = set(compare["learning_rates"])
    added = {
        label: [each["rate"] for each in row["rates"] if each["rate"] not in grid] for label, row in results["mixers"].items()
    }
    added = [f"{label} ({_listed(rates)})" for label, rates in added.items() if rates]
    return [*lines, "", f"Rates beyond the grid were tried for {', '.join(added)}."] if added else lines


def rate_tables(results: Mapping) -> list[tuple[list[str], list[list[str]]]]:
    """Where every rate was trained at full length: whether the one that short runs chose wins there."""
    rows = []
    for label, row in results["mixers"].items():
        found = row["rates_at_length"]
        if found is not None:
            spread = EMPTY if found["spread"] is None else number(found["spread"], 4)
            rows.append([label, f"{row['best_rate']:g}", f"{found['best']:g}", number(found["regret"], 4), spread])
    if not rows:
        return []
    heads = ["mixer", "chosen by short runs", "best at full length", "lost by the choice", "standard deviation between seeds"]
    return [(heads, rows)]


def size_table(results: Mapping) -> tuple[list[str], list[list[str]]]:
    quantity = "parameters" if results["matched"] is None else results["matched"]["in_words"]
    rows = [
        [label, row["sizes"]["in_words"], f"{row['counted']:,.0f}", f"{row['of_reference']:+.2%}"]
        for label, row in results["mixers"].items()
    ]
    return ["mixer", "sizes", quantity, "of the first"], rows


def commands(results: Mapping) -> list[tuple[str, str]]:
    return [(label, run["command"]) for label, row in results["mixers"].items() for run in row["runs"]]


def _listed(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def probability(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


# -- for a paper


def methods(results: Mapping) -> list[str | tuple[str, ...]]:
    """A paragraph for the methods section of a paper: texts, and between them the keys of what is cited there."""
    base, compare, matched = results["base"], results["comparison"], results["matched"]
    metric, data, optim = metrics.of(results), base["data"], base["optim"]
    labels = [label for label in results["mixers"] if label != results["control"]]
    cited = tuple(dict.fromkeys(reference.key for label in labels for reference in papers(results, label)))
    tokens = base["train"]["steps"] * data["batch_size"] * data["seq_len"]
    several = len(compare["learning_rates"]) > 1
    models = "language models" if metric.is_text else "models"
    parts: list[str | tuple[str, ...]] = [
        f"We compare {len(labels)} sequence mixers" if len(labels) > 1 else "We train one mixer"
    ]
    parts += [cited] if cited else []
    parts.append(f" in {models} that share everything else" if len(labels) > 1 else f" in {models}")
    if matched is not None:
        parts.append(f" and have the same {matched['in_words']} within {matched['tolerance']:.1%} ({matched['value']:,.0f})")
    parts += _short_convs(base["model"])
    parts.append(f". Each is trained on {tokens:,} tokens ")
    if not metric.is_text:
        parts.append(f"of the synthetic task {data['task']} ")
    elif "tinystories" in str(data["source"]).lower():
        parts += ["of TinyStories", ("eldan2023tinystories",), " "]
    parts.append(f"({base['train']['steps']:,} steps of {data['batch_size']} sequences of {data['seq_len']} tokens) with ")
    parts += ["AdamW", ("loshchilov2017adamw",)] if _optimizer(optim) == "adamw" else [_optimizer(optim)]
    parts.append(
        f", weight decay {optim['weight_decay']:g}, {optim['warmup_steps']} warm-up steps and a {optim['schedule']} schedule"
    )
    if several:
        of_length = f"runs of {compare['rate_steps']:,} steps" if compare["rate_steps"] else "runs of full length"
        parts.append(
            f". Each mixer has its own peak learning rate, the best of {_listed(sorted(compare['learning_rates']))}"
            f"{' and of rates beyond the ends of this grid' if compare['rate_extensions'] else ''} by {of_length} on "
            f"{metric.documents} that are not reported"
        )
    else:
        parts.append(f". Every mixer has the peak learning rate {_listed(compare['learning_rates'])}")
    parts.append(". We report one seed" if compare["seeds"] == 1 else f". We report means over {compare['seeds']} seeds")
    if results["pairs"]:
        parts += [
            f", and call two mixers different where a paired bootstrap over {metric.documents}", ("koehn2004",),
            " and Student's paired test over seeds both have p-values below "
            f"{statistics.SIGNIFICANT} after Holm's correction for the number of pairs", ("holm1979",),
        ]  # fmt: skip
    return [*parts, "."]


def _short_convs(model: Mapping) -> list[str | tuple[str, ...]]:
    """What differs from the mixers' papers; results of runs made before there was a choice do not name it."""
    chosen = model["short_conv"] if "short_conv" in model else "own"
    if chosen == "own":
        return []
    if chosen == "none":
        return [". The mixers' own short convolutions are left out"]
    return [
        ". Mixers without a short convolution of their own read x + conv(x), causal and depthwise over four steps",
        ("allenzhu2025canon",),
    ]


def _optimizer(optim: Mapping) -> str:
    """Results of runs made before there was a choice do not name it."""
    return optim["name"] if "name" in optim else "adamw"


def cited(results: Mapping) -> dict[str, references.Reference]:
    """What the methods paragraph cites, by its key, in order."""
    keys = dict.fromkeys(key for part in methods(results) if isinstance(part, tuple) for key in part)
    known = references.references() | {
        reference.key: reference for label in results["mixers"] for reference in papers(results, label)
    }
    return {key: known[key] for key in keys}
