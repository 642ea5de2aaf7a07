"""Where the commands and the configs lie; and one line that says what to do where a Python lacks the packages."""

import importlib.metadata
import importlib.util
import os
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType

# What requirements.txt installs, by the names that are imported.
MODULES = (
    "jax", "flax", "optax", "ml_collections", "orbax", "datasets", "tensorboardX", "tokenizers", "jaxtyping", "matplotlib",
    "rich", "scipy", "yaml",
)  # fmt: skip
PACKAGE = Path(__file__).resolve().parent
CLONE = PACKAGE.parent
# Where train.py, scripts/ and configs/ lie: at the top of a clone; in an installed package (pyproject.toml) in a folder of it.
IS_INSTALLED = (PACKAGE / "installed").is_dir()
ROOT = PACKAGE / "installed" if IS_INSTALLED else CLONE
# The commands that ``seqmodels NAME`` has, and what ``python FILE`` is the same thing.
COMMANDS = {
    "train": "train.py", "eval": "eval.py", "generate": "scripts/generate.py", "compare": "scripts/compare.py",
    "runs": "scripts/runs.py", "benchmark": "scripts/benchmark.py", "import": "scripts/import_hf.py", "export": "scripts/export_hf.py",
    "plan": "scripts/plan.py", "replay": "scripts/replay.py",
}  # fmt: skip


def shell_command(argv: Sequence[str]) -> str:
    """A command line as a person types it in a shell.

    Args:
        argv: the file of one of the commands, and its flags.
    """
    name = installed_name(argv[0])
    return shlex.join(["python", *argv] if name is None else ["seqmodels", name, *argv[1:]])


def installed_name(program: str) -> str | None:
    """What ``seqmodels`` calls the command of a file, where the package is installed; None of other files, and in a clone."""
    names = {ROOT / file: name for name, file in COMMANDS.items()} if IS_INSTALLED else {}
    return names[Path(program)] if Path(program) in names else None


def as_typed(text: str) -> str:
    """A text with ``python FILE`` of the commands, as in a clone; with ``seqmodels NAME`` where the package is installed."""
    for name, file in COMMANDS.items() if IS_INSTALLED else ():
        text = text.replace(f"python {file}", f"seqmodels {name}")
    return text


def _without_interrupts(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)


def end_by_signal(number: int, frame: FrameType | None) -> None:
    """A handler for the time before `command_line.run`: one line, and the end; what is raised in an import, a library may swallow."""
    os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


def _end_by_signals() -> None:
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # not one that is ignored
            signal.signal(number, end_by_signal)


def _open_standard_streams() -> None:
    """What whoever started the program has closed leads nowhere: the next file that is opened would get the stream's number, and so
    what is written to the stream. A character that the encoding of a stream lacks is spelt, and is no error.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # of the numbers that are free the lowest
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        sys.exit(f"error: the current folder cannot be read ({error.strerror}): change to one that is there")


def check_packages() -> None:
    """Ends the process with a line on stderr and exit code 1 if a package is missing, or the current folder. Imports no package.

    Where stderr is a terminal, it says that they are being loaded. A signal meanwhile ends the process with one line.
    """
    sys.excepthook = _without_interrupts
    _open_standard_streams()
    _end_by_signals()
    _check_current_folder()
    lacking = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if not lacking:
        if sys.stderr.isatty():  # importing them takes seconds; what is said next stands in place of this line
            print("loading JAX ...", end="\r", file=sys.stderr, flush=True)
        return
    activate = CLONE / ".venv" / "bin" / "activate"
    if IS_INSTALLED:
        required = (each for each in importlib.metadata.requires("seqmodels") if "extra ==" not in each)
        cure = f"install them ({shlex.join([sys.executable, '-m', 'pip', 'install', *required])})"
    elif activate.exists():
        cure = f"activate the environment that has them (. {activate})"
    else:
        cure = f"install them (pip install -r {CLONE / 'requirements.txt'})"
    sys.exit(f"error: {sys.executable} has no {', '.join(lacking)}: {cure}")
