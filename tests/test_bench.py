"""The benchmark's gate and report: a wrong kernel is never timed, and nothing is dropped silently."""

import argparse
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from triton_moe import bench, functional
from triton_moe.bench import attention, gating, layers, mlp, models, peers, preparation, projection, report, results, timing
from triton_moe.bench.groups import GROUPS
from triton_moe.bench.row import BOTH, FORWARD, TRAINING, Rival, Target, Task
from triton_moe.bench.shared import GROUPED, SHAPES, Shape, attention_flops, causal_pairs, layer_projection_flops

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="tiny shapes are what runs without a GPU")


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(argv))


def test_an_unknown_group_lists_the_groups(capsys):
    assert run("--only", "mlp,layer") == 2
    groups = "gating, projection, mlp, attention, layers, model"
    assert capsys.readouterr().err == f"triton_moe bench: there is no group 'layer'; the groups are {groups}\n"


def test_a_json_file_that_cannot_be_written_stops_it_first(tmp_path, capsys):
    assert run("--json", str(tmp_path / "missing" / "bench.json")) == 2
    assert re.fullmatch(r"triton_moe bench: cannot write the JSON file: .*\n", capsys.readouterr().err)


@interpreted
def test_right_kernels_pass_and_no_ratio_is_printed_without_a_gpu(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert run("--only", "mlp,layers", "--json", str(path)) == 0
    out = capsys.readouterr().out
    assert out.count("agrees with the reference") == 3 and "ratio" not in out and "mean nothing" in out

    report = json.loads(path.read_text())
    assert report["torch"] == torch.__version__ and report["triton"] and report["device"].startswith("cpu")
    assert [row["row"].split()[0] for row in report["rows"]] == ["sigma-MoE", "SwitchHead", "SwitchAll"]
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
    monkeypatch.setattr(timing, "compare", lambda *_: pytest.fail("a row that failed its check was timed"))
    path = tmp_path / "bench.json"
    assert run("--only", "mlp", "--json", str(path)) == 1
    assert "not timed: failed its check: " in capsys.readouterr().out
    (row,) = json.loads(path.read_text())["rows"]
    assert row["failed"] and row["problem"] and row["error"] is None and row["ours_ms"] is None
    assert not timing.measure(mlp.mlp_rows("cpu", False)[0], repeats=1, timed=True)[0].ours_ms


@interpreted
@pytest.mark.parametrize("group", ["gating", "projection", "mlp", "attention", "layers", "model"])
def test_every_other_row_passes_its_check(group):
    results = [result for row in GROUPS[group]("cpu", True) for result in timing.measure(row, 1, timed=False)]
    assert [result.problem for result in results] == [None] * len(results)
    assert all(0 < result.error < 1e-5 for result in results)


@interpreted
def test_a_packed_sequence_that_reaches_into_another_is_found(monkeypatch):
    right = functional.attention
    monkeypatch.setattr(functional, "attention", lambda q, k, v, scale, cu_seqlens: right(q, k, v, scale=scale))
    (result,) = timing.measure(attention.packed_row(2, 20, [5, 24], "cpu"), 1, timed=False)
    assert result.failed and "AssertionError" in result.problem


def test_a_rival_that_is_not_installed_is_named(capsys):
    def build(inputs):
        import no_such_rival  # noqa: F401

    rival = Rival("public SwitchHead", build)
    results = timing.compare(layers.layer_rows("cpu", False)[0], {}, rival, error=1e-7, repeats=1)
    report.show("row", results)
    assert "public SwitchHead: not installed (No module named 'no_such_rival')" in capsys.readouterr().out


@interpreted
def test_another_process_checks_the_rows():
    """On its own copy of the seeded inputs."""
    rows = {("gating", 0): gating.gating_rows("cpu", False)[0], ("attention", 0): attention.attention_rows("cpu", False)[0]}
    alone = {key: replace(row, rivals=()) for key, row in rows.items()}
    checked, seconds = preparation.prepare(alone, "cpu", False, processes=1)
    assert set(checked) == set(rows) and len(seconds) == 2 and all(took > 0 for took, _ in seconds)
    for key, row in rows.items():
        (here,) = timing.measure(row, 1, timed=False)
        assert checked[key].error == here.error and not checked[key].failed
        assert timing.measure(row, 1, timed=False, checked=checked[key])[0].error == here.error


def test_all_that_compiles_is_prepared():
    rows = {(name, i): row for name, rows in GROUPS.items() for i, row in enumerate(rows("cuda", False))}
    jobs = preparation.jobs_of(rows)
    for (group, i), row in rows.items():
        works = {work for (g, _, work), indices in jobs.items() if g == group and i in indices}
        ours = {preparation.OURS} if row.step or any(rival.compiled for rival in row.rivals) else set()
        assert works == {preparation.CHECK} | ours | {r.name for r in row.rivals if r.compiled or r.compiles}
    works = [work for _, _, work in jobs]
    assert works.index(preparation.CHECK) < works.index(preparation.OURS)


@interpreted
def test_a_side_is_run_in_every_direction_and_a_failing_one_is_left_to_its_row(monkeypatch):
    calls = []

    def side(x, n):
        calls.append((n, torch.is_grad_enabled()))
        return x * n

    def inputs():
        return {"x": torch.ones(2, 3, requires_grad=True)}

    rivals = [
        Rival("two", lambda p: [(1.0, Task(lambda n=n: side(p["x"], n), [p["x"]])) for n in (2, 3)], compiled=True),
        Rival("four", lambda p: Task(lambda: side(p["x"], 4) / calls.missing, [p["x"]]), compiles=True),
    ]
    row = layers.layer_rows("cpu", False)[0]
    row = replace(row, inputs=inputs, ours=lambda p: side(p["x"], 1), rivals=tuple(rivals), flops={FORWARD: 1.0, BOTH: 1.0})
    monkeypatch.setattr(preparation, "compiled", lambda function: function)
    for work in (preparation.OURS, "two", "four"):
        preparation.run_once(row, work)
    ran = [(n, grad) for n in (1, 2, 3) for grad in (False, False, True)]  # the second makes the cotangent
    assert calls == [*ran, (4, False)]


def test_a_row_that_failed_in_its_process_is_not_timed():
    row = gating.gating_rows("cpu", False)[0]
    failed = timing.failure(row, AssertionError("wrong"))
    assert timing.measure(replace(row, inputs=lambda: pytest.fail("was run")), 1, timed=True, checked=failed) == [failed]


def test_the_reason_a_rival_does_not_run_is_kept():
    problem = timing.shortened("RuntimeError: at 81:27:\n" + "    source\n" * 99 + "both operands must have the same dtype")
    assert problem.startswith("RuntimeError: at 81:27: ") and problem.endswith("both operands must have the same dtype")
    assert len(problem) < 240 and timing.shortened("no") == "no"


@pytest.mark.parametrize("full", [False, True])
def test_every_row_has_a_name_of_its_own_and_a_rival(full):
    rows = [row for group in GROUPS.values() for row in group("cuda", full)]  # none of them makes its inputs yet
    assert len({row.name for row in rows}) == len(rows) and all(row.rivals for row in rows)


def test_a_sample_is_long_enough_for_what_a_pass_takes_after_another(monkeypatch):
    samples = []

    def milliseconds(run, times):  # the host is 3 ms late
        samples.append((run, times))
        return run + 3.0 / times

    monkeypatch.setattr(timing, "milliseconds", milliseconds)
    assert timing.alternate([0.5, 40.0], 3, 20.0) == [pytest.approx(0.5 + 3.0 / 34), 43.0]
    assert samples[-6:] == [(0.5, 34), (40.0, 1)] * 3


@pytest.fixture
def clock(monkeypatch):
    """Runs everything once; then ours takes 1 ms, the rival 2 and its second part 3, and with the backward three times that."""

    def alternate(runs, repeats, least):
        times = [1.0 if isinstance(run(), torch.Tensor) else 3.0 for run in runs]
        return [(i + 1) * time for i, time in enumerate(times)]

    monkeypatch.setattr(timing, "alternate", alternate)
    monkeypatch.setattr(timing, "peak_memory", lambda run: 10.0)
    monkeypatch.setattr(timing, "host_milliseconds", lambda run, repeats: 2.5 * alternate([run], repeats, 0.0)[0])
    monkeypatch.setattr(timing, "captured", lambda run: run)


def plain_attention(p):
    return attention.rival_attention(
        p, p["q"].shape[-1], lambda *qkv: torch.nn.functional.scaled_dot_product_attention(*qkv[:3], is_causal=True)
    )


@interpreted
def test_every_direction_faces_every_rival_and_the_fastest_counts(clock):
    target = Target(1.0, 0.5)
    rivals = (
        Rival("slow", lambda p: [(2.0, plain_attention(p))], {FORWARD: Target(3.0, 2.0)}),
        Rival("fast", plain_attention, {}),
        Rival("broken", lambda p: Task(lambda: p["missing"], [])),
    )
    row = replace(attention.attention_row(2, 20, 24, "cpu", B=2), rivals=rivals, best={FORWARD: target})
    results = timing.measure(row, 1, timed=True, checked=timing.Result(row.name, error=1e-7))
    assert [(r.rival, r.work, r.ratio) for r in results[:3]] == [("slow", work, 0.25) for work in row.flops]
    assert (results[2].ours_ms, results[2].rival_ms) == (2, 8)
    assert [(r.rival, r.ratio) for r in results[3:5]] == [("fast (the fastest)", 0.5), ("fast", 0.5)]
    assert results[0].target == Target(3.0, 2.0) and results[3].target == target and results[4].target is None
    assert results[0].rival_mib == 20 and results[3].flops == row.flops[FORWARD]
    assert results[6].problem == "KeyError: 'missing'" and len(results) == 7
    report.show(row.name, results)
    json.loads(report.as_json({}, results))


@interpreted
def test_a_model_is_timed_beside_its_dense_twin_and_both_learn(clock, capsys):
    for row in models.model_rows("cpu", True)[::2]:  # SwitchAll, and SwitchHead with Transformer-XL's positions
        short = {"n_layers": 1}
        untrained = timing.mebibytes(row.rivals[0].build(short).held())
        (result,) = timing.compare(row, short, row.rivals[0], error=1e-7, repeats=1)
        assert (result.work, result.ratio, result.tokens) == (TRAINING, 0.5, 48)
        assert result.rival_mib > 10 + untrained  # AdamW's moments too
        report.show(row.name, [result])
        assert "48,000 tokens/s" in capsys.readouterr().out


def test_a_training_that_does_not_learn_is_not_reported_as_one_that_does():
    low, high = torch.tensor(1.0), torch.tensor(2.0)
    timing.check_learning([high, high], [low, low])
    for after in ([low, high], [high, low], [low, torch.tensor(float("nan"))]):
        with pytest.raises(AssertionError, match="training took the loss from 2.000 to"):
            timing.check_learning([high, high], after)


@interpreted
def test_the_host_is_timed_by_the_wall(clock, capsys):
    _, row, _ = layers.host_rows(Shape(2, 3, 2, 20, 48, 2, 24), 6, 16, 2, "cpu")
    (result,) = timing.compare(row, row.inputs(), row.rivals[0], error=1e-7, repeats=1)
    report.show(row.name, [result])
    line = capsys.readouterr().out
    assert "host time: ours 2.500 ms | dense MLP" in line and "floor" not in line and "memory" not in line


def test_a_backward_within_the_noise_has_no_time():
    one = timing.Result("row", ours_ms=1.0, rival_ms=1.0, floor_ms=0.1)
    assert timing.difference(one, one, 1.0, None).problem


@interpreted
def test_an_interpolated_rival_is_timed_as_its_parts(clock):
    shape = Shape(2, 3, 2, 20, 48, 2, 24)
    rows = {P: projection.value_row(shape._replace(P=P), "cpu", 0.0, None, ()) for P in (64, 96, 128)}
    rival = Rival("between", projection.interpolation(rows[96], 96, {P: rows[P] for P in (64, 128)}))
    (result,) = timing.measure(replace(rows[96], rivals=(rival,)), 1, timed=True, checked=timing.Result("", error=1e-7))
    assert result.rival_ms == pytest.approx(0.5 * 2 * 96 / 64 + 0.5 * 3 * 96 / 128)


def test_a_timed_line_says_everything(capsys):
    result = timing.Result(
        "row",
        BOTH,
        "rival",
        error=1e-3,
        ours_ms=1.0,
        rival_ms=2.0,
        floor_ms=0.25,
        flops=5e11,
        ours_mib=30.0,
        rival_mib=60.0,
    )
    result = replace(result, target=Target(0.75, 0.4), memory=Target(0.4, 0.3), graph=True)
    report.show("row", [result])
    line = capsys.readouterr().out
    assert line.startswith("row\n    forward+backward: ours 1.000 ms, 500 TFLOP/s | rival 2.000 ms | ")
    assert "ratio 0.500: must reached (must 0.75, aim 0.4)" in line
    assert "floor 0.250 ms, 25 % of it reached" in line
    assert "peak memory 30 and 60 MiB, ratio 0.50: must MISSED (must 0.4, aim 0.3)" in line
    assert "CUDA graphs" in line and "error 1.0e-03" in line


def test_floors_are_those_of_the_targets():
    forward = {
        1024: layer_projection_flops(32768, 1024, 4, 2, 100) + attention_flops(32768, 1024, 4, 100),
        4096: layer_projection_flops(32768, 1024, 4, 2, 100) + attention_flops(32768, 4096, 4, 100),
    }
    floors = {T: round(flops / timing.FLOPS_PER_SECOND * 1e3, 2) for T, flops in forward.items()}
    assert floors == {1024: 0.26, 4096: 0.37}


def pairs(T: int, window: int) -> int:
    return sum(0 <= i - j < window for i in range(T) for j in range(T))


def test_attention_counts_the_pairs_it_computes():
    assert causal_pairs(64) == pytest.approx(pairs(64, 64), rel=0.02)
    assert causal_pairs(256, 64) == pytest.approx(pairs(256, 64), rel=0.02)


def test_an_interpolation_is_the_time_of_as_many_flops():
    shape = SHAPES[0]
    rows = {P: projection.value_row(shape._replace(P=P), "cpu", 0.0, None, ()) for P in (64, 112, 128)}
    # At one second per FLOP the time of a row is its FLOPs, whatever the width.
    tiny = {P: replace(rows[P], inputs=dict) for P in (64, 128)}
    mix = projection.interpolation(rows[112], 112, tiny)({})
    work = sum(share * rows[P].flops[FORWARD] for (share, _), P in zip(mix, (64, 128), strict=True))
    assert len(mix) == 2 and work == pytest.approx(rows[112].flops[FORWARD])
    (whole,) = projection.interpolation(rows[64], 64, tiny)({})
    assert whole[0] == 1


# The peers that need no GPU compute what the reference computes: what is timed is the same work.


def routed_inputs(shape: Shape, name: str) -> dict:
    makers = {"value": projection.value_row, "output": projection.output_row, "both": projection.both_sides_row}
    row = makers[name](shape, "cpu", 0.0, None, ())
    torch.manual_seed(0)
    p = row.inputs()
    return row, p, row.reference(p, row.experts(p)).detach()


@interpreted
@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("value", peers.value_by_all),
        ("output", peers.output_by_all),
        ("both", peers.both_by_all),
        ("value", peers.VALUE_PEERS[GROUPED]),
        ("output", peers.OUTPUT_PEERS[GROUPED]),
        ("both", peers.both_grouped),
    ],
)
def test_peers_of_the_projections_compute_the_same(name, build, monkeypatch):
    def grouped_mm(a, b, *, offs):  # torch's own takes bfloat16 on a GPU
        starts = [0, *offs.tolist()]
        return torch.cat([a[i:j] @ w for i, j, w in zip(starts, offs.tolist(), b, strict=False)])

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", grouped_mm, raising=False)
    monkeypatch.setattr(peers, "compiled", lambda function: function)
    shape = Shape(2, 3, 2, 20, 48, 2, 24)
    _, p, truth = routed_inputs(shape, name)
    task = build(shape, p)
    result = task.call()
    torch.testing.assert_close(result.view(truth.shape), truth, rtol=1e-4, atol=1e-4)
    if task.leaves:
        assert all(g.any() for g in torch.autograd.grad(result.sum(), task.leaves))


