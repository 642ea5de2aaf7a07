"""Find the first number that was not finite in a run that diverged.

    python scripts/replay.py --workdir=runs/gla

train.py records the step at which a number was not finite in the run folder: its batch and the train state before it. This
makes the step again, names the layer and the operation whose result is the first to be not finite (or absurdly large), and
makes it in every form that the mixers' ops have, in the run's dtype of activations and in float32. The last line of stdout is
one JSON object.
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone, uninstalled, in any directory

if __name__ == "__main__":  # ahead of imports that fail without the packages
    from seqmodels.packages import check_packages

    check_packages()

from seqmodels import command_line, screen, suggest
from seqmodels.errors import UserError
from seqmodels.escape import say
from seqmodels.ops import IMPLEMENTATIONS
from seqmodels.training import divergence


def main() -> None:
    parser = command_line.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_workdir(local=True)
    every = ",".join(IMPLEMENTATIONS)
    parser.add_argument("--forms", default=every, help=f"which forms beside the configured one (default {every})")
    options = parser.parse_args()
    forms = [form for form in options.forms.split(",") if form]
    for form in forms:
        if form not in IMPLEMENTATIONS:
            raise UserError(f"--forms: there is no form {form!r}; {suggest.hint(form, IMPLEMENTATIONS)}known: {every}")

    with screen.phase("reading what was recorded"):
        recorded = divergence.load(options.workdir, report=say)
    about = recorded.about
    what = "evaluation after step" if about["evaluating"] else "step"
    say(f"{recorded.folder}: {about['what']}; here the {what} {about['step']} is made again")
    for name, version in divergence.versions().items():
        if about["versions"].get(name) != version:
            say(f"recorded with {name} {about['versions'].get(name)}, made again with {version}")
    absurd = divergence.absurd_arrays(recorded)
    for name, largest in list(absurd.items())[:10]:
        say(f"the step began with numbers up to {largest:.3g} in {name}")

    with screen.phase("making the step again"):
        found = divergence.find(recorded, report=say)
    layer = None if found is None else divergence.layer_of(found, recorded.config)
    if found is None:
        say("every operation gives numbers as sound as with fresh parameters here")
    else:
        loops = f", iteration {', '.join(map(str, found.loops))} of the loops around it" if found.loops else ""
        always = "; with fresh parameters, too: look at the batch and the program" if found.always else ""
        way = "backward" if found.backward else "forward"
        say(f"first: {found.operation} gives {KINDS[found.kind]}, {way}, in {layer}{loops}{always}")
        say(f"  at {found.source or 'an unknown line'}; scope {found.scope or 'none'}")
        for number, text in enumerate(found.inputs):
            say(f"  input {number}: {text}")

    outcomes = []
    for outcome in divergence.compare(recorded, (None, *forms), report=say):
        outcomes.append(outcome)
        result = outcome.missing or (
            f"loss {outcome.loss:.6g}, gradient norm {outcome.gradient_norm:.4g}, {'finite' if outcome.finite else 'NOT FINITE'}"
        )
        say(f"{outcome.compute_dtype:>10}  {outcome.form:<14} {result}")
        if outcome.wrong and len(outcomes) == 1:
            more = f" and {len(outcome.wrong) - 5} more" if len(outcome.wrong) > 5 else ""
            say(f"{'':>10}  not finite after the step: {', '.join(outcome.wrong[:5])}{more}")
    finding = None if found is None else dataclasses.asdict(found) | {"layer": layer}
    forms = [
        {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
        for row in map(dataclasses.asdict, outcomes)
    ]
    print(json.dumps({"step": about["step"], "finding": finding, "absurd_arrays": absurd, "forms": forms}))


KINDS = {"nan": "NaN", "inf": "an infinity", "absurd": "an absurd number"}


if __name__ == "__main__":
    command_line.run(main)
