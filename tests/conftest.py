"""What every test runs under: the CPU unless told otherwise, and our own deprecated calls as errors."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def pytest_configure(config):
    for category in ("DeprecationWarning", "FutureWarning", "PendingDeprecationWarning"):
        config.addinivalue_line("filterwarnings", rf"error::{category}:(seqmodels|tests|configs|__main__)\b.*")
