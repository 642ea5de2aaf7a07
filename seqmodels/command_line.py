"""What every entry point does alike: one-line errors, exit codes, the compilation cache."""

import argparse
import atexit
import contextlib
import functools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from seqmodels import failures, object_store, packages, processes, ranges, suggest
from seqmodels.config import DEFAULT_COMPILATION_CACHE_DIR, RUN_FILES
from seqmodels.data import atomic
from seqmodels.errors import UserError
from seqmodels.escape import escape, say

MOST_SHOWN = 1000  # characters of a message
UNWIND_SECONDS = 10.0  # that a program may take to end after a signal
AGAIN_SECONDS = 0.2  # after which a signal that was thrown away is delivered again


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake as a UserError instead of a page of usage, and takes flags by their whole names."""

    def __init__(self, **options: Any):
        super().__init__(**options, allow_abbrev=False)
        if (name := packages.installed_name(sys.argv[0])) is not None:
            self.prog = f"seqmodels {name}"

    def format_help(self) -> str:
        return packages.as_typed(super().format_help())

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        """As argparse has it; but a flag that is not known is named first, and not one that is missing for that."""
        known = [flag.lstrip("-") for flag in self._option_string_actions if flag.startswith("--")]
        for text in sys.argv[1:] if args is None else args:
            if text == "--":
                break
            found = re.fullmatch(r"--([\w.-]+)(=.*)?", text, re.DOTALL)
            if found is None:
                continue
            if found[1] == "help" and found[2]:
                raise UserError(f"{text}: the flags of this command are in no groups; --help lists them")
            if found[1] not in known:
                raise UserError(_unknown_flag(found[1], known, [name for name in known if name != "help"]))
        return super().parse_args(args, namespace)

    def add_value(self, flag: str, hint: Any, **options: Any) -> None:
        """``add_argument`` for a value of a type with a declared range (seqmodels.ranges)."""
        parse = ranges.parser(hint, flag.lstrip("-"))

        def typed(text: str) -> Any:
            try:
                return parse(text)
            except UserError as error:  # argparse shows no other ValueError's text
                raise argparse.ArgumentTypeError(str(error)) from None

        self.add_argument(flag, type=typed, **options)

    def add_workdir(self, help: str = "the run folder", *, local: bool = False) -> None:
        """``--workdir``, a path or, unless it must be ``local``, the URL of an object store."""

        def typed(text: str) -> Path | str:
            try:
                return object_store.local(text) if local else object_store.workdir(text)
            except UserError as error:  # as above
                raise argparse.ArgumentTypeError(str(error)) from None

        self.add_argument("--workdir", type=typed, required=True, help=help)

    def error(self, message: str) -> NoReturn:
        missing = re.fullmatch(r"the following arguments are required: (.*)", message)
        if missing is not None:
            raise UserError(f"{missing[1]} {'are' if ',' in missing[1] else 'is'} missing; --help lists the flags")
        found = re.fullmatch(r"argument (\S+): (.*)", message, re.DOTALL)
        if found is None:
            raise UserError(f"{message}; see --help")
        flag, what = found.groups()
        choice = re.match(r"invalid choice: '(.*)' \(", what)
        if choice is not None:
            known = list(self._option_string_actions[flag].choices)
            raise UserError(f"{flag}={choice[1]}: {suggest.hint(choice[1], known)}known: {', '.join(known)}")
        raise UserError(what if what.startswith(flag) else f"{flag}: {what}")


def asked_for_help(argv: Sequence[str]) -> str | None:
    """What ``--help=GROUP`` asks for, "" of ``--help`` or ``-h``, and None where nobody asks."""
    found = (re.fullmatch(r"-h|--?help(?:=(.*))?", text) for text in argv[1:])
    return next((match[1] or "" for match in found if match), None)


def config_and_flags(
    argv: Sequence[str], defaults: Mapping[str, str | bool | None]
) -> tuple[ConfigDict, dict[str, str | bool | None]]:
    """What ``--config=FILE [--config.any.field=value ...]`` asks for, and the values of further flags.

    Args:
        argv: the command line, the program's name first.
        defaults: each further flag with its value when it is not given; None for one that must be, False for a switch.

    Raises:
        UserError: an unknown flag or field, a value of the wrong type, a flag that is missing or empty, a config file
            that cannot be read.
    """
    argv, absent = _without_none(_with_packaged_config(argv))
    values = flags.FlagValues()  # not the process-wide ones: absl allows to define those only once
    config_flags.DEFINE_config_file("config", help_string="the config", lock_config=True, flag_values=values, sys_argv=list(argv))
    for name, default in defaults.items():
        define = flags.DEFINE_boolean if isinstance(default, bool) else flags.DEFINE_string
        define(name, default, "", flag_values=values)
    try:
        positional = values(list(argv))[1:]
        for name in ("config", *(name for name, default in defaults.items() if default is None)):
            if not values[name].value:
                raise UserError(f"--{name} is missing; --help shows an example")
        empty = next((name for name in defaults if values[name].present and values[name].value == ""), None)
        if empty is not None:  # of a shell variable that is not set
            raise UserError(f"--{empty}= is empty: give it a value, or leave it out")
        config = values["config"].value
        config.keys()  # raises what went wrong when the file was read
        for field in absent:
            *path, name = field.split(".")
            group = functools.reduce(getattr, path, config)
            getattr(group, name)  # raises what names the nearest, if there is no such field
            with group.ignore_type():  # from_config_dict knows which fields may be None
                setattr(group, name, None)
    except UserError:
        raise
    except (KeyError, AttributeError) as error:
        raise UserError(_unknown_field(error, argv)) from error
    except flags.UnrecognizedFlagError as error:
        flags_alone = ["config", *defaults]
        raise UserError(_unknown_flag(error.flagname, [*flags_alone, *_fields(argv)], flags_alone)) from error
    except (flags.Error, OSError, SyntaxError) as error:
        first = error
        while first.__cause__ or first.__context__:
            first = first.__cause__ or first.__context__
        if "Error whilst parsing config file" in str(error):
            raise first from None  # what get_config raised: a UserError, or a bug with its own traceback
        if isinstance(error, flags.IllegalFlagValueError):
            raise UserError(_wrong_type(error, argv)) from error
        line = str(first if isinstance(error, OSError) else error).splitlines()[-1].strip()
        raise UserError(f"--config: {line}" if isinstance(error, (OSError, SyntaxError)) else line) from error
    if positional:
        raise UserError(f"{positional[0]!r} is not a flag; --help shows an example")
    return config, {name: values[name].value for name in defaults}


def _unknown_flag(name: str, known: Sequence[str], shown: Sequence[str]) -> str:
    """What is said of it: the nearest of those known, or else the ones to be shown."""
    near = (None if "." in name else suggest.nearest(name, shown)) or suggest.nearest(name, known)
    return f"--{name} is not a flag; " + (
        f"did you mean --{near}?" if near else f"known: {', '.join(f'--{each}' for each in shown)}"
    )


def _with_packaged_config(argv: Sequence[str]) -> list[str]:
    """The command line with the file that --config names; where there is none, with the one that comes with the package.

    Raises:
        UserError: there is neither.
    """
    argv = list(argv)
    for index, text in enumerate(argv):
        option, value = re.fullmatch(r"(--?config=)?(.*)", text, re.DOTALL).groups()
        if option is None and (index == 0 or argv[index - 1] not in ("--config", "-config")):
            continue
        file, colon, argument = value.partition(":")
        if file and not Path(file).exists():
            if not (packages.ROOT / file).is_file():
                known = [str(path.relative_to(packages.ROOT)) for path in sorted((packages.ROOT / "configs").rglob("*.py"))]
                raise UserError(f"--config: there is no file {file}; {suggest.hint(file, known)}known: {', '.join(known)}")
            argv[index] = f"{option or ''}{packages.ROOT / file}{colon}{argument}"
        elif file and not file.endswith(".py"):
            raise UserError(f"--config: {file} is not a Python file (.py) with get_config()")
    return argv


def _without_none(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line without its ``--config.field=None``, and these fields: absl knows no None but of strings."""
    last = {found[1]: index for index, text in enumerate(argv) if (found := re.match(r"--?config\.([\w.]+)=", text))}
    absent = {index: field for field, index in last.items() if argv[index].endswith("=None")}
    overridden = [index for index, text in enumerate(argv) if re.match(r"--?config\.[\w.]+=None$", text)]
    return [text for index, text in enumerate(argv) if index not in overridden], list(absent.values())


