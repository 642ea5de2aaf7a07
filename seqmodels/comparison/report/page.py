"""The report: one HTML file that needs nothing else, and the same in Markdown beside its pictures."""

import base64
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from seqmodels.comparison import audit, statistics
from seqmodels.comparison import measure as measures
from seqmodels.comparison.report.figures import ReportFigure
from seqmodels.escape import code_block, escape

EMPTY = ""


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the main table."""

    title: str
    meaning: str
    text: Callable[[Mapping], str]
    key: Callable[[Mapping], float | str | None]  # to sort by; None sorts last


def markdown(results: Mapping, pictures: Sequence[ReportFigure]) -> str:
    """The report as Markdown; its pictures are files beside it."""
    lines = ["# Comparison", "", escape(headline(results), "markdown"), ""]
    lines += [f"- **Warning:** {escape(warning, 'markdown')}" for warning in results["warnings"]]
    lines += ["", *(f"- {name}: {escape(text, 'markdown')}" for name, text in _circumstances(results)), ""]
    lines += _markdown_table(*_main_table(results))
    lines += ["", *(f"- {column.title}: {column.meaning}" for column in _columns(results)), ""]
    lines += ["## What the tests show", "", *_as_markdown(_paragraph_on_pairs(results)), ""]
    lines += _markdown_table(*_pair_matrix(results))
    lines += ["", "## How the mixers start", "", *_as_markdown(_paragraph_on_starts(results)), ""]
    for table in _start_tables(results):
        lines += [*_markdown_table(*table), ""]
    lines += ["## The search for the learning rates", "", *_as_markdown(_paragraph_on_rates(results)), ""]
    for table in _rate_tables(results):
        lines += [*_markdown_table(*table), ""]
    lines += ["## Sizes", ""]
    lines += _markdown_table(*_size_table(results))
    for picture in pictures:
        lines += ["", f"## {picture.title}", "", f"![{picture.title}]({picture.file})", "", picture.caption]
    lines += ["", "## Commands", "", "Every run that is reported, from the folder of the repository:", ""]
    lines += code_block([command for _, command in _commands(results)])
    return "\n".join([*lines, ""])


def page(results: Mapping, pictures: Sequence[ReportFigure], folder: Path) -> str:
    """The report as HTML, the pictures of `folder` inside it."""
    heads, rows = _main_table(results)
    columns = _columns(results)
    body = [f'<h1>Comparison</h1><p class="lead">{_escape(headline(results))}</p>']
    body += [f'<p class="warning">{_escape(warning)}</p>' for warning in results["warnings"]]
    body.append(_html_sortable(columns, heads, rows, results))
    body.append(
        "<details><summary>What the columns mean</summary><dl>"
        + "".join(f"<dt>{_escape(column.title)}</dt><dd>{_escape(column.meaning)}</dd>" for column in columns)
        + "</dl></details>"
    )
    facts = "".join(
        f'<dt>{_escape(name)}</dt><dd class="{name.lower()}">{_escape(text)}</dd>'
        for name, text in _circumstances(results)
    )
    body.append(f"<h2>Circumstances</h2><dl>{facts}</dl>")
    body.append("<h2>What the tests show</h2>")
    body += [f"<p>{_escape(text)}</p>" for text in _paragraph_on_pairs(results) if text]
    body.append(_html_matrix(*_pair_matrix(results), results))
    body.append("<h2>How the mixers start</h2>")
    body += [f"<p>{_escape(text)}</p>" for text in _paragraph_on_starts(results) if text]
    body += [_html_table(*table) for table in _start_tables(results)]
    body.append("<h2>The search for the learning rates</h2>")
    body += [f"<p>{_escape(text)}</p>" for text in _paragraph_on_rates(results) if text]
    body += [_html_table(*table) for table in _rate_tables(results)]
    body.append("<h2>Sizes</h2>")
    body.append(_html_table(*_size_table(results)))
    for picture in pictures:
        data = base64.b64encode((folder / picture.file).read_bytes()).decode()
        body.append(
            f'<h2>{_escape(picture.title)}</h2><figure><img alt="{_escape(picture.title)}" src="data:image/png;base64,{data}"/>'
            f"<figcaption>{_escape(picture.caption)}</figcaption></figure>"
        )
    commands = "\n".join(_escape(command) for _, command in _commands(results))
    body.append(f"<details><summary>The command of every run that is reported</summary><pre>{commands}</pre></details>")
    return TEMPLATE.replace("$STYLE", STYLE).replace("$SCRIPT", SCRIPT).replace("$BODY", "\n".join(body))


# -- what both say


def headline(results: Mapping) -> str:
    """What the evidence allows to say, first; then who has the best mean, and what that is worth over no mixer."""
    measure = measures.of(results)
    scored = [(label, row) for label, row in _ranked(results) if row["quality"] and not row["is_control"]]
    missing = [label for label, row in results["mixers"].items() if row["quality"] is None]
    if not scored:
        everything = all(row["cost"] for row in results["mixers"].values())  # the last thing to be measured
        return "Every mixer diverged at every learning rate." if everything else "No mixer is complete yet."
    best, row = scored[0]
    value = _number(row["quality"][measure.name]["mean"], measure.digits)
    mean = f"{value} {measure.title}" if measure.is_text else f"{measure.title} {value}"
    parts = []
    if len(scored) > 1:
        parts.append(_evidence(results, [label for label, _ in scored]))
        parts.append(f"{'Lowest' if measure.is_text else 'Highest'} mean of {len(scored)}: {best}, {mean}.")
        against = [pair for pair in results["pairs"] if pair["better"] == best and pair["worse"] != results["control"]]
        worse, open_ = ([pair["worse"] for pair in against if pair["significant"] is real] for real in (True, False))
        if worse:
            parts.append(f"Worse than it by both tests below: {', '.join(worse)}.")
            parts += [f"Not shown to be worse: {', '.join(open_)}."] if open_ else []
    else:
        parts.append(f"{best} has {mean}.")
    parts.append(_over_no_mixer(results, [label for label, _ in scored]))
    if missing:
        parts.append(f"Without figures: {', '.join(missing)}.")
    return " ".join(filter(None, parts))


def _evidence(results: Mapping, ranked: Sequence[str]) -> str:
    """Whether the tests show that any two mixers differ."""
    pairs = [pair for pair in results["pairs"] if {pair["better"], pair["worse"]} <= set(ranked)]
    sure = sum(pair["significant"] for pair in pairs)
    seeds = results["comparison"]["seeds"]
    if seeds == 1:
        return "One seed cannot show a difference between mixers."
    pooled = sum(pair["significant_pooled"] for pair in pairs)
    if_alike = f"If the noise between seeds is alike for all mixers, {pooled} of {len(pairs)} pairs differ."
    if not sure:
        return f"{seeds} seeds do not show a difference between any two of these mixers. {if_alike}"
    return f"The tests show {sure} of {len(pairs)} pairs of mixers to differ. {if_alike}"


def _over_no_mixer(results: Mapping, ranked: Sequence[str]) -> str:
    """What mixing tokens is worth: against the same model without a mixer."""
    control = results["control"]
    gains = {label: results["mixers"][label]["gain"] for label in ranked}
    gains = {label: gain["bits_per_byte"] for label, gain in gains.items() if gain is not None}
    if control is None or not gains:
        return ""
    shown = {pair["better"] for pair in results["pairs"] if pair["worse"] == control and pair["significant"]}
    low, high = min(gains, key=gains.__getitem__), max(gains, key=gains.__getitem__)
    worse = [label for label, gain in gains.items() if gain <= 0]
    said = (
        f"Over {control} (the same model of MLPs alone) mixers gain {gains[low]:.4f} ({low}) to {gains[high]:.4f} ({high}) bits "
        "per byte"
    )
    said += f"; no better than none: {', '.join(worse)}." if worse else "."
    return f"{said} The tests show that gain for {len(shown & set(gains))} of {len(gains)}."


def terminal(results: Mapping) -> str:
    """The main figures as an aligned table of plain text, the best first, the control last."""
    measure = measures.of(results)
    titles = {measure.title, "gain over no mixer", "loss at position 1", "learning rate", "diverged"}
    columns = [column for column in _columns(results) if column.title in titles]
    heads = ["mixer", *(column.title for column in columns)]
    rows = [[label, *(column.text(row) for column in columns)] for label, row in _ranked(results)]
    widths = [max(len(row[index]) for row in [heads, *rows]) for index in range(len(heads))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in [heads, *rows]
    ]
    return "\n".join(lines)


def _circumstances(results: Mapping) -> list[tuple[str, str]]:
    about, compare, base = results["about"], results["comparison"], results["base"]
    matched, validation = results["matched"], results["validation"]
    tokens = base["train"]["steps"] * base["data"]["batch_size"] * base["data"]["seq_len"]
    is_text = measures.of(results).is_text
    source = base["data"]["source"] if is_text else f"the task {base['data']['task']}"
    facts = []
    if matched is None:
        facts.append(("Matched", "nothing: every mixer has the sizes of the base"))
    else:
        facts.append((
            "Matched",
            f"{matched['in_words']}, within {matched['tolerance']:.1%} of {matched['reference']}'s {matched['value']:,.0f}",
        ))  # fmt: skip
    facts.append((
        "Training",
        f"{source}, {tokens:,} tokens ({base['train']['steps']:,} steps of {base['data']['batch_size']} x "
        f"{base['data']['seq_len']}), {compare['seeds']} seed(s) from {base['seed']} on",
    ))  # fmt: skip
    facts.append(("Training data", f"{about['training_data']}: a digest, equal for equal text, split and tokenizer"))
    grid = _listed(sorted(compare["learning_rates"]))
    several = len(compare["learning_rates"]) > 1
    facts.append(("Learning rates", f"{grid} and beyond, each mixer its own (see below)" if several else f"{grid}, for every mixer"))
    if validation is not None:
        facts.append((
            "Reported on",
            f"the odd-numbered validation documents: {validation['documents']:,} documents, {validation['tokens']:,} tokens, "
            f"{validation['bytes']:,.0f} bytes; {validation['hit_tokens']:,} of the tokens are recall hits, "
            f"{validation['frequent_pairs']:,} pairs of tokens being left out as frequent in training"
            if is_text else
            f"the odd-numbered test examples: {validation['documents']:,} examples, {validation['tokens']:,} labels; the mean over "
            "the test's lengths, each counting once",
        ))  # fmt: skip
    device = next((row["cost"]["device"] for row in results["mixers"].values() if row["cost"]), None)
    machine = about["machine"]
    facts.append(("Device", f"{device or 'not measured yet'}; {machine['processor']}, {machine['cores']} cores"))
    peak = next((row["cost"]["peak_flops_per_second"] for row in results["mixers"].values() if row["cost"]), None)
    facts.append((
        "Utilisation",
        f"of {peak / 1e12:,.0f} TFLOP/s, the data sheet's dense bfloat16 peak" if peak else "empty: no data sheet gives this "
        "device's peak",
    ))  # fmt: skip
    facts.append(("Versions", ", ".join(f"{name} {version}" for name, version in about["versions"].items())))
    facts.append(("Commit", f"{about['commit']}, {about['date']}"))
    facts.append(("Command", about["command"]))
    return facts


def _columns(results: Mapping) -> list[Column]:
    seq_len = str(results["base"]["data"]["seq_len"])
    contexts = [str(context) for context in results["comparison"]["contexts"]]
    interval = "mean over the seeds and Student's 95 % interval"

    def quality(name, digits):
        def text(row):
            estimate = row["quality"] and row["quality"][name]
            if not estimate or estimate["mean"] is None:
                return EMPTY
            mean = _number(estimate["mean"], digits)
            if estimate["low"] is None or estimate["high"] is None:
                return mean
            return f"{mean} [{_number(estimate['low'], digits)}, {_number(estimate['high'], digits)}]"

        return text, lambda row: row["quality"] and row["quality"][name]["mean"]

    def cost(*path, scale=1.0, digits=0):
        def value(row):
            found = row["cost"]
            for name in path:
                found = None if found is None else found[name]
            return None if found is None else scale * found

        return (lambda row: EMPTY if value(row) is None else _number(value(row), digits)), value

    qualities = [
        Column("perplexity", f"per token, reported documents: {interval}", *quality("perplexity", 3)),
        Column("bits per byte", f"of the same text: {interval}", *quality("bits_per_byte", 4)),
        Column("gain over no mixer", "bits per byte less than the same model of MLPs alone", _gain,
               lambda row: row["gain"] and row["gain"]["bits_per_byte"]),
        Column("loss at position 1", "nats after one token of context, where there is nothing to mix: what mixers differ by there is "
               f"not their mixing; {interval}", *quality("position_1_loss", 3)),
        Column("loss, hits", "nats per token where the same pair of tokens stood earlier in the same story and window and is rare in "
               f"training: {interval}", *quality("hit_loss", 3)),
        Column("loss, rest", f"nats on all other tokens: {interval}", *quality("rest_loss", 3)),
    ] if measures.of(results).is_text else [
        Column("accuracy", f"share of the labels that the model puts above all else, reported examples: {interval}",
               *quality("accuracy", 4)),
        Column("loss", f"nats per label: {interval}", *quality("loss", 4)),
    ]  # fmt: skip
    return [
        *qualities,
        Column("learning rate", "the best of those tried",
               lambda row: EMPTY if row["best_rate"] is None else f"{row['best_rate']:g}", lambda row: row["best_rate"]),
        Column("diverged", "seeds at the best rate whose loss was not finite; all: at every rate", _diverged,
               lambda row: len(row["diverged"])),
        Column("parameters", "trained, a tied head counted once", *cost("parameters")),
        Column("MFLOPs/token", "of the matrix products of a training step, counted",
               *cost("flops_per_token", scale=1e-6, digits=2)),
        Column("state bytes", f"of one sequence at {seq_len} tokens, counted", *cost("state_bytes", seq_len)),
        Column("train tokens/s", "of the median training step, measured alone after the runs", *cost("train_tokens_per_second")),
        Column("utilisation %", "of the device's peak FLOP/s; empty where that is unknown",
               *cost("flop_utilisation", scale=100.0, digits=1)),
        Column("step MiB", "memory the compiler allots to a training step: arguments, outputs, temporaries",
               *cost("train_step_bytes", scale=1 / 2**20)),
        *(
            Column(f"ms/token at {int(context):,}", f"one decoded token of one sequence after {int(context):,} tokens",
                   *cost("decode_seconds", context, scale=1e3, digits=3))
            for context in contexts
        ),
    ]  # fmt: skip


def _gain(row: Mapping) -> str:
    return EMPTY if row["gain"] is None else f"{row['gain']['bits_per_byte']:+.4f}"


def _diverged(row: Mapping) -> str:
    if row["best_rate"] is None:
        return "all" if any(each["diverged_at"] for each in row["rates"]) else EMPTY
    return str(len(row["diverged"])) if row["quality"] or row["diverged"] else EMPTY


def _main_table(results: Mapping) -> tuple[list[str], list[list[str]]]:
    """Heads and rows, the best first; a mixer without figures is last, its cells empty."""
    columns = _columns(results)
    rows = [[label, *(column.text(row) for column in columns)] for label, row in _ranked(results)]
    return ["mixer", *(column.title for column in columns)], rows


def _ranked(results: Mapping) -> list[tuple[str, Mapping]]:
    """The mixers, the best first; after them the control, which is not ranked."""
    measure = measures.of(results)

    def key(item):
        """Of two that are alike in the measure, the smaller loss is first."""
        quality, last = item[1]["quality"], item[1]["is_control"]
        if quality is None or quality[measure.name]["mean"] is None:
            return last, math.inf, math.inf
        return last, quality[measure.name]["mean"] * (1 if measure.is_text else -1), quality["loss"]["mean"]

    return sorted(results["mixers"].items(), key=key)


def _paragraph_on_pairs(results: Mapping) -> list[str]:
    seeds, measure = results["comparison"]["seeds"], measures.of(results)
    lines = [
        f"By how much the mixer of a row is better than that of a column: the difference of the {measure.compared}. Two paired tests "
        f"are made of it. Over {measure.documents}: a bootstrap that draws the same reported {measure.documents} for both, of the "
        f"means over the seeds; it says what other {measure.documents} of the kind might give. Over seeds: Student's paired test, a "
        "seed being the same order of the data for both; it says what training again might give. p-values are Holm's, corrected for "
        f"the number of pairs. A star: both are below {statistics.SIGNIFICANT}. A plus: so they are if the second takes its noise "
        "from all mixers, as if it were alike for all of them (the residuals of an additive model of mixer and seed). results.json "
        "has all of them."
    ]
    tests = len(results["pairs"])
    ratio = statistics.least_ratio(seeds, tests)
    if ratio is None:
        lines += ["", "There is one seed, so nothing is known of training again, and no difference is shown."]
    elif tests:
        lines += [
            "",
            f"With {seeds} seeds and {tests} pairs, the first difference to be shown over seeds must be {ratio:,.1f} times its own "
            "standard deviation between seeds. Without a star a difference is not shown; that is no sign of equality.",
        ]  # fmt: skip
    return lines


def _pair_matrix(results: Mapping) -> tuple[list[str], list[list[str]]]:
    """The upper triangle, best to worst: how much better the row is, and whether the tests show it."""
    by_pair = {(pair["better"], pair["worse"]): pair for pair in results["pairs"]}
    order = _order_of_pairs(results)
    rows = []
    for better in order[:-1]:
        cells = [by_pair[better, worse] if (better, worse) in by_pair else None for worse in order[1:]]
        rows.append([better, *(
            EMPTY if pair is None else _number(abs(pair["difference"]), 3) + _mark(pair) for pair in cells
        )])  # fmt: skip
    return ["better by", *order[1:]], rows


def _mark(pair: Mapping) -> str:
    return "*" if pair["significant"] else "+" if pair["significant_pooled"] else ""


def _order_of_pairs(results: Mapping) -> list[str]:
    """Best first, the control among the others: the order in which `pairs` lists the better ones."""
    wins: dict[str, int] = {}
    for pair in results["pairs"]:
        wins[pair["better"]] = wins[pair["better"]] + 1 if pair["better"] in wins else 1
        wins[pair["worse"]] = wins[pair["worse"]] if pair["worse"] in wins else 0
    return sorted(wins, key=lambda label: -wins[label])


def _in_words(pair: Mapping) -> str:
    """A difference with everything the tests say of it."""
    documents, seeds = pair["over_documents"], pair["over_seeds"]
    said = (
        f"{pair['better']} less {pair['worse']}: {_number(pair['difference'], 4)} [{_number(documents['low'], 4)}, "
        f"{_number(documents['high'], 4)}], p {_probability(documents['corrected_p_value'])}"
    )
    if seeds is None:
        return said
    pooled = _probability(pair["over_seeds_pooled"]["corrected_p_value"])
    return f"{said}; over seeds p {_probability(seeds['corrected_p_value'])}, of pooled noise p {pooled}"


def _paragraph_on_starts(results: Mapping) -> list[str]:
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


def _start_tables(results: Mapping) -> list[tuple[list[str], list[list[str]]]]:
    """Each mixer's start beside its result; then what goes with the result over the mixers."""
    names = [name for name in audit.MEANINGS if name != "position_1_loss"]
    rows = [(label, row["start"]["summary"]) for label, row in _ranked(results) if row["start"] is not None]
    names = [name for name in names if any(name in summary for _, summary in rows)]
    tables = []
    if rows:
        cells = [[EMPTY if summary.get(name) is None else f"{summary[name]:.3g}" for name in names] for _, summary in rows]
        heads = ["mixer", *(audit.MEANINGS[name] for name in names)]
        tables.append((heads, [[label, *row] for (label, _), row in zip(rows, cells)]))
    spearman = results["audit"]["spearman"]
    if spearman:
        tables.append((
            ["figure", "Spearman with the loss over the mixers", "p", "mixers"],
            [
                [each["in_words"], f"{each['rho']:+.2f}", _probability(each["p_value"]), str(each["values"])]
                for each in spearman.values()
            ],
        ))
    return tables


