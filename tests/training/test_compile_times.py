"""How long compiling will take, from what it took: no figure where nothing is known."""

import jax
import jax.numpy as jnp
import pytest

from seqmodels.training import compile_times
from seqmodels.training.compile_times import Program, expected


def kept(folder, *times, place="one"):
    """What earlier compilations took: digest, lines, seconds, whether it came from the cache."""
    with pytest.MonkeyPatch.context() as patch:
        for digest, lines, seconds, from_cache in times:
            clock = iter([0.0, seconds])
            patch.setattr(compile_times.time, "perf_counter", lambda clock=clock: next(clock))
            with compile_times.measured(Program(digest, lines, place), folder) as took:
                took.from_cache = from_cache
    return folder


def test_nothing_is_known(tmp_path):
    unknown = "how long is not known", "nothing like it was compiled here"
    assert expected(Program("a", 100, "one"), None) == unknown
    assert expected(Program("a", 100, "one"), tmp_path / "absent") == unknown
    kept(tmp_path, ("a", 100, 7.0, False), place="another device")
    (tmp_path / compile_times.FILE_NAME).open("a").write('{"digest": "a"}\n{"cut\n[1]\n{"seconds": -1.0}\n')
    assert expected(Program("a", 100, "one"), tmp_path) == unknown


def test_the_same_program(tmp_path):
    kept(tmp_path, ("a", 100, 20.4, False), ("b", 100, 3.0, False))
    assert expected(Program("a", 100, "one"), tmp_path) == ("at most 20 s", "it is kept from an earlier run")
    kept(tmp_path, ("a", 100, 0.52, True), ("a", 100, 0.44, True))
    assert expected(Program("a", 100, "one"), tmp_path) == ("about 0.4 s", "it is kept from an earlier run")


def test_other_programs_say_by_their_length(tmp_path):
    kept(tmp_path, ("a", 1000, 2.0, False))
    assert expected(Program("new", 3000, "one"), tmp_path) == ("about 6.0 s", "by one compiled here")
    more = [(str(index), 3000, 3.0 * index, False) for index in range(1, 6)]
    kept(tmp_path, *more, ("1", 3000, 0.1, True), ("b", 10**6, 1e6, False))
    assert expected(Program("new", 6000, "one"), tmp_path) == ("about 18 s", "by 5 programs compiled here")


@pytest.mark.parametrize(("seconds", "text"), [(0.44, "0.4 s"), (12.6, "13 s"), (125.0, "125 s"), (1260.0, "21 min")])
def test_in_words(seconds, text):
    assert str(compile_times.Took(seconds)) == f"compiled in {text}"
    assert str(compile_times.Took(seconds, from_cache=True)) == f"compiled before, read in {text}"


def test_a_program_is_known_by_its_operations_and_compiled_once(tmp_path):
    """What is compiled ahead is what the call runs; a folder that cannot be written is no error."""
    first, again, other = (jax.jit(function).lower(jnp.ones(3)) for function in (jnp.sin, jnp.sin, jnp.cos))
    assert compile_times.program(first) == compile_times.program(again) != compile_times.program(other)
    assert compile_times.program(first).lines > 3
    function = jax.jit(lambda x: jnp.sin(x) * 3)
    with compile_times.measured(compile_times.program(first), tmp_path / "absent" / "folder") as took:
        function.lower(jnp.ones(3)).compile()
    assert took.seconds > 0
    compiled = []
    x = jax.block_until_ready(jnp.ones(3))

    def listen(event, seconds, **_):
        compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        function(x)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not any("backend_compile" in event for event in compiled)


def test_where_programs_are_kept(monkeypatch):
    for name, folder in ((None, None), ("gs://bucket/xla", None), ("/somewhere", "/somewhere")):
        monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", name, raising=False)
        found = compile_times.folder()
        assert (found and str(found)) == folder
