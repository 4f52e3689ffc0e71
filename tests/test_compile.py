"""Every kernel compiles for every target, fits its shared memory, keeps its registers and uses no float atomics."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from triton_moe import compiler
from triton_moe.kernels import common

# Kernels whose defaults may spill: (kernel, dtype, target): bytes of a thread, "half" being float16 and bfloat16. Tiles are
# chosen by dtype and widths, not by device, and the 16-bit ones are those that sm_90 runs fastest without spilling.
SPILLS: dict[tuple[str, str, str], int] = {
    # A few registers; tiles that clear them took 4 to 13 % more time on an H200.
    ("_attention_fwd_kernel", "half", "sm_90"): 24,
    ("_attention_bwd_dkdv_kernel", "half", "sm_90"): 16,
    ("_attention_bwd_dq_kernel", "half", "sm_90"): 16,
    # Without tensor cores a float32 product keeps whole rows of both factors in registers: 100 padded or 256 channels are too
    # many, with tiles of 8 rows and with 4 or 16 warps too.
    ("_attention_fwd_kernel", "float32", "sm_90"): 64,
    ("_attention_fwd_kernel", "float32", "sm_100"): 136,
    ("_attention_bwd_dkdv_kernel", "float32", "sm_100"): 24,
    ("_attention_bwd_dkdv_kernel", "float32", "gfx942"): 240,
    ("_attention_bwd_dq_kernel", "float32", "sm_80"): 192,
    ("_attention_bwd_dq_kernel", "float32", "sm_90"): 216,
    ("_attention_bwd_dq_kernel", "float32", "sm_100"): 240,
    ("_attention_bwd_dq_kernel", "float32", "gfx942"): 184,
    # A few bytes, by the assembler's own choice.
    ("_combine_kernel", "float32", "sm_90"): 8,
    ("_grouped_dw_kernel", "float32", "sm_80"): 8,
    ("_grouped_dw_kernel", "float32", "sm_90"): 8,
    ("_grouped_dw_kernel", "float32", "sm_100"): 8,
    ("_grouped_dw_kernel", "half", "sm_80"): 24,
    ("_spread_kernel", "half", "sm_80"): 16,
    # 256 columns a tile take all registers there are; 128, which spill nothing, took 3 % more time on an H200.
    ("_spread_kernel", "half", "sm_90"): 40,
    # Halves of odd places change places within the registers.
    ("_rope_rotate_kernel", "float32", "sm_100"): 40,
    # Two accumulators and the rows they are dotted with.
    ("_xl_dx_kernel", "half", "sm_80"): 128,
    ("_xl_dw_kernel", "half", "sm_100"): 8,
    ("_gather_kernel", "half", "sm_80"): 104,
    ("_gather_kernel", "half", "gfx942"): 40,
}

# kernels/sets.py: 16-bit inputs only.
HALF_ONLY = {"_set_tiles_kernel", "_gather_kernel", "_visited_kernel", "_pack_kernel", "_spread_kernel"}

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
    return json.loads(path.read_text())


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
        for file in Path(common.__file__).parent.glob("*.py")
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
    assert {key: spilled for key, spilled in most.items() if spilled > SPILLS.get(key, 0)} == {}
    assert set(SPILLS) <= set(most), "an exception nobody needs any more"


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


def test_sets_fit_gpus_with_less_shared_memory(tmp_path_factory):
    """Their tiles depend on the architecture; those of other kernels are no larger than for sm_80."""
    options = ("--target", "sm_120", "--op", "projection", "--dtype", "bfloat16")
    rows = compiled(tmp_path_factory, *options)
    assert [(row["kernel"], row["target"], row["error"]) for row in rows if row["error"]] == []
    assert [row for row in rows if row["shared_bytes"] > compiler.TARGETS[row["target"]][1]] == []


def test_a_cache_filled_ahead_of_time_is_all_that_a_second_run_needs(tmp_path):
    options = ("--target", "sm_90", "--op", "position", "--dtype", "bfloat16", "--cache", str(tmp_path / "cache"))
    assert child("-m", "triton_moe", "compile", *options, timeout=600).returncode == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert sum(path.suffix == ".cubin" for path in files) >= 4
    assert child("-m", "triton_moe", "compile", *options, timeout=600).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()} == files


def test_each_job_has_a_process_that_may_die(tmp_path):
    jobs = [(os._exit, (3,), 60), (time.sleep, (60,), 0.5), (math.sqrt, (-1,), 60), (math.sqrt, (4,), 60)]
    results = [(job, result) for f, job, seconds in jobs for job, result in compiler.each(f, [job], 1, seconds)]
    assert [job for job, _ in results] == [job for _, job, _ in jobs]
    died, late, failed, done = (result for _, result in results)
    assert "died (exit 3)" in died and "no result after 0.5 s" in late and failed.startswith("ValueError") and done == 2.0


def test_compiling_in_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(common, "INTERPRET", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compiler.compile_all("sm_90", ["float16"], ["gating"])