def _unknown_field(error: Exception, argv: Sequence[str]) -> str:
    """ml_collections names the last part of a field; this names the whole flag, and the nearest field."""
    while isinstance(error.args[0], Exception):
        error = error.args[0]
    message = str(error.args[0])
    found = re.match(r"'(\w+)'", message)
    if found is None:
        return " ".join(message.split())
    name = found.group(1)
    flag = next((flag.partition("=")[0] for flag in argv if name in re.split(r"[.=]", flag)), name)
    near = suggest.nearest(flag.lstrip("-"), _fields(argv))
    hint = f"did you mean --{near}?" if near else "configs/base.py lists the fields there are"
    return f"{flag}: there is no field {name!r}; {hint}"


def _wrong_type(error: flags.IllegalFlagValueError, argv: Sequence[str]) -> str:
    """absl says what Python's conversion said; this says the type of the field."""
    message = str(error)
    found = re.fullmatch(r"flag --([\w.]+)=(.*)", message.removesuffix(f": {error.__context__}"), re.DOTALL)
    kinds = _fields(argv)
    if found is None or found[1] not in kinds or kinds[found[1]] is type(None):
        return message
    return f"--{found[1]}={ranges.short_repr(found[2])} must be {kinds[found[1]].__name__}"


def _fields(argv: Sequence[str]) -> dict[str, type]:
    """Every field of the config that --config names, as ``config.optim.learning_rate``, with its type; none if it cannot be read."""
    files = [
        flag for before, flag in zip(argv, argv[1:])
        if flag.startswith("--config=") or "--config" in (before, flag)
    ]  # fmt: skip
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=[argv[0], *files])

    def fields(group: ConfigDict, prefix: str) -> Iterator[tuple[str, type]]:
        for name in group:
            yield prefix + name, group.get_type(name)
            if group.get_type(name) is ConfigDict:
                yield from fields(group[name], f"{prefix}{name}.")

    try:
        values([argv[0], *files])
        return dict(fields(values["config"].value, "config."))
    except (flags.Error, OSError, SyntaxError, AttributeError, UserError):
        return {}