@pytest.mark.parametrize("P", [20, 24])
def test_rivals_of_attention_compute_the_same(P):
    """Widths that are no multiple of 8 go through the padding, both ways, and more than once."""
    row = attention.attention_row(2, P, 24, "cpu", B=2)
    p = row.inputs()
    truth = row.reference(p, None).transpose(1, 2)
    d = torch.randn_like(truth)
    expected = torch.autograd.grad(truth, [p["q"], p["k"], p["v"]], d)

    def attend(q, k, v, scale):
        assert q.shape[-1] == 24
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    task = attention.rival_attention(p, P, attend)
    for _ in range(2):
        result = task.call()
        torch.testing.assert_close(result, truth)
        for actual, right in zip(torch.autograd.grad(result, task.leaves, d), expected, strict=True):
            torch.testing.assert_close(actual.transpose(1, 2), right)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # rivals warn as they like
def test_rows_are_timed_on_a_gpu(tmp_path):
    path = tmp_path / "bench.json"
    assert run("--only", "gating,attention", "--repeats", "3", "--json", str(path)) == 0
    rows = json.loads(path.read_text())["rows"]
    timed = [row for row in rows if row["problem"] is None]
    assert {row["row"] for row in timed} == {row["row"] for row in rows}  # some rival of every row is there
    assert all(row["ratio"] > 0 and row["ours_ms"] > 0 for row in timed)
    assert all(row["graph"] for row in timed if "cuBLAS" in row["rival"] or "cuDNN" in row["rival"])


