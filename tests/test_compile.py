"""Every kernel compiles for every target, fits its shared memory, keeps its registers and uses no float atomics."""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import triton

from triton_moe import compiler
from triton_moe.kernels import common

# Kernels whose defaults may spill: (kernel, dtype, target): bytes of a thread, "half" being float16 and bfloat16, where none may.
SPILLS: dict[tuple[str, str, str], int] = {
    # Without tensor cores a float32 product keeps whole rows of both factors in registers: 100 padded or 256 channels are too
    # many, with tiles of 8 rows and with 4 or 16 warps too.
    ("_attention_fwd_kernel", "float32", "sm_90"): 120,
    ("_attention_fwd_kernel", "float32", "sm_100"): 64,
    ("_attention_bwd_dkdv_kernel", "float32", "gfx942"): 124,
    ("_attention_bwd_dq_kernel", "float32", "sm_80"): 192,
    ("_attention_bwd_dq_kernel", "float32", "sm_90"): 232,
    ("_attention_bwd_dq_kernel", "float32", "sm_100"): 224,
    ("_attention_bwd_dq_kernel", "float32", "gfx942"): 180,
    # A few bytes, by the assembler's own choice.
    ("_combine_kernel", "float32", "sm_90"): 8,
    ("_grouped_dw_kernel", "float32", "sm_80"): 8,
    ("_grouped_dw_kernel", "float32", "sm_90"): 8,
    ("_grouped_dw_kernel", "float32", "sm_100"): 8,
    # 128 experts: of float32 products without tensor cores.
    ("_gating_fwd_kernel", "float32", "gfx942"): 24,
}

# No case has it: P 76, not causal, RoPE on load in halves, float16 on sm_80, forward: 8 bytes by the assembler's own choice (none
# in bfloat16, none for P 80).

# Where Triton 3.6 spills more than later ones.
SPILLS_36: dict[tuple[str, str, str], int] = {
    ("_gating_fwd_kernel", "float32", "gfx942"): 44,
    ("_grouped_gemm_kernel", "float32", "sm_100"): 16,
}

# 16-bit inputs only: kernels/sets.py, and a product that float32 takes in float64.
HALF_ONLY = {"_dense_kernel", "_gather_kernel", "_last_kernel", "_pack_kernel", "_spread_kernel", "_xl_weight_kernel"}

# A kernel for each thing compile_case has to notice, and one that it must leave alone.
SAMPLES = """
import dataclasses, json, triton, triton.language as tl
from triton_moe import compiler, workloads
from triton_moe.kernels import common

@triton.jit
def _float_atomic_kernel(x_ptr):
    tl.atomic_add(x_ptr + tl.arange(0, 16), 1.0)

@triton.jit
def _int_atomic_kernel(x_ptr):
    tl.atomic_max(x_ptr.to(tl.pointer_type(tl.int32)) + tl.arange(0, 16), 1)

@triton.jit
def _broken_kernel(x_ptr):
    tl.store(x_ptr + tl.arange(0, 17), 1.0)

@triton.jit
def _spilling_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i[:, None] * BLOCK + i[None, :])
    tl.store(x_ptr + i[:, None] * BLOCK + i[None, :], tl.dot(x, x, input_precision="ieee"))

def samples(make, n):
    x = make(n)
    common.launch(_float_atomic_kernel, (1,), x)
    common.launch(_int_atomic_kernel, (1,), x)
    common.launch(_broken_kernel, (1,), x)
    common.launch(_spilling_kernel, (1,), x, BLOCK=64, num_warps=1)
    common.launch(_spilling_kernel, (0,), x, BLOCK=32)

if __name__ == "__main__":
    workloads.WORKLOADS["samples"] = samples
    compiler.CASES["samples"] = [{"n": 64}]
    rows = [row for target in compiler.MAIN_TARGETS for row in compiler.compile_all(target, ["float32"], ["samples"])]
    print(json.dumps([dataclasses.asdict(row) for row in rows]))
"""