def run(main: Callable[[], None]) -> NoReturn:
    """Run an entry point and exit: 0 done, 1 a person's mistake (one line on stderr), 128 + N ended by signal N (one line)."""
    logging.set_verbosity(logging.FATAL)  # Orbax logs a page of traceback for every error that it also raises
    try:
        with _signals_unwind():
            main()
            sys.stdout.flush()
    except SystemExit as end:
        if isinstance(end.code, int) and end.code > 128:  # of a signal that the command handles itself
            _skip_teardown(end.code)
        raise
    except UserError as mistake:
        sys.exit(f"error: {_one_line(mistake)}")
    except (KeyboardInterrupt, _Ended) as end:
        number = signal.SIGINT if isinstance(end, KeyboardInterrupt) else end.number
        with contextlib.suppress(OSError):  # the terminal has gone
            if sys.stderr.isatty():
                sys.stderr.write("\n")  # a text, or a bar, may stand in this line
            say(f"stopped by {number.name}")
        _skip_teardown(128 + number)
        sys.exit(128 + number)
    except BrokenPipeError:  # the reader of a pipe (`| head`) has left
        sys.exit(141)
    except NotImplementedError as refusal:  # an op that lacks what was asked for says what is missing
        sys.exit(f"error: {_one_line(refusal)}")
    except (FileNotFoundError, ConnectionError):
        raise  # a bug, where it is no UserError
    except OSError as failure:
        reason = failures.obstacle(failure) or f"{failure.strerror}{f' ({failure.filename})' if failure.filename else ''}"
        sys.exit(f"error: {_one_line(reason)}")
    except Exception as failure:
        reason = failures.obstacle(failure)
        if reason is None:
            raise
        sys.exit(f"error: {reason}: {_one_line(failure)}")
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # Python would complain again when it flushes at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _skip_teardown(code: int) -> None:
    """Let the process end with this status when its threads have ended, ahead of what libraries and Python take down at exit.

    What a signal has interrupted in XLA may crash there, and the status would be SIGSEGV's. Several processes leave together instead,
    by JAX's teardown, or by what `processes.Group` has registered where they do not.
    """
    if not processes.has_others():
        atexit.register(os._exit, code)


