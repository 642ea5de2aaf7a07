"""The console command: ``seqmodels train FLAGS`` is ``python train.py FLAGS``, and so each of `packages.COMMANDS`.

    seqmodels train --config=configs/tinystories.py:gla --workdir=runs/gla
    seqmodels COMMAND --help

Where --config names a file that is not there, the one of this name that comes with the package is taken.
"""

import ast
import importlib.metadata
import runpy
import sys
from typing import NoReturn

from seqmodels import packages, suggest
from seqmodels.escape import escape


def main() -> NoReturn:
    """Run the command that the first argument names, in this process, as ``python FILE`` does."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "help"):
        print(escape(usage(), "terminal"))
        sys.exit(0)
    if name == "--version":
        print(escape(f"seqmodels {importlib.metadata.version('seqmodels')}", "terminal"))
        sys.exit(0)
    if name not in packages.COMMANDS:
        sys.exit(
            f"error: there is no command {name!r}; {suggest.hint(name, packages.COMMANDS)}known: {', '.join(packages.COMMANDS)}"
        )
    path = packages.ROOT / packages.COMMANDS[name]
    sys.argv = [str(path), *sys.argv[2:]]
    sys.path.insert(0, str(packages.ROOT))  # the commands import configs
    runpy.run_path(str(path), run_name="__main__")
    sys.exit(0)


def usage() -> str:
    """The commands with the first line of what each says of itself."""
    lines = [f"  {name:10} {ast.get_docstring(ast.parse((packages.ROOT / file).read_text())).splitlines()[0]}"
             for name, file in packages.COMMANDS.items()]  # fmt: skip
    return "\n".join(["usage: seqmodels COMMAND [FLAGS]; seqmodels COMMAND --help lists its flags", "", *lines])


if __name__ == "__main__":
    main()
