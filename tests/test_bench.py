"""The benchmark's gate and report: a wrong kernel is never timed, and nothing is dropped silently."""

import argparse
import json
import re
from dataclasses import replace

import pytest
import torch

from triton_moe import bench, functional

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="tiny shapes are what runs without a GPU")


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(argv))


def test_an_unknown_name_lists_the_names(capsys):
    assert run("--only", "moe,layer") == 2
    error = capsys.readouterr().err
    assert error == "triton_moe bench: no row is called 'layer'; there are layers, moe, switchall, ops\n"


def test_a_json_file_that_cannot_be_written_stops_it_first(tmp_path, capsys):
    assert run("--json", str(tmp_path / "missing" / "bench.json")) == 2
    assert re.fullmatch(r"triton_moe bench: cannot write the JSON file: .*\n", capsys.readouterr().err)


@interpreted
def test_right_kernels_pass_and_no_ratio_is_printed_without_a_gpu(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert run("--only", "moe,layers", "--json", str(path)) == 0
    out = capsys.readouterr().out
    assert out.count("agrees with the reference") == 2 and "ratio" not in out and "mean nothing" in out

    report = json.loads(path.read_text())
    assert report["torch"] == torch.__version__ and report["triton"] and report["device"].startswith("cpu")
    assert [row["row"].split()[0] for row in report["rows"]] == ["sigma-MoE", "SwitchHead"]
    for row in report["rows"]:
        assert 0 < row["error"] < 1e-5 and not row["failed"]
        assert row["ours_ms"] is None and row["ratio"] is None


@interpreted
@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda y: 1.0001 * y, id="value"),
        pytest.param(lambda y: 1.0001 * y - 0.0001 * y.detach(), id="gradient"),
        pytest.param(lambda y: y + (y.sum() - y.sum().detach()), id="gradient of another sequence"),
        pytest.param(lambda y: y / (y != y.max()), id="infinity"),
        pytest.param(lambda y: y[..., :-1], id="shape"),
        pytest.param(lambda y: y.missing, id="crash"),
    ],
)
def test_a_wrong_kernel_is_reported_and_not_timed(wrong, tmp_path, capsys, monkeypatch):
    right = functional.sigma_moe

    def planted(*args, **kwargs):
        y, logits = right(*args, **kwargs)
        return wrong(y), logits

    monkeypatch.setattr(functional, "sigma_moe", planted)
    monkeypatch.setattr(bench, "compare", lambda *_: pytest.fail("a row that failed its check was timed"))
    path = tmp_path / "bench.json"
    assert run("--only", "moe", "--json", str(path)) == 1
    assert "not timed: failed its check: " in capsys.readouterr().out
    (row,) = json.loads(path.read_text())["rows"]
    assert row["failed"] and row["problem"] and row["error"] is None and row["ours_ms"] is None
    assert not bench.measure(bench.moe("cpu")[0], repeats=1, timed=True)[0].ours_ms


@interpreted
@pytest.mark.parametrize("name", ["switchall", "ops"])
def test_every_other_row_passes_its_check(name):
    results = [result for row in bench.ROWS[name]("cpu") for result in bench.measure(row, 1, timed=False)]
    assert [result.problem for result in results] == [None] * len(results)
    assert all(0 < result.error < 1e-5 for result in results)


def test_a_rival_that_is_not_installed_is_named(capsys):
    def build(inputs):
        import no_such_rival  # noqa: F401

    rival = bench.Rival("public SwitchHead", build)
    (result,) = bench.compare(bench.layers("cpu")[0], {}, rival, error=1e-7, repeats=1)
    bench.show(result)
    assert "public SwitchHead: not installed (No module named 'no_such_rival')" in capsys.readouterr().out


def test_a_timed_line_says_everything(capsys):
    result = bench.Result(
        "row", bench.BOTH, "rival", error=1e-3, ours_ms=1.0, rival_ms=2.0, floor_ms=0.25, ours_mib=30.0, rival_mib=60.0
    )
    result = replace(result, target=bench.Target(0.75, 0.4), memory=bench.Target(0.4, 0.3), graph=True)
    bench.show(result)
    line = capsys.readouterr().out
    assert "ratio 0.500: must reached (must 0.75, aim 0.4)" in line
    assert "floor 0.250 ms, 25 % of it reached" in line
    assert "peak memory 30 and 60 MiB, ratio 0.50: must MISSED (must 0.4, aim 0.3)" in line
    assert "CUDA graphs" in line and "error 1.0e-03" in line


def test_floors_are_those_of_the_targets():
    forward = {
        1024: bench.projection_flops(32768, 1024, 4, 2, 100) + bench.attention_flops(32768, 1024, 4, 100),
        4096: bench.projection_flops(32768, 1024, 4, 2, 100) + bench.attention_flops(32768, 4096, 4, 100),
    }
    floors = {T: round(flops / bench.FLOPS_PER_SECOND * 1e3, 2) for T, flops in forward.items()}
    assert floors == {1024: 0.26, 4096: 0.37}


@pytest.mark.gpu
def test_rows_are_timed_on_a_gpu(tmp_path):
    path = tmp_path / "bench.json"
    assert run("--only", "ops", "--repeats", "3", "--json", str(path)) == 0
    rows = json.loads(path.read_text())["rows"]
    assert all(row["ratio"] > 0 and row["ours_ms"] > 0 and row["graph"] for row in rows)