def _paragraph_on_rates(results: Mapping) -> list[str]:
    compare, search = results["comparison"], results["rate_search"]
    length = (
        f"runs of {compare['rate_steps']:,} of {results['base']['train']['steps']:,} steps, in which warm-up and decay take the same "
        "part of the run" if compare["rate_steps"] else "runs of full length"
    )  # fmt: skip
    rates = _listed(sorted(compare["learning_rates"]))
    if len(compare["learning_rates"]) == 1:
        return [f"There was none: every mixer has {rates}."]
    whom = "validation documents" if measures.of(results).is_text else "test examples"
    lines = [
        f"{rates}, and where the best lies at an end twice or half that rate, up to {compare['rate_extensions']} times; by {length}, "
        f"{compare['rate_seeds']} seed(s) each, on the even-numbered {whom}. The search is {search['runs']} runs and "
        f"{search['tokens']:,} tokens, {search['share_of_tokens']:.0%} of all that is trained here; it took "
        f"{search['seconds'] / 3600:.2f} hours so far."
    ]
    grid = set(compare["learning_rates"])
    added = {
        label: [each["rate"] for each in row["rates"] if each["rate"] not in grid] for label, row in results["mixers"].items()
    }
    added = [f"{label} ({_listed(rates)})" for label, rates in added.items() if rates]
    return [*lines, "", f"Rates beyond the grid were tried for {', '.join(added)}."] if added else lines