# The README


ROOT = Path(__file__).parent.parent


def test_the_readme_shows_the_committed_measurements():
    measured = json.loads((ROOT / "triton_moe" / "bench" / "results.json").read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == results.with_tables(text, measured)
    assert (ROOT / "triton_moe" / "bench" / "results.svg").read_text(encoding="utf-8") == results.plot(measured)


def lines_of(T: int) -> list[timing.Result]:
    bounds = {"target": Target(0.75, 0.5), "memory": Target(0.3, 0.2), "group": "layers"}
    ours = timing.Result(f"SwitchHead H 4 E 4 TOP_K 2 P 100, T {T}", BOTH, error=1e-3, ours_ms=2.0, ours_mib=30.0)
    dense = {"rival": "dense attention 16 x 64, torch.compile", "rival_ms": 4.0, "rival_mib": 60.0}
    host = replace(ours, work="host time", rival="eager", rival_ms=1.0, ours_mib=None, milliseconds=Target(0.3, 0.1))
    return [
        replace(ours, **dense, **bounds),
        replace(ours, rival="public SwitchHead", rival_ms=20.0, rival_mib=600.0, group="layers"),
        replace(ours, rival="not installed", problem="no", ours_ms=None, group="layers"),
        replace(host, group="layers"),
        replace(ours, row="a model", rival="its twin", rival_ms=1.0, rival_mib=60.0, tokens=100, group="model"),
    ]


def test_a_json_becomes_tables_and_a_plot(tmp_path, capsys):
    about = {"device": "a GPU", "torch": "2", "triton": "3", "repeats": 5}
    rows = [result for T in (1024, 4096) for result in lines_of(T)]
    path, readme = tmp_path / "bench.json", tmp_path / "README.md"
    path.write_bytes(report.as_json(about, rows))
    readme.write_text(f"before\n{results.BEGIN}old\n{results.END}after\n")
    assert run("--render", str(path), str(readme)) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "a GPU" in text
    assert (
        "2.000 ms | dense attention 16 x 64, torch.compile: 4.000 ms | 0.500, 0.75 well reached | 30 / 60 = 0.500, 0.3 **missed**"
        in text
    )
    assert "| eager: 1.000 ms | 2.000 ms, 0.3 ms **missed** |  |" in text and "public" not in text
    assert "2.000 ms, 50,000 tokens/s | its twin: 1.000 ms | 2.000 | 30 / 60 = 0.500 |" in text
    assert "Not timed: SwitchHead H 4 E 4 TOP_K 2 P 100, T 1024, not installed: no\n" in text
    assert text.index("| model |") < text.index("| layers |")

    drawn = ElementTree.parse(path.with_suffix(".svg")).getroot()
    lines = drawn.findall("{*}polyline")
    assert len(lines) == 6 and len({line.get("points") for line in lines}) == 6
    assert [float(c.get("cx")) for c in drawn.findall("{*}circle")][:2] == [60.0, 420.0]
    time = {name: float(lines[i].get("points").split(",")[1].split()[0]) for i, name in enumerate(("ours", "dense", "public"))}
    assert time["ours"] - time["public"] == pytest.approx(120, abs=0.2)  # one decade of two
    assert time["ours"] - time["dense"] == pytest.approx(120 * math.log10(2), abs=0.2)


@pytest.mark.parametrize("content", ["{", "{}", None])
def test_what_cannot_be_rendered_changes_nothing(content, tmp_path, capsys):
    path, readme = tmp_path / "bench.json", tmp_path / "README.md"
    readme.write_text("no marks\n")
    if content is None:
        path.write_bytes(report.as_json({"device": "", "torch": "", "triton": "", "repeats": 1}, lines_of(1024)))
    else:
        path.write_text(content)
    assert run("--render", str(path), str(readme)) == 2
    assert capsys.readouterr().err.startswith(f"triton_moe bench: cannot render {path}: ")
    assert readme.read_text() == "no marks\n" and not path.with_suffix(".svg").exists()
