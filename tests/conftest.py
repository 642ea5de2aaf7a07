"""What every test runs under: the CPU, unless the environment names another platform, and no program compiled twice.

The processes of `pytest -n` share compiled programs through a folder that is deleted at the end of the session.
"""

import os
import shutil
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

MOST_MAPPINGS = 20_000  # above, programs are released at the end of a module; a module makes a few thousand


def pytest_configure(config):
    is_worker = hasattr(config, "workerinput")
    programs = config.workerinput["programs"] if is_worker else tempfile.mkdtemp(prefix="seqmodels-programs-")
    if not is_worker:
        config.programs = programs

    import jax

    import seqmodels  # noqa: F401  (before JAX looks for devices: xla_cpu.py says why, its test what happens otherwise)

    # Shapes are tiny and programs run once or twice: LLVM's optimisations cost a third of `make test`. `make test-all` has them, and
    # so has a device, whose programs are not LLVM's alone.
    on_cpu = os.environ["JAX_PLATFORMS"] == "cpu"
    jax.config.update("jax_disable_most_optimizations", on_cpu and config.option.markexpr != "")
    jax.config.update("jax_compilation_cache_dir", programs)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["programs"] = node.config.programs


def pytest_unconfigure(config):
    if hasattr(config, "programs"):
        shutil.rmtree(config.programs, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def release_programs():
    """Every compiled program holds memory mappings, of which a process may have 65,530: thousands of tests reach that."""
    yield
    if _mappings() > MOST_MAPPINGS:
        import jax

        jax.clear_caches()


@pytest.fixture(scope="module")
def as_shipped():
    """Programs are compiled as a process of its own compiles them: for modules that compare their bits with such a process."""
    import jax

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def _mappings() -> int:
    """Of this process; 0 where the system does not say, and then has no such bound."""
    try:
        with open("/proc/self/maps", "rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0
