"""The processes of one run: how they find each other, agree, stop together, and end with the same line.

Every process runs the same program on its own devices (jax.distributed; JAX calls this multi-controller). What they have to agree
on outside of compiled programs, a config, a list of checkpoints, a signal, goes through the key-value store of JAX's coordination
service, in process 0: it needs no device, so that it can neither get in the way of a collective nor wait for one.

A process that fails says so there, and a thread of every other one ends its process with the same line, wherever its main
thread waits. A process that vanishes is noticed by JAX: at once where a collective breaks or process 0 is gone, else when its
heartbeats stay away for `HEARTBEAT_SECONDS`; JAX then aborts the process, and a child made for that prints the line.
"""

import atexit
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import jax
from jax._src import clusters, distributed  # the key-value store has no public name; Orbax reaches it in the same way

from seqmodels import escape
from seqmodels.errors import UserError

HEARTBEAT_SECONDS: Final = 40
START_SECONDS: Final = 300
"""How long processes wait for the others to start."""
_WAIT_MS: Final = 7 * 86_400 * 1000  # for what may take as long as tokenising; who waits for a dead process is ended by JAX
_AGREE_MS: Final = 60_000
_GRACE_SECONDS: Final = 5.0  # for a main thread that fails by itself, of the same mistake
_LEAVE_MS: Final = 5_000

_LOST = re.compile(
    r"gloo|nccl|socket closed|connection (closed|reset|refused)|heartbeat|barrier|coordination service|UNAVAILABLE|DEADLINE_EXCEEDED",
    re.IGNORECASE,
)
_AGAIN = "start all processes again with the same command: the run goes on from its newest checkpoint"
LOST: Final = f"another process of this run has ended or cannot be reached; {_AGAIN}"


