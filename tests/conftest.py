"""What every test runs under: the CPU, unless the environment names another platform, and no program compiled twice.

The processes of `pytest -n`, and those that tests start, share compiled programs through a folder that is deleted at the end of
the session. With `--cpu-limit` the CPU time of every test is measured, the slowest are listed, and the run fails if one takes more.
"""

import gc
import math
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

NEW_OBJECTS = 300_000  # between two collections of garbage; Python's 700 cost a tenth of the time to trace and compile
MOST_MAPPINGS = 20_000  # above, programs are released at the end of a module; a module makes a few thousand
# Folders whose tests have the marker `tools`.
TOOLS = tuple(Path(__file__).parent / folder for folder in ("benchmarks", "tools", "ops/kernels", "interop"))
# Folders of which hardly a program is compiled twice (6 of 417 in tests/mixers): to keep them takes 4 % of their time.
ONCE = tuple(Path(__file__).parent / folder for folder in ("contract", "ops", "mixers"))
KEPT_SECONDS = 0.1  # of compiling: a program that takes longer is kept for the session
SLOWEST = 10  # so many tests are listed
CPU_SECONDS = "CPU seconds"  # the property of a report
started = pytest.StashKey[float]()
session_started = pytest.StashKey[float]()


def pytest_addoption(parser):
    parser.addoption(
        "--cpu-limit", type=float, metavar="SECONDS", help="list the slowest tests; fail if one takes more CPU time than this"
    )
    parser.addoption("--minutes", type=float, metavar="MINUTES", help="skip the tests that have not begun after so many minutes")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    for item in items:
        if any(folder in item.path.parents for folder in TOOLS):
            item.add_marker(pytest.mark.tools)
        if item.get_closest_marker("xdist_group") is None:  # a module's tests share programs and fixtures
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # modules and tests stay to the end
    gc.set_threshold(NEW_OBJECTS)


def pytest_runtest_setup(item):
    minutes = item.config.option.minutes
    if minutes is not None and time.monotonic() > item.config.stash[session_started] + 60 * minutes:
        pytest.skip(f"{minutes:g} minutes are over")


def flags_that_compile_fast(jax_version: tuple[int, ...]) -> list[str]:
    """Half the time to compile of the defaults, measured on initialisation. An unknown flag ends a process: the first was removed."""
    flags = ["--xla_cpu_use_fusion_emitters=false"] if jax_version < (0, 11) else []
    return [*flags, "--xla_cpu_parallel_codegen_split_count=1"]


def cpu_seconds() -> float:
    """Of this process with all its threads, and of the child processes that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    item.stash[started] = cpu_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """The report of the last phase carries what setup, call and teardown took: a worker's reports reach the main process."""
    report = yield
    if call.when == "teardown":
        report.user_properties.append((CPU_SECONDS, cpu_seconds() - item.stash[started]))
    return report


def pytest_runtest_logreport(report):
    taken.extend((seconds, report.nodeid) for name, seconds in report.user_properties if name == CPU_SECONDS)


taken: list[tuple[float, str]] = []  # in the process that reports: (CPU seconds, test)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    limit = session.config.option.cpu_limit
    if limit is not None and any(seconds > limit for seconds, _ in taken) and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    limit = config.option.cpu_limit
    if limit is None or not taken:
        return
    total = sum(seconds for seconds, _ in taken)
    terminalreporter.section(f"{len(taken)} tests, {total:.0f} CPU seconds; the slowest")
    for seconds, test in sorted(taken, reverse=True)[:SLOWEST]:
        terminalreporter.line(f"{seconds:6.1f} s  {test}" + (f"  above the limit of {limit:g} s" if seconds > limit else ""))


def pytest_configure(config):
    config.stash[session_started] = time.monotonic()
    is_worker = hasattr(config, "workerinput")
    programs = config.workerinput["programs"] if is_worker else tempfile.mkdtemp(prefix="seqmodels-programs-")
    if not is_worker:
        config.programs = programs

    import jax

    import seqmodels  # noqa: F401  (before JAX looks for devices: xla_cpu.py says why, its test what happens otherwise)

    # Shapes are tiny and programs run once or twice: compiling is nearly all the time that tests take, also those in processes of
    # their own. `make test-all` has the optimisations, and so has a device, whose programs are not LLVM's alone.
    settings = {"jax_compilation_cache_dir": programs, "jax_persistent_cache_min_compile_time_secs": KEPT_SECONDS}
    if os.environ["JAX_PLATFORMS"] == "cpu" and config.option.markexpr != "":
        settings["jax_disable_most_optimizations"] = True
        os.environ["XLA_FLAGS"] = " ".join(
            (os.environ.get("XLA_FLAGS", ""), *flags_that_compile_fast(jax.__version_info__))
        ).strip()
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)  # for the processes that tests start


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["programs"] = node.config.programs


def pytest_unconfigure(config):
    if hasattr(config, "programs"):
        shutil.rmtree(config.programs, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def keep_programs(request):
    """For the session, but for those that are compiled once."""
    import jax

    is_once = any(folder in request.path.parents for folder in ONCE)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf if is_once else KEPT_SECONDS)


@pytest.fixture(autouse=True, scope="module")
def release_programs():
    """Every compiled program holds memory mappings, of which a process may have 65,530: thousands of tests reach that.

    What a module leaves stays to the end, or until then. A collection of garbage, which some tests ask for, need not look through it:
    tests/training/test_checkpoint.py took 230 CPU seconds at the end of a session, 18 alone.
    """
    yield
    if _mappings() > MOST_MAPPINGS:
        import jax

        gc.unfreeze()
        jax.clear_caches()
    gc.collect()
    gc.freeze()


def _mappings() -> int:
    """Of this process; 0 where the system does not say, and then has no such bound."""
    try:
        with open("/proc/self/maps", "rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0
