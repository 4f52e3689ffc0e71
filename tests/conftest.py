"""What every test shares: the interpreter where there is no GPU, poisoned allocations, Hypothesis profiles."""

import os
import sys

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: later is too late

import pytest
from hypothesis import settings

from triton_moe.testing import poisoned

# Hypothesis decides shapes, flags and seeds; "ci" repeats the same examples on every run, "nightly" looks for new ones.
settings.register_profile("ci", max_examples=15, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("nightly", max_examples=500, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A kernel that faults leaves its process without a GPU: end the worker, so that pytest-xdist starts another."""
    report = yield
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and "CUDA error: an illegal" in report.longreprtext:
        sys.__stderr__.write(f"{item.nodeid}\n{report.longreprtext}\n")
        sys.__stderr__.flush()
        os._exit(1)
    return report


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session", autouse=True)
def poisoned_empty():
    """Nothing can rely on memory that no kernel wrote."""
    with poisoned():
        yield
