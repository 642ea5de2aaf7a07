"""seqmodels: which sequence architecture is better, by how much, and at what cost."""

from seqmodels import xla_cpu

xla_cpu.ask_for_right_fusions()  # in time for a notebook that has not used JAX yet; later, the first op on a CPU warns


def __getattr__(name: str):
    # Imported on first use, so that `import seqmodels.ops` costs no more than it needs.
    if name == "load_run":
        from seqmodels.run import load_run

        return load_run
    if name == "generate":
        from seqmodels.decoding import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