class _Ended(BaseException):
    """A signal has come that ends the program. Not an Exception, so that no library swallows it."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = signal.Signals(number)


@contextlib.contextmanager
def _signals_unwind() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that is closed, unwind what is done inside as Ctrl-C does: a file that was being written
    beside its name is removed. What Python throws away, being raised in a finaliser or a library's callback, is raised again.
    Where unwinding takes longer than `UNWIND_SECONDS`, as in a compilation, and where a library has swallowed what was raised, a
    thread ends the process; and so does a second signal.

    What handles them itself while it lasts, such as training, does so.
    """

    def unwind(number, frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise _Ended(number)

    def thrown_away(unraisable) -> None:
        if not isinstance(unraisable.exc_value, (_Ended, KeyboardInterrupt)):
            hook(unraisable)
            return
        if isinstance(unraisable.exc_value, _Ended):
            signal.signal(unraisable.exc_value.number, unwind)
        lost.set()

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
        yield
        return
    # Not one that is ignored: under nohup a closed terminal ends nothing.
    usual = (signal.SIG_DFL, packages.end_by_signal)
    taken = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) in usual]
    if signal.getsignal(signal.SIGINT) is packages.end_by_signal:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    over, lost = threading.Event(), threading.Event()
    watcher = threading.Thread(target=_end_if_not_obeyed, args=(readable, over, lost), daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(
        writable, warn_on_full_buffer=False
    )  # the system's handler writes, whatever Python is busy with
    hook, sys.unraisablehook = sys.unraisablehook, thrown_away
    for number in taken:
        signal.signal(number, unwind)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(before)
        over.set()
        os.write(writable, b"\0")
        watcher.join()
        os.close(readable)
        os.close(writable)


def _end_if_not_obeyed(arrivals: int, over: threading.Event, lost: threading.Event) -> None:
    """A thread: the number of a signal arrives, or 0 when there is nothing to wait for any more; it is delivered again where what
    it raised is ``lost``."""
    number = None
    while number not in (0, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # of others that somebody handles
        number = os.read(arrivals, 1)[0]
    if not number:
        return
    end = time.monotonic() + UNWIND_SECONDS
    while not over.wait(min(AGAIN_SECONDS, UNWIND_SECONDS)) and time.monotonic() < end:
        if lost.is_set():
            lost.clear()
            signal.pthread_kill(threading.main_thread().ident, number)
    if not over.is_set():
        with contextlib.suppress(OSError):
            os.write(2, f"\nstopped by {signal.Signals(number).name}\n".encode())
        os._exit(128 + number)


def add_compilation_cache_flag(parser: argparse.ArgumentParser) -> None:
    """For programs that open a run folder: they keep compiled programs where their user says, not where the folder does."""
    parser.add_argument(
        "--compilation_cache_dir", default=DEFAULT_COMPILATION_CACHE_DIR,
        help=f'where compiled programs are kept (default {DEFAULT_COMPILATION_CACHE_DIR}); "" keeps none',
    )  # fmt: skip


def output_file(text: str) -> Path:
    """A flag's file that is written whole: an argparse type.

    Raises:
        argparse.ArgumentTypeError: it cannot be written, as `atomic.check_file_name` has it, or its folder is not there.
    """
    return _output(text, replaced=True)


def output_stream(text: str) -> Path:
    """A flag's file that is opened and written to bit by bit: it may be a device or a pipe. Errors as in `output_file`."""
    return _output(text, replaced=False)


def _output(text: str, *, replaced: bool) -> Path:
    try:
        path = atomic.check_file_name(text, replaced=replaced)
    except UserError as mistake:
        raise argparse.ArgumentTypeError(str(mistake)) from None
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(suggest.no_such("folder", path.parent))
    written = path if path.exists() and not replaced else path.parent  # what is replaced is written beside it
    if not os.access(written, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write in '{written}': no permission, or a disk that is read-only")
    return path


def check_distinct(
    outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None], workdir: Path | str | None = None
) -> None:
    """Flags that name files to write, and files to read, which no output may replace.

    Args:
        workdir: a run folder that is read: no output may be a file that training writes there.

    Raises:
        UserError: two outputs, or an output and an input, are one file, under the same name or another.
    """
    taken = (
        {}
        if workdir is None or object_store.is_url(workdir)
        else {os.path.realpath(Path(workdir) / name): "workdir" for name in RUN_FILES}
    )
    for flag, path in [*inputs.items(), *outputs.items()]:
        if path is None:
            continue
        place = os.path.realpath(path)
        if flag in outputs and place in taken:
            raise UserError(f"--{flag}={path} is the file of --{taken[place]}; give another")
        taken[place] = flag


def _one_line(message: object) -> str:
    """A message on one line, cut in the middle where it is long."""
    line = escape(" ".join(str(message).split()), "line")
    return line if len(line) <= MOST_SHOWN else f"{line[: MOST_SHOWN - 200]} ... {line[-190:]}"


def use_compilation_cache(directory: str) -> None:
    """Keep compiled programs between processes in `directory`; "" keeps none.

    A folder that the environment names ($JAX_COMPILATION_CACHE_DIR) wins. Programs of any compile time are kept:
    a small model's are small, and they are many.
    """
    if jax.config.jax_compilation_cache_dir is None and directory:
        jax.config.update("jax_compilation_cache_dir", str(atomic.expanded(directory)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