def child(*args: str, **options) -> subprocess.CompletedProcess:
    """Run Python where kernels can be compiled: outside the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env, **options)


def compiled(tmp_path_factory, *options: str) -> list[dict]:
    path = tmp_path_factory.mktemp("compile") / "rows.json"
    result = child("-m", "triton_moe", "compile", "--json", str(path), *options, timeout=1200)
    assert path.exists(), result.stderr
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    return compiled(tmp_path_factory)


def test_every_kernel_compiles(rows):
    assert [(row["kernel"], row["target"], row["dtype"], row["error"]) for row in rows if row["error"]] == []
    kernels = {row["kernel"] for row in rows}
    assert len(kernels) >= 15
    compiled_for = {(row["kernel"], row["dtype"], row["target"]) for row in rows}
    everything = {(k, d, t) for k in kernels for d in compiler.DTYPES for t in compiler.MAIN_TARGETS}
    assert compiled_for == {(k, d, t) for k, d, t in everything if d != "float32" or k not in HALF_ONLY}


def test_every_kernel_of_the_package_has_a_case(rows):
    defined = {
        line.split("def ")[1].split("(")[0]
        for file in Path(common.__file__).parent.rglob("*.py")
        for line in file.read_text().splitlines()
        if line.startswith("def _") and line.partition("(")[0].endswith("_kernel")
    }
    assert {row["kernel"] for row in rows} == defined


def test_shared_memory_fits(rows):
    too_large = [row for row in rows if row["shared_bytes"] > compiler.TARGETS[row["target"]][1]]
    assert [(row["kernel"], row["target"], row["dtype"], row["shape"], row["shared_bytes"]) for row in too_large] == []


def test_defaults_do_not_spill(rows):
    most: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if row["spill_bytes"]:
            key = row["kernel"], "float32" if row["dtype"] == "float32" else "half", row["target"]
            most[key] = max(most.get(key, 0), row["spill_bytes"])
    old = triton.__version__.startswith("3.6.")
    allowed = SPILLS | SPILLS_36 if old else SPILLS
    assert {key: spilled for key, spilled in most.items() if spilled > allowed.get(key, 0)} == {}
    assert set(SPILLS_36 if old else SPILLS) <= set(most), "an exception nobody needs any more"


def test_no_float_atomics(rows):
    assert {row["kernel"] for row in rows if row["float_atomics"]} == set()


@pytest.mark.smoke
def test_every_kernel_compiles_for_one_target(tmp_path_factory):
    rows = compiled(tmp_path_factory, "--target", "sm_90", "--dtype", "bfloat16")
    assert [(row["kernel"], row["error"]) for row in rows if row["error"]] == []
    assert {row["op"] for row in rows} == set(compiler.CASES)
    assert all(row["registers"] > 0 for row in rows)


@pytest.mark.smoke
def test_what_a_row_says(tmp_path):
    script = tmp_path / "samples.py"
    script.write_text(SAMPLES)
    result = child(str(script), timeout=300)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout.splitlines()[-1])
    for target in compiler.MAIN_TARGETS:
        float_atomic, int_atomic, broken, spilling = (row for row in rows if row["target"] == target)
        assert (float_atomic["float_atomics"], int_atomic["float_atomics"]) == (True, False)
        assert float_atomic["error"] is None and float_atomic["registers"] > 0 and float_atomic["spill_bytes"] == 0
        assert "power of 2" in broken["error"] and broken["registers"] is None
        assert spilling["shared_bytes"] > 0 and spilling["config"] == {"BLOCK": 64, "num_warps": 1}
        assert (spilling["spill_bytes"] > 0) == (target != "gfx942"), spilling


def test_defaults_fit_gpus_with_less_shared_memory(tmp_path_factory):
    rows = compiled(tmp_path_factory, "--target", "sm_86", "sm_120", "--dtype", "bfloat16")
    assert [(row["kernel"], row["target"], row["error"]) for row in rows if row["error"]] == []
    assert [row for row in rows if row["shared_bytes"] > compiler.TARGETS[row["target"]][1]] == []
    assert {(row["op"], row["target"]) for row in rows} == {(op, t) for op in compiler.CASES for t in ("sm_86", "sm_120")}


WARNED = """
from triton_moe import compiler

shape = {"E": 2, "G": 512, "TOP_K": 2, "D": 512, "N": 4096}
((_, key, _),) = [found for found in compiler.lookups("mlp", "sm_90", "bfloat16", shape) if found[1].kernel == "up"]
for warps in (4, 8):
    config = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": warps, "num_stages": 3}
    row = compiler.compile_candidate("sm_90", "bfloat16", "mlp", shape, key, config)
    print(row.error, row.warning, row.spill_bytes > 0)
"""


SHARED_KEY = """
from triton_moe import compiler

shape = {"sides": 1, "H": 1, "E": 64, "TOP_K": 2, "D": 64}  # one key for a gate with and without the cast of x
((_, key, config),) = compiler.lookups("gating", "sm_90", "bfloat16", shape)
both = compiler.compile_case("sm_90", "bfloat16", "gating", shape, only=lambda kernel: "gating_fwd" in kernel.__name__)
worst = compiler.compile_candidate("sm_90", "bfloat16", "gating", shape, key, config)
registers, shared = [row.registers for row in both], [row.shared_bytes for row in both]
print(len(set(registers)), worst.registers == max(registers), worst.shared_bytes == max(shared))
"""


def test_of_kernels_that_share_a_configuration_the_worst_counts():
    result = child("-c", SHARED_KEY, timeout=300)
    assert result.stdout.splitlines() == ["2 True True"], result.stderr


def test_what_the_assembler_warns_of(tmp_path, monkeypatch):
    """128 x 256 float32 sums are all registers of four warps."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # from the cache comes no warning
    result = child("-c", WARNED, timeout=300)
    assert result.stdout.splitlines() == ["None True True", "None False False"], result.stderr


