"""The command line: help, options, exit codes."""

import functools
import importlib
import json
import os
import re
import signal
import subprocess
import sys

import pytest

import triton_moe
from triton_moe.__main__ import COMMANDS, main


def cli(*args: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "triton_moe", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_triton(command):
    code = f"""
import sys
from triton_moe.__main__ import main
try:
    main([{command!r}, "--help"])
except SystemExit as stop:
    assert stop.code == 0
assert "triton" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: triton-moe {command}")


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert set(COMMANDS) <= set(capsys.readouterr().out.split())


def test_version():
    result = cli("--version")
    assert (result.returncode, result.stdout) == (0, f"triton-moe {triton_moe.__version__}\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["train"], "train"),
        (["compile", "--targets", "sm_90", "--frobnicate"], "--frobnicate"),
        (["compile", "--target", "sm_75"], "sm_75"),
        (["compile", "--op", "softmax"], "softmax"),
        (["compile", "--dtype", "float64"], "float64"),
        (["autotune", "--budget", "soon"], "soon"),
        (["autotune", "--preset", "mine"], "mine"),
        (["autotune", "--preset", "llm", "--shapes", "x.json"], "--shapes"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("triton-moe") and message in error and error.count("\n") == 1


def test_a_wrong_file_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # main unsets it; this puts it back afterwards
    assert main(["compile", "--json", str(tmp_path / "missing" / "rows.json")]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "missing") in error and error.count("\n") == 1


def test_compile_prints_a_row_of_numbers(tmp_path):
    path = tmp_path / "rows.json"
    result = cli("compile", "--target", "sm_90", "--op", "position", "--dtype", "bfloat16", "--json", str(path))
    assert result.returncode == 0, result.stderr
    row = r"^position +rope_rotate_kernel +bfloat16 +sm_90 +(\d+) +(\d+) +(\d+) +\d+\.\d  P="
    registers, spills, shared = map(int, re.search(row, result.stdout, re.MULTILINE).groups())
    first = json.loads(path.read_text().splitlines()[0])
    assert (first["registers"], first["spill_bytes"], first["shared_bytes"]) == (registers, spills, shared)
    assert 0 < registers <= 255
    assert re.search(r"^sm_90: \d+ kernels compiled: 0 failed,", result.stdout, re.MULTILINE)


def test_a_kernel_that_fails_is_exit_1(monkeypatch, capsys):
    compiler = importlib.import_module("triton_moe.compiler")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    failed = compiler.Compiled("gating", "_k", "sm_90", "float16", "", {}, 0.0, error="CompilationError:\nwhat went wrong")
    monkeypatch.setattr(compiler, "each", lambda function, jobs, processes, seconds: [(job, [failed]) for job in jobs])
    assert main(["compile", "--target", "sm_90", "--op", "position", "--dtype", "float16"]) == 1
    assert "failed" in (out := capsys.readouterr().out) and "what went wrong" in out


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_is_exit_130_without_a_traceback():
    command = [sys.executable, "-u", "-m", "triton_moe", "compile"]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell starts what it runs beside itself deaf
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, preexec_fn=heard, **pipes)
    assert process.stdout.readline().startswith("op")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "")
