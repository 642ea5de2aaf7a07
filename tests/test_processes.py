"""What processes agree on, with threads in their place and a store of this process's own."""

import threading
import time

import jax
import pytest

from seqmodels import processes
from seqmodels.errors import UserError
from seqmodels.processes import Group

COUNT = 3


class Store:
    """The key-value store of JAX's coordination service, for threads."""

    def __init__(self):
        self.values, self.changed, self.barriers = {}, threading.Condition(), {}

    def key_value_set(self, key, value):
        with self.changed:
            if key in self.values:
                raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, timeout_in_ms):
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000)
            return self.values[key]

    def key_value_dir_get(self, key):
        return [(name, value) for name, value in self.values.items() if name.startswith(key)]

    def wait_at_barrier(self, barrier_id, timeout_in_ms):
        with self.changed:
            barrier = self.barriers.setdefault(barrier_id, threading.Barrier(COUNT))
        try:
            barrier.wait(timeout_in_ms / 1000)
        except threading.BrokenBarrierError as error:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED") from error


def run_together(monkeypatch, work):
    """What ``work(group)`` returned or raised in each process, and how a thread ended those it ended: (code, line)."""
    store, results, ended = Store(), [None] * COUNT, [None] * COUNT
    monkeypatch.setattr(processes.atexit, "register", lambda *_: None)
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 0.3)
    monkeypatch.setattr(processes, "_LEAVE_MS", 300)

    def process(index):
        group = Group.alone()
        group._client, group.count, group.index, group.is_first, group._prefix = store, COUNT, index, index == 0, "test/"

        def ends(event):
            ended[index] = event["code"], event["line"]

        group._end_process = ends
        try:
            with group:
                results[index] = work(group)
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=process, args=(index,), daemon=True) for index in range(COUNT)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    for index, thread in enumerate(threads):
        while thread.is_alive() and ended[index] is None and time.monotonic() < deadline:  # one that was ended may wait for ever
            thread.join(0.05)
    return results, ended


def test_all_have_what_the_first_makes_and_what_each_has(monkeypatch):
    def work(group):
        return group.from_first(lambda: ["made by", group.index]), group.gather(10 * group.index)

    results, ended = run_together(monkeypatch, work)
    assert results == [(["made by", 0], [0, 10, 20])] * COUNT and ended == [None] * COUNT


def test_the_first_goes_ahead(monkeypatch):
    order = []

    def work(group):
        with group.first_goes_ahead():
            order.append(group.index)

    run_together(monkeypatch, work)
    assert order[0] == 0 and sorted(order) == [0, 1, 2]


def test_a_mistake_of_the_first_is_everybodys(monkeypatch):
    def work(group):
        def make():
            raise UserError("the folder is another run's")

        return group.from_first(make)

    results, _ = run_together(monkeypatch, work)
    assert [str(error) for error in results] == ["the folder is another run's"] * COUNT
    assert all(isinstance(error, UserError) for error in results)


def test_a_mistake_of_one_ends_the_others_where_they_wait(monkeypatch):
    def work(group):
        if group.index == 1:
            raise UserError("no such file")
        threading.Event().wait(3)  # in a collective that never ends

    results, ended = run_together(monkeypatch, work)
    assert str(results[1]) == "no such file"
    assert ended == [(1, "no such file"), None, (1, "no such file")]


def test_who_sees_the_consequence_says_the_cause(monkeypatch):
    def work(group):
        if group.index == 1:
            raise UserError("no such file")
        raise ValueError("Gloo all-reduce failed: Connection closed by peer")

    results, _ = run_together(monkeypatch, work)
    assert [str(error) for error in results] == ["no such file"] * COUNT


def test_a_broken_collective_without_a_cause_is_said(monkeypatch):
    def work(group):
        if group.index != 1:
            raise ValueError("Gloo all-reduce failed: Connection closed by peer")
        threading.Event().wait(3)  # it was killed

    results, _ = run_together(monkeypatch, work)
    assert str(results[0]) == str(results[2]) == processes.LOST


def test_a_bug_keeps_its_traceback_and_is_named_elsewhere(monkeypatch):
    def work(group):
        if group.index == 1:
            raise TypeError("a bug")
        threading.Event().wait(3)

    results, ended = run_together(monkeypatch, work)
    assert isinstance(results[1], TypeError) and ended[0] == (1, "process 1 failed: TypeError: a bug")


def test_all_stop_at_the_same_boundary_however_far_they_are(monkeypatch):
    told = threading.Event()

    def work(group):
        for number in range(10**6):
            if group.index == 1 and number == 5:
                group.request_stop(15)
                told.set()
            if number == 20 * group.index:  # one is ahead of another when the signal comes
                told.wait(5)
            if group.boundary() is not None:
                return number

    results, _ = run_together(monkeypatch, work)
    assert len(set(results)) == 1 and results[0] < 10**6 - 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"coordinator": "a:1"}, "--num_processes and --process_id missing"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "--process_id=2 must be"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "must be HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit(flags, message):
    with pytest.raises(UserError, match=message):
        processes.start(**flags)


def test_one_process_alone_needs_nothing():
    with Group() as group:
        assert group.is_first and group.from_first(lambda: 1) == 1 and group.gather(2) == [2] and group.boundary() is None