def start(*, coordinator: str = "", num_processes: int | None = None, process_id: int | None = None) -> None:
    """Make this process one of several, as the arguments or else the scheduler's environment say; else leave it alone.

    Call it before JAX looks for devices. SLURM, Open MPI, Cloud TPU and Kubernetes jobs are detected as JAX detects them.

    Args:
        coordinator: HOST:PORT, where process 0 listens.
        num_processes: of the run.
        process_id: of this process, 0 to num_processes - 1.

    Raises:
        UserError: only some of the three are given, or they do not fit together; the others do not start in time.
    """
    given = {"--coordinator": coordinator or None, "--num_processes": num_processes, "--process_id": process_id}
    missing = [flag for flag, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise UserError(
            f"{' and '.join(missing)} missing: several processes need --coordinator, --num_processes and --process_id"
        )
    if missing:
        if not _scheduler_has_several():
            return
    else:
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise UserError(f"--process_id={process_id} must be 0 to --num_processes={num_processes} less one")
        if not re.fullmatch(r".+:\d{1,5}", coordinator):
            raise UserError(f"--coordinator={coordinator} must be HOST:PORT of process 0, such as 10.0.0.1:8476")
    try:
        jax.distributed.initialize(
            coordinator or None, num_processes, process_id, initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=60,
            cluster_detection_method=None if missing else "deactivate",
        )  # fmt: skip
        jax.devices()  # all find their devices together: one that looked alone (`Group.from_first`) would wait for the others
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        atexit.register(end_now, 1)  # JAX's own cleaning up waits for the others
        raise UserError(
            f"the processes of the run did not find each other ({reason}); they all need the same --coordinator"
        ) from error
    state = distributed.global_state
    if state.num_processes == 1:
        return
    global _exit_message
    _exit_message = _ExitMessage(
        f"error: process {state.process_id} of {state.num_processes} was killed, or ended by JAX because another process of the run "
        f"had ended; {_AGAIN}"
    )
    atexit.register(_exit_message.cancel)
    if state.process_id != 0:
        escape.mute()


def _scheduler_has_several() -> bool:
    """Whether a scheduler that JAX knows has started this process as one of several."""
    for cluster in clusters.ClusterEnv._cluster_types:
        try:
            if not cluster.opt_in_only_method and cluster.is_env_present():
                return cluster.get_process_count() > 1
        except Exception as error:
            escape.say(f"{cluster.__name__}: {' '.join(str(error).split())[:200]}; this process runs alone")
            return False
    return False


def has_others() -> bool:
    """Whether this process is one of several."""
    return distributed.global_state.client is not None and distributed.global_state.num_processes > 1


class _ExitMessage:
    """A child that prints a line if this process ends without `cancel`: aborted or killed it can print none itself."""

    _PROGRAM = "import sys; sys.stdin.buffer.read() or print(sys.argv[1], file=sys.stderr)"

    def __init__(self, line: str):
        self._child = subprocess.Popen(
            [sys.executable, "-S", "-I", "-c", self._PROGRAM, line], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is not for it
        )  # fmt: skip

    def cancel(self) -> None:
        """The process ends in good order, or has said why not."""
        if not self._child.stdin.closed:
            try:
                self._child.stdin.write(b"\n")
                self._child.stdin.close()
            except OSError:
                pass  # the child was killed


_exit_message: _ExitMessage | None = None


def end_now(code: int) -> None:
    """End this process without waiting for anything: JAX's own way out waits for the other processes."""
    if _exit_message is not None:
        _exit_message.cancel()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(code)


class Group:
    """All processes that run this program together; one, where JAX has not been told of others.

    A context: an exception in one process ends them all, each with its line. Its methods are called by all processes, in the
    same order.

    Attributes:
        count: how many there are.
        index: which one this is.
        is_first: whether it is the one that writes and prints.
    """

    _numbers = itertools.count()

    def __init__(self, *, alone: bool = False) -> None:
        """``alone``: of this process, whatever others there are."""
        self._client = None if alone else distributed.global_state.client
        self.count = 1 if self._client is None else distributed.global_state.num_processes
        self.index = 0 if self._client is None else distributed.global_state.process_id
        self.is_first = self.index == 0
        self._prefix = "" if self._client is None else f"seqmodels/{next(self._numbers)}/"
        self._messages = itertools.count()
        self._lock = threading.Lock()
        self._next_event = 0
        self._end: dict[str, Any] | None = None
        self._ended = threading.Event()
        self._leaving = threading.Event()
        self._boundaries = 0
        self._signal: int | None = None
        self._stop_at: int | None = None
        self._agreed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Group":
        if self.count > 1:
            self._thread.start()
        return self

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        if self.count == 1:
            return
        if error is None or (self._stop_at is not None and not isinstance(error, Exception)):
            self.barrier()
            self._publish({"over": True})
            self._thread.join()
            return
        self._leaving.set()
        code = getattr(error, "exit_code", 1)
        replacement = None
        if isinstance(error, UserError):
            self._publish({"code": code, "line": str(error)})
        elif not isinstance(error, Exception):
            self._publish({"code": code, "line": f"process {self.index} was stopped ({error})"})
        else:
            text = " ".join(str(error).split())[:300]
            if self._ended.wait(_GRACE_SECONDS):  # of another's mistake this one saw the consequence
                replacement = UserError(self._end["line"])
            elif _LOST.search(text):
                replacement = UserError(LOST)
                self._publish({"code": 1, "line": LOST})
            else:
                self._publish({"code": 1, "line": f"process {self.index} failed: {type(error).__name__}: {text}"})
        self._leave()
        atexit.register(end_now, code)
        if replacement is not None:
            raise replacement from error

    # -- Agreement ------------------------------------------------------------------------------------------------

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns in the first process, a JSON value; a UserError there is raised in all processes.

        Raises:
            UserError: `make` raised it.
        """
        if self.count == 1:
            return make()
        key = f"from_first/{next(self._messages)}"
        if not self.is_first:
            answer = json.loads(self._get(key))
            if "error" in answer:
                raise UserError(answer["error"])
            return answer["value"]
        try:
            value = make()
        except UserError as error:
            self._set(key, json.dumps({"error": str(error)}))
            raise
        self._set(key, json.dumps({"value": value}))
        return value

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all processes, in their order."""
        if self.count == 1:
            return [value]
        key = f"gather/{next(self._messages)}/"
        self._set(f"{key}{self.index}", json.dumps(value))
        self._client.wait_at_barrier(f"{self._prefix}{key}", _WAIT_MS)
        found = {int(name.rpartition("/")[2]): text for name, text in self._client.key_value_dir_get(f"{self._prefix}{key}")}
        return [json.loads(found[index]) for index in range(self.count)]

    def barrier(self) -> None:
        """Return when all have come here."""
        if self.count > 1:
            self._client.wait_at_barrier(f"{self._prefix}barrier/{next(self._messages)}", _WAIT_MS)

    @classmethod
    def alone(cls) -> "Group":
        """This process, for what it does without the others."""
        return cls(alone=True)

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """The others enter when the first has left: what it has put into a folder they find there."""
        if self.is_first:
            yield
        self.barrier()
        if not self.is_first:
            yield

    # -- Stopping -------------------------------------------------------------------------------------------------

    def request_stop(self, number: int) -> None:
        """All stop, for this signal, at one of the next boundaries, the same for all."""
        self._publish({"signal": number})

    def boundary(self) -> int | None:
        """To be called wherever a run can be left; the number of the signal if it is to be left here, by all."""
        with self._lock:
            self._boundaries += 1
            is_stopping = self._signal is not None
        if is_stopping:
            self._agreed.wait()
        return self._signal if self._stop_at is not None and self._boundaries >= self._stop_at else None

    def end_all(self, code: int, line: str) -> None:
        """End all processes without saving, each with this line; this one, too, wherever its main thread is."""
        self._publish({"code": code, "line": line, "at_once": True})

    # -- The thread -----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        for number in itertools.count():
            try:
                event = json.loads(self._get(f"event/{number}"))
            except jax.errors.JaxRuntimeError:
                return  # the coordination service is gone: JAX ends the process
            self._next_event = number + 1
            if "over" in event:
                return
            if "signal" in event:
                self._agree_to_stop(event["signal"])
                continue
            self._end = event
            self._ended.set()
            if self._leaving.wait(0.0 if "at_once" in event else _GRACE_SECONDS):
                return
            self._end_process(event)
            return

    def _end_process(self, event: dict[str, Any]) -> None:
        print(escape.escape(f"error: {event['line']}" if event["code"] == 1 else event["line"], "line"), file=sys.stderr)
        self._leave()
        end_now(event["code"])

    def _agree_to_stop(self, number: int) -> None:
        """The boundary after the last one that any process has reached: main threads wait there until it is known."""
        with self._lock:
            if self._signal is not None:
                return
            self._signal = number
            reached = self._boundaries
        self._set(f"stop/{self.index}", str(reached))
        self._client.wait_at_barrier(f"{self._prefix}stop", _AGREE_MS)
        self._stop_at = 1 + max(int(text) for _, text in self._client.key_value_dir_get(f"{self._prefix}stop/"))
        self._agreed.set()

    def _leave(self) -> None:
        """Wait a little for the others to have read why: process 0 takes the coordination service with it."""
        try:
            self._client.wait_at_barrier(f"{self._prefix}leave", _LEAVE_MS)
        except jax.errors.JaxRuntimeError:
            pass  # one of them is gone

    def _publish(self, event: dict[str, Any]) -> None:
        for number in itertools.count(self._next_event):
            try:
                self._set(f"event/{number}", json.dumps(event))
                return
            except jax.errors.JaxRuntimeError as error:
                if "ALREADY_EXISTS" not in str(error):
                    return  # the coordination service is gone

    def _set(self, key: str, text: str) -> None:
        self._client.key_value_set(f"{self._prefix}{key}", text)

    def _get(self, key: str) -> str:
        return self._client.blocking_key_value_get(f"{self._prefix}{key}", _WAIT_MS)