def _rate_tables(results: Mapping) -> list[tuple[list[str], list[list[str]]]]:
    """Where every rate was trained at full length: whether the one that short runs chose wins there."""
    rows = []
    for label, row in results["mixers"].items():
        found = row["rates_at_length"]
        if found is not None:
            spread = EMPTY if found["spread"] is None else _number(found["spread"], 4)
            rows.append([label, f"{row['best_rate']:g}", f"{found['best']:g}", _number(found["regret"], 4), spread])
    if not rows:
        return []
    heads = ["mixer", "chosen by short runs", "best at full length", "lost by the choice", "standard deviation between seeds"]
    return [(heads, rows)]


def _size_table(results: Mapping) -> tuple[list[str], list[list[str]]]:
    quantity = "parameters" if results["matched"] is None else results["matched"]["in_words"]
    rows = [
        [label, row["sizes"]["in_words"], f"{row['counted']:,.0f}", f"{row['of_reference']:+.2%}"]
        for label, row in results["mixers"].items()
    ]
    return ["mixer", "sizes", quantity, "of the first"], rows


def _commands(results: Mapping) -> list[tuple[str, str]]:
    return [(label, run["command"]) for label, row in results["mixers"].items() for run in row["runs"]]


def _listed(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def _number(value: float | None, digits: int) -> str:
    return EMPTY if value is None else f"{value:,.{digits}f}"


def _probability(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


# -- how they say it


def _as_markdown(paragraphs: Sequence[str]) -> list[str]:
    return [escape(text, "markdown") for text in paragraphs]


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells):
        return "| " + " | ".join(escape(cell, "markdown") for cell in cells) + " |"

    return [line(heads), f"|{'---|' * len(heads)}", *map(line, rows)]


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_escape(each)}</th>" for each in heads)
    body = "".join("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _html_matrix(heads: Sequence[str], rows: Sequence[Sequence[str]], results: Mapping) -> str:
    """The matrix of pairs; a cell's title has the tests."""
    by_pair = {(pair["better"], pair["worse"]): pair for pair in results["pairs"]}
    head = "".join(f"<th>{_escape(each)}</th>" for each in heads)
    body = ""
    for better, *cells in rows:
        body += f"<tr><th>{_escape(better)}</th>"
        for worse, cell in zip(heads[1:], cells):
            pair = by_pair[better, worse] if (better, worse) in by_pair else None
            shown = ' class="shown"' if pair is not None and pair["significant"] else ""
            title = "" if pair is None else f' title="{_escape(_in_words(pair))}"'
            body += f"<td{shown}{title}>{_escape(cell)}</td>"
        body += "</tr>"
    return f'<div class="scroll"><table class="matrix"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _html_sortable(columns: Sequence[Column], heads: Sequence[str], rows: Sequence[Sequence[str]], results: Mapping) -> str:
    head = "".join(
        f'<th><button type="button" title="{_escape(meaning)}">{_escape(title)}</button></th>'
        for title, meaning in zip(heads, ["as in config.mixers", *(column.meaning for column in columns)])
    )
    body = ""
    for cells, (label, row) in zip(rows, _ranked(results)):
        keys = [label, *(column.key(row) for column in columns)]
        body += "<tr>" + "".join(
            f'<td data-key="{_escape("" if key is None else str(key))}">{_escape(cell)}</td>' for cell, key in zip(cells, keys)
        ) + "</tr>"  # fmt: skip
    table = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table id="results" class="sortable">{table}</table></div>'


def _escape(text: str) -> str:
    return escape(text, "html")


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 75rem; padding: 1rem; color: #1b1b1b; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.lead { font-size: 1.1rem; } .warning { background: #fff3cd; border-left: 4px solid #e0a800; padding: .4rem .7rem; margin: .4rem 0; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; font-weight: 600; }
th button { font: inherit; font-weight: 600; border: 0; background: none; padding: 0; cursor: pointer; color: #06c; }
th[aria-sort] button::after { content: " \\2191"; } th[aria-sort="descending"] button::after { content: " \\2193"; }
figure { margin: 0; } img { max-width: 100%; height: auto; } figcaption { color: #555; font-size: .9rem; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem 0; overflow-wrap: anywhere; }
.shown { background: #dff0d8; font-weight: 600; } .matrix { font-size: .75rem; }
.command { font-family: monospace; font-size: .8rem; }
pre { overflow-x: auto; font-size: .75rem; } summary { cursor: pointer; margin: .6rem 0; }
"""

SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const descending = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const rows = Array.from(table.tBodies[0].rows);
    const key = row => row.cells[column].dataset.key;
    rows.sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = Number.isNaN(Number(x)) || Number.isNaN(Number(y)) ? x.localeCompare(y) : Number(x) - Number(y);
      return descending ? -order : order;
    });
    rows.forEach(row => table.tBodies[0].appendChild(row));
  }));
}
"""

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>Comparison</title>
<style>$STYLE</style>
</head>
<body>
$BODY
<script>$SCRIPT</script>
</body>
</html>
"""
