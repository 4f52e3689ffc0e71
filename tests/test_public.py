"""The public surface: what importing costs, what the modules export, and what a CPU without the interpreter is told."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import triton

import triton_moe
from triton_moe import functional, nn, testing

ROOT = Path(__file__).parent.parent

FUNCTIONS = {
    "attention",
    "entropy_regularizer",
    "gating",
    "output_projection",
    "sigma_moe",
    "switchall",
    "switchall_backward",
    "switchall_forward",
    "switchhead",
    "switchhead_backward",
    "switchhead_forward",
    "value_projection",
}
TYPES = {
    "RoPE",
    "Routing",
    "Saved",
    "SigmaMoEWeights",
    "SwitchAllGradients",
    "SwitchAllWeights",
    "SwitchHeadGradients",
    "SwitchHeadWeights",
    "XL",
}


def child(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT, env=env
    )


def test_all_lists_what_is_documented():
    assert set(functional.__all__) == FUNCTIONS | TYPES
    assert set(nn.__all__) == {"SigmaMoE", "SwitchAll", "SwitchHead"}
    assert set(triton_moe.__all__) == {"functional", "nn", "testing"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in FUNCTIONS | set(nn.__all__):
        assert f"`{name}`" in readme, f"README does not name {name}"


@pytest.mark.parametrize("module", [functional, nn, testing], ids=lambda m: m.__name__)
def test_everything_public_is_there_and_says_what_it_is(module):
    for name in module.__all__:
        value = getattr(module, name)
        assert value.__module__ == module.__name__, f"{name} is defined in {value.__module__}"
        if inspect.isfunction(value) or module is nn:
            assert (value.__doc__ or "").strip(), f"{name} has no docstring"


def test_importing_touches_neither_triton_nor_cuda():
    code = "\n".join(
        f"import {module}; assert not [m for m in sys.modules if m.split('.')[0] in ('triton', 'hypothesis')], '{module}'"
        for module in ("triton_moe", "triton_moe.testing", "triton_moe.tuning", "triton_moe.__main__", "reference")
    )
    run = child(f"import sys, torch\n{code}\nassert not torch.cuda.is_initialized()")
    assert run.returncode == 0, run.stderr


def test_importing_everything_without_a_gpu_works():
    run = child("from triton_moe import functional, nn, testing", CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 0, run.stderr


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        triton_moe.nonsense  # noqa: B018


CALL = "import torch; from triton_moe import functional as F; F.gating(torch.ones(3, 4), torch.ones(5, 4), top_k=2)"


@pytest.mark.parametrize(
    "code, state",
    [
        (CALL, "is not set"),
        (f"import triton, os; os.environ['TRITON_INTERPRET'] = '1'; {CALL}", "was not when Triton was first imported"),
    ],
    ids=["never set", "set too late"],
)
def test_a_cpu_tensor_outside_the_interpreter_is_an_error_that_says_what_to_do(code, state):
    run = child(code, CUDA_VISIBLE_DEVICES="")
    message = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1 and message.startswith("ValueError: x is on cpu"), run.stderr
    assert "TRITON_INTERPRET=1" in message and state in message


@pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) >= "2.4.0" and triton.__version__.startswith("3.6."),
    reason="the interpreter of Triton 3.6 reads one-element arrays as numbers, which NumPy 2.4 refuses",
)
def test_the_same_call_works_inside_the_interpreter():
    run = child(CALL, TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stderr