def test_a_cache_filled_ahead_of_time_is_all_that_a_second_run_needs(tmp_path):
    options = ("--target", "sm_90", "--op", "position", "--dtype", "bfloat16", "--cache", str(tmp_path / "cache"))
    assert child("-m", "triton_moe", "compile", *options, timeout=600).returncode == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert sum(path.suffix == ".cubin" for path in files) >= 4
    assert child("-m", "triton_moe", "compile", *options, timeout=600).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()} == files


def test_the_whole_space_is_compiled_in_parts(tmp_path):
    """Ended after each second, and cut within a line: nothing is compiled twice, and what was compiled is a fair sample."""
    shapes, report = tmp_path / "shapes.json", tmp_path / "rows.jsonl"
    shapes.write_text(json.dumps([{"op": "attention", "dtype": "bfloat16", "shape": {"P": 32, "B": 1, "H": 1, "T": 64}}]))
    options = ("--all", "--target", "sm_90", "gfx942", "--shapes", str(shapes), "--json", str(report), "--jobs", "1")
    for seconds in (6, 3):
        result = child("-m", "triton_moe", "compile", *options, "--budget", f"{seconds}s", "--resume", timeout=300)
        assert result.returncode == 0, result.stderr
        names = [name for name, _ in compiler._reported(report)]
        summary = re.findall(r"^(\w+): (\d+) kernels compiled of (\d+)", result.stdout, re.MULTILINE)
        assert sum(int(n) for _, n, _ in summary) == len(names) > 0
        report.write_bytes(report.read_bytes()[:-9])
    assert names == sorted(set(names))
    assert all(int(whole) > 60 for _, _, whole in summary)
    command = child("-m", "triton_moe", "compile", "--resume", timeout=100)
    assert command.returncode == 2 and "--json" in command.stderr


def odd(what):
    if what == "die":
        os._exit(3)
    if what == "sleep":
        time.sleep(60)
    return os.getpid(), math.sqrt(what)


COUNTED = """
import sys
from triton import knobs
compiled = []
knobs.compilation.listener = lambda src, metadata, metadata_group, times, cache_hit: compiled.append((src.name, cache_hit))
import torch
from triton_moe import workloads
workloads.WORKLOADS["position"](workloads.Inputs("cuda", torch.bfloat16), P=64, D=128)
torch.cuda.synchronize()
print(len(compiled), [name for name, cache_hit in compiled if not cache_hit])
"""


@pytest.mark.gpu
def test_after_compile_cache_the_first_call_compiles_nothing(tmp_path, monkeypatch):
    shapes, cache = tmp_path / "shapes.json", tmp_path / "cache"
    shapes.write_text(json.dumps([{"op": "position", "dtype": "bfloat16", "shape": {"P": 64, "D": 128}}]))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "empty"))
    cold = child("-c", COUNTED, timeout=300)
    assert "_rope_rotate_kernel" in cold.stdout, cold.stderr
    assert child("-m", "triton_moe", "compile", "--cache", str(cache), "--shapes", str(shapes), timeout=300).returncode == 0
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    warm = child("-c", COUNTED, timeout=300)
    count, rest = warm.stdout.strip().split(" ", 1)
    assert (int(count) >= 4, rest) == (True, "[]"), warm.stderr


@pytest.mark.parametrize("life", [200, 1])
def test_a_job_may_end_its_process_and_the_others_go_on(monkeypatch, life):
    monkeypatch.setattr(compiler, "LIFE", life)
    jobs = [("die",), (-1,), (4,), (9,), ("sleep",), (16,)]
    results = dict(compiler.each(odd, jobs, 1, 8.0))
    assert list(results) == jobs
    assert (
        "died (exit 3)" in results["die",]
        and results["sleep",] == "no result after 8 s"
        and results[-1,].startswith("ValueError")
    )
    assert [root for _, root in (results[4,], results[9,], results[16,])] == [2.0, 3.0, 4.0]
    assert (results[4,][0] == results[9,][0]) == (life > 1) and results[9,][0] != results[16,][0]
    many = list(compiler.each(odd, [(n,) for n in range(20)], 3, 60.0))
    assert sorted(job for job, _ in many) == [(n,) for n in range(20)] and all(root == math.sqrt(n) for (n,), (_, root) in many)


def test_compiling_in_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(common, "INTERPRET", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compiler.compile_all("sm_90", ["float16"], ["gating"])
