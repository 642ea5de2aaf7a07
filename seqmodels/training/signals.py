"""SIGTERM, Ctrl-C and a closed terminal: a run is left in good order, by all its processes at the same step."""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Iterator

from seqmodels import processes


class Stopped(BaseException):
    """A signal ended the run in good order. Not an Exception, so that no library swallows it."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number


class Signals:
    """SIGTERM, Ctrl-C and SIGHUP: noted, raised as `Stopped` where a run can be left. A second one exits at once.

    A thread reads what the system's handler writes (`signal.set_wakeup_fd`), so that neither a collective that waits for another
    process nor a long compilation in the main thread keeps a signal waiting. Python throws away what is raised while it runs a
    library's callback or a finaliser; a signal that has come and is still not obeyed is delivered again, every `AGAIN_SECONDS`.

    Args:
        group: the processes of the run: where they are several, a signal to one stops all, at the same call of `check`.
    """

    AGAIN_SECONDS = 1.0

    def __init__(self, group: processes.Group | None = None):
        self._group = group if group is not None and group.count > 1 else None

    def __enter__(self) -> "Signals":
        self._received = None
        self._may_raise = False
        self._repeated = 0
        self._is_running = False
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            self._readable, self._writable = os.pipe()
            os.set_blocking(self._writable, False)
            self._wakeup_before = signal.set_wakeup_fd(self._writable, warn_on_full_buffer=False)
            # A hangup, of a terminal that is closed, is none for whom nohup protects from it.
            hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
            self._handlers = {n: signal.signal(n, self._handle) for n in (signal.SIGTERM, signal.SIGINT, *hangup)}
            self._thread = threading.Thread(target=self._read, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._handlers:
            signal.set_wakeup_fd(self._wakeup_before)
            os.write(self._writable, b"\0")  # ends the thread
            self._thread.join()
            os.close(self._readable)
            os.close(self._writable)

    def running(self) -> None:
        """From here on there is something to save: of several processes none is ended without that, but by a second signal."""
        self._is_running = True

    def check(self) -> None:
        """Raise `Stopped` if a signal has come. Several processes call it in the same places."""
        number = self._received if self._group is None else self._group.boundary()
        if number is not None:
            raise Stopped(number)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside, a signal raises `Stopped` at once: work that can be left half done.

        Not so of several processes, of which none can be left alone in a collective: there it is what `check` does at the end.
        """
        self._may_raise = self._group is None
        try:
            if self._may_raise:
                self.check()
            yield
        except Exception:
            if self._may_raise:
                self.check()  # a library made another error of `Stopped`
            raise
        finally:
            self._may_raise = False
        if self._group is None:
            self.check()  # or none

    def _handle(self, number, frame) -> None:
        self._received = self._received or number
        if self._may_raise:
            raise Stopped(self._received)

    def _read(self) -> None:
        """The thread: counts signals, and delivers again the one that is not obeyed."""
        first = None
        arrivals = select.poll()  # `select.select` takes no file beyond number 1023
        arrivals.register(self._readable, select.POLLIN)
        while True:
            if not arrivals.poll(1000 * self.AGAIN_SECONDS):
                if self._received is not None and self._may_raise:
                    self._repeated += 1
                    signal.pthread_kill(threading.main_thread().ident, self._received)
                continue
            for number in os.read(self._readable, 1):
                if number == 0:
                    return
                if number not in self._handlers:
                    continue
                if self._repeated:
                    self._repeated -= 1
                elif first is None:
                    first = self._received = number
                    self._note_first(number)
                else:
                    self._end_at_once(number)

    def _note_first(self, number: int) -> None:
        if self._group is None or self._is_running:
            os.write(2, b"\nstopping after this step; once more to stop without saving\n")
        if self._group is None:
            return
        if self._is_running:
            self._group.request_stop(number)
        else:
            self._group.end_all(128 + number, f"stopped by {signal.Signals(number).name} before the first step")

    def _end_at_once(self, number: int) -> None:
        if self._group is not None:
            telling = threading.Thread(
                target=self._group.end_all, daemon=True,
                args=(128 + number, f"stopped by {signal.Signals(number).name} without saving"),
            )  # fmt: skip
            telling.start()
            telling.join(1.0)  # the thread of the group then ends this process; not where the others are gone
            threading.Event().wait(1.0)
        processes.end_now(128 + number)
