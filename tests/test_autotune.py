"""The tuner without a GPU: a measurer that makes its times up, so that interrupted and whole runs must agree."""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch

from triton_moe import autotune, tuning, workloads
from triton_moe.compiler import SUMS, Compiled, candidates, steps
from triton_moe.kernels import mlp, sets
from triton_moe.measure import Failed, Measurer, gain, truth

HERE = tuning.Device("Test GPU", "sm_90", 232448)
WIDE = {"BLOCK_M": [64, 128], "BLOCK_N": [64, 128, 256], "BLOCK_K": [32, 64, 128], "num_warps": [4, 8], "num_stages": [2, 3, 4]}
DEFAULTS = {
    "gather": {"BLOCK_M": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
    "pack": {"BLOCK_M": 16, "num_warps": 4},
    "up": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
}


def problems(*_) -> list[autotune.Problem]:
    found = []
    for name, n in (("gather", 4096), ("pack", 4096), ("up", 8192), ("up", 1 << 20)):
        module = mlp if name == "up" else sets
        kernel, key = getattr(module, f"_{name}_kernel"), tuning.Key(name, "half", (("K", 1024), ("N", 128), ("P", 128)), (n,))
        space, file = module.SPACE[name], module.__name__.rpartition(".")[2]
        configs = candidates(space, key, DEFAULTS[name])
        op = "mlp" if name == "up" else "projection"
        found.append(autotune.Problem(op, "bfloat16", {"N": n}, file, key, tuning.source_hash(kernel), space, configs))
    return found


def number(*what) -> int:
    return zlib.crc32(repr(what).encode())


def compile_all(found, device, journal, clock, jobs, measured):
    for p in found:
        for i, config in enumerate(p.configs):
            if i not in p.costs and i not in p.failed:
                worth = None if i % 11 == 5 else 1.0 + number("cost", config) % 1000 / 1000
                error = None if worth else "too large"
                journal.add("compile", device.arch, p, config, cost=worth, error=error)
                autotune._take_compiled(p, i, error, worth)


class Made:
    """Times are a function of the configuration, with a little noise that is one too. Some configurations are wrong, some kill
    the process, and `patience` calls later somebody presses Ctrl-C."""

    def __init__(self, patience=10**9):
        self.deaths, self.patience, self.asked, self.ready = 0, patience, [], set()

    def open(self, *workload):
        self.ready.clear()

    def start(self):
        pass

    def close(self):
        pass

    def check(self, key, config):
        verdict = 0 if config == DEFAULTS[key.kernel] else number("check", key, config) % 17
        if verdict == 1:
            raise Failed("wrong values")
        if verdict == 2:
            self.deaths += 1
            self.ready.clear()
            raise Failed("the process died")
        self.ready.add((key, *config.items()))

    def time(self, key, configs, rounds):
        self.patience -= 1
        if self.patience < 0:
            raise KeyboardInterrupt
        assert all((key, *config.items()) in self.ready for config in configs)
        self.asked += [(key, tuple(config.items()), rounds) for config in configs[1:]]
        return [[self.ns(key, config) + number(config, r) % 200 for r in range(rounds)] for config in configs]

    def ns(self, key, config):
        return 50_000 + sum(number(key.kernel, *pair) % 20_000 for pair in config.items())

    def forget(self, key, configs):
        pass


@pytest.fixture(autouse=True)
def setting(monkeypatch):
    monkeypatch.setattr(autotune, "problems", problems)
    monkeypatch.setattr(autotune, "GROUP", 4)


def tune(folder, measurer, resume=False) -> int:
    args = argparse.Namespace(budget=1e6, jobs=1, resume=resume, report=folder.parent / "report.json")
    return autotune.tune([], HERE, folder, args, measurer, compile_all)


def results(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.glob("*.json")}


def journal(folder) -> Path:
    return folder / "journal.Test_GPU.jsonl"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Made]:
    """The folder and the measurements of a run that nobody interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autotune, "problems", problems)
        patch.setattr(autotune, "GROUP", 4)
        folder, made = tmp_path_factory.mktemp("whole") / "configs", Made()
        assert tune(folder, made) == 0
    return folder, made


def test_the_best_right_configuration_is_adopted(whole, capsys):
    folder, made = whole
    entries = [e for name in ("sets", "mlp") for e in tuning.read(folder / f"{name}.Test_GPU.json").entries]
    assert len(entries) == len(problems())
    for p, e in itertools.product(problems(), entries):
        if p.key == e.key:
            right = [
                c
                for i, c in enumerate(p.configs)
                if c == p.configs[0] or (i % 11 != 5 and number("check", p.key, c) % 17 not in (1, 2))
            ]
            best = min(right, key=lambda c: made.ns(p.key, c))
            assert made.ns(p.key, e.config) <= made.ns(p.key, best) * 1.01
            assert e.default_ns - e.ns > e.noise_ns or e.config == p.configs[0]
    report = json.loads((folder.parent / "report.json").read_text())
    assert [row["measured"] > 0 for row in report] == [True] * 4 and all(
        "wrong values" in str(row["failed"]) for row in report[2:]
    )


def test_a_run_ends_with_a_table(whole, capsys):
    assert tune(whole[0], Made(), resume=True) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if re.match(r"kernel +default us +tuned us +gain +noise +tried", line))
    assert [line.split()[0] for line in lines[at + 1 : at + 5]] == ["gather", "pack", "up", "up"]
    assert all(line.count("%") == 2 and "warps=" in line and "N=" in line for line in lines[at + 1 : at + 5])
    means = [line for line in lines if "times as fast in the geometric mean" in line]
    assert [line.split(":")[0] for line in means] == ["gather", "pack", "up"]


def test_nothing_is_measured_twice(whole):
    folder, made = whole
    groups = [(key, config) for key, config, rounds in made.asked if rounds == autotune.ROUNDS]
    assert len(groups) == len(set(groups)) > 80
    again = Made()
    before = results(folder)
    assert tune(folder, again, resume=True) == 0
    assert again.asked == [] and results(folder) == before


@pytest.mark.parametrize("patience", [0, 1, 5, 15, 20])
def test_interrupted_and_resumed_is_as_if_it_had_not_been(whole, tmp_path, patience):
    folder, uninterrupted = tmp_path / "configs", whole[1]
    first, second = Made(patience), Made()
    assert tune(folder, first) == 130
    measured = [row for row in map(json.loads, journal(folder).read_text().splitlines()) if row["kind"] == "time"]
    assert len([row for row in measured if row["error"] is None]) == len([a for a in first.asked if a[2] == autotune.ROUNDS])
    assert tune(folder, second, resume=True) == 0
    assert sorted(first.asked + second.asked) == sorted(uninterrupted.asked)
    assert results(folder) == results(whole[0])


def test_killed_anywhere_and_resumed_is_as_if_it_had_not_been(whole, tmp_path):
    """A journal that ends in the middle of a line, or of its bytes, costs that line."""
    data, rng = journal(whole[0]).read_bytes(), random.Random(0)
    for trial in range(25):
        folder = tmp_path / str(trial) / "configs"
        folder.mkdir(parents=True)
        journal(folder).write_bytes(data[: rng.randrange(len(data))])
        assert tune(folder, made := Made(), resume=True) == 0
        best = {e.key: e.config for p in folder.glob("*.json") for e in tuning.read(p).entries}
        for path in whole[0].glob("*.json"):
            for e in tuning.read(path).entries:
                assert made.ns(e.key, best[e.key]) <= made.ns(e.key, e.config) * 1.01


def test_a_journal_full_of_nonsense_is_data_about_candidates_only(whole, tmp_path):
    folder, rng = tmp_path / "configs", random.Random(1)
    folder.mkdir()
    data = bytearray(journal(whole[0]).read_bytes())
    for _ in range(2000):
        data[rng.randrange(len(data))] = rng.randrange(256)
    row = json.loads(journal(whole[0]).read_text().splitlines()[-1])
    hostile = [
        {"config": {"ir_override": "/tmp/x"}},
        {"ns": -1},
        {"ns": "1"},
        {"ns": 1e999},
        {"key": None},
        {"kind": []},
        {"source": {}},
        {"default_ns": 0},
        {"noise_ns": [1]},
    ]
    lines = [json.dumps(row | change).encode() for change in hostile]
    journal(folder).write_bytes(bytes(data) + b"\n" + b"\n".join([*lines, b"null", b"[" * 9999]))
    assert tune(folder, Made(), resume=True) == 0
    entries = [e for path in folder.glob("*.json") for e in tuning.read(path).entries]
    allowed = {p.key: p.configs for p in problems()}
    assert len(entries) == 4 and all(e.config in allowed[e.key] for e in entries)


def test_without_resume_the_old_journal_is_kept_beside_the_new(whole, tmp_path):
    folder = tmp_path / "configs"
    assert tune(folder, Made(3)) == 130
    old = journal(folder).read_bytes()
    assert tune(folder, Made(1)) == 130
    assert (folder / "journal.Test_GPU.jsonl.old").read_bytes() == old != journal(folder).read_bytes()


def test_more_budget_goes_on_where_the_last_one_ended(whole, tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    monkeypatch.setattr(autotune, "next_group", lambda p, n, f=autotune.next_group: f(p, n) if len(p.ratios) < 8 else [])
    assert tune(folder, first := Made()) == 0
    monkeypatch.undo()
    monkeypatch.setattr(autotune, "problems", problems)
    assert tune(folder, second := Made(), resume=True) == 0
    assert not {a for a in first.asked if a[2] == autotune.ROUNDS} & set(second.asked)
    best = {e.key: e.config for path in folder.glob("*.json") for e in tuning.read(path).entries}
    assert best == {e.key: e.config for path in whole[0].glob("*.json") for e in tuning.read(path).entries}


def test_noise_is_not_a_gain():
    rng = random.Random(2)
    default = [100_000 + round(rng.gauss(0, 2000)) for _ in range(31)]
    same = [100_000 + round(rng.gauss(0, 2000)) for _ in range(31)]
    faster = [95_000 + round(rng.gauss(0, 2000)) for _ in range(31)]
    saved, noise = gain(default, same)
    assert saved <= max(noise, 1000)
    saved, noise = gain(default, faster)
    assert 3000 < saved < 7000 and saved > noise


def test_candidates_start_with_the_default_and_fit_the_widths():
    key = tuning.Key("up", "half", (("K", 64), ("N", 100)), (4096,))
    configs = candidates(WIDE, key, DEFAULTS["up"])
    assert configs[0] == DEFAULTS["up"] and len(configs) == len({tuple(c.items()) for c in configs})
    assert max(c["BLOCK_N"] for c in configs) == 128 and max(c["BLOCK_K"] for c in configs) == 64
    apart = [steps(c, configs[0], WIDE) for c in configs]
    assert apart == sorted(apart) and apart[1] == 1


def test_candidates_can_hold_their_sums():
    key = tuning.Key("up", "half", (("K", 1024), ("N", 1024)), (4096,))
    tiles = {(c["BLOCK_M"], c["BLOCK_N"], c["num_warps"]) for c in candidates(WIDE, key, DEFAULTS["up"])}
    assert (128, 256, 8) in tiles and (128, 128, 4) in tiles and (128, 256, 4) not in tiles
    small = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}
    found = candidates(WIDE, key._replace(dtype="float32"), small)
    tiles = {(c["BLOCK_M"], c["BLOCK_N"], c["BLOCK_K"], c["num_warps"]) for c in found[1:]}
    assert found[0] == small and tiles == {(64, 64, 32, 8), (64, 64, 64, 8)}
    for file in tuning.OPS:  # what they sum up is declared, and made of blocks and widths that exist
        for name, space in tuning.space(file).items():
            assert name == "pack" or any(side in space for side in SUMS[name])


def row(registers=128, spill=0, shared=65536, **config):
    config = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8} | config
    return Compiled("mlp", "_up_kernel", "sm_90", "bfloat16", "", config, 1.0, registers, spill, shared)


def test_the_rank_of_what_the_compiler_says():
    plain = autotune.cost(row(), 232448)
    assert autotune.cost(row(spill=256), 232448) > 2 * plain
    assert autotune.cost(dataclasses.replace(row(), warning=True), 232448) > plain
    assert autotune.cost(row(registers=255, shared=200_000), 232448) > plain
    assert autotune.cost(row(BLOCK_M=32, BLOCK_N=32), 232448) > plain


def test_search_comes_close_to_the_best_of_synthetic_sweeps():
    """Times with an effect of each value, interactions of pairs, and a compiler's rank that knows half of it."""
    regrets, blind = [], []
    for seed in range(60):
        p = problems()[2]
        p.configs = candidates(WIDE, p.key, DEFAULTS["up"])

        def effect(*what, seed=seed):
            return number(seed, *what) % 1000 / 1000

        def ns(c, effect=effect):
            pairs = itertools.combinations(c.items(), 2)
            return 1 + sum(effect(*item) for item in c.items()) + 0.3 * sum(effect(*a, *b) for a, b in pairs)

        times = [ns(c) for c in p.configs]
        p.costs = {i: t * (0.7 + 0.6 * effect("rank", i)) for i, t in enumerate(times)}
        while len(p.ratios) < 24:
            for i in autotune.next_group(p, autotune.GROUP):
                p.ratios[i] = times[i] / times[0]
        regrets.append(min([1.0, *p.ratios.values()]) * times[0] / min(times) - 1)
        chosen = random.Random(seed).sample(times[1:], len(p.ratios))
        blind.append(min(times[0], *chosen) / min(times) - 1)
    assert statistics.median(regrets) < 0.01 and statistics.mean(regrets) < 0.02 < statistics.mean(blind)


# Every configuration of two kernels, as an NVIDIA H200 ran them (Triton 3.6.0): its values, registers, bytes that spill, bytes
# of shared memory, and its time relative to the default's beside it.
SWEEPS = json.loads((Path(__file__).parent / "sweeps.json").read_text())


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep["kernel"])
def test_search_finds_the_best_of_recorded_sweeps(sweep):
    default, names = sweep["default"], list(sweep["default"])
    times = {tuple(default.values()): 1.0} | {tuple(values): ratio for values, *_, ratio in sweep["rows"]}
    space = {name: sorted({values[i] for values in times}) for i, name in enumerate(names)}
    key = tuning.Key(sweep["kernel"], "half", tuple(sweep["widths"].items()), tuple(sweep["sizes"]))
    configs = [c for c in candidates(space, key, default) if tuple(c.values()) in times]
    best = min(times.values())
    assert len(configs) > 30 and best == min(times[tuple(c.values())] for c in configs)  # what is left out is not the best
    facts = {tuple(values): (registers, spill, shared) for values, registers, spill, shared, _ in sweep["rows"]}
    facts[tuple(default.values())] = tuple(sweep["default_facts"])
    p = autotune.Problem("", "bfloat16", {}, "", key, "", space, configs)
    for i, c in enumerate(configs):
        p.costs[i] = autotune.cost(Compiled("", "", "sm_90", "bfloat16", "", c, 0.0, *facts[tuple(c.values())]), HERE.shared)
    assert best < 0.93  # there is something to find
    rank = sorted(range(1, len(configs)), key=lambda i: p.costs[i])
    assert min(times[tuple(configs[i].values())] for i in rank[: len(rank) // 3]) == best  # survives a cut to a third
    while len(p.ratios) < 12:
        for i in autotune.next_group(p, autotune.GROUP):
            p.ratios[i] = times[tuple(configs[i].values())]
    assert min(p.ratios.values()) == best
    left = [times[tuple(c.values())] for c in configs]
    blind = [min(1.0, *random.Random(seed).sample(left, 12)) / best - 1 for seed in range(100)]
    assert statistics.mean(blind) > 0.04


# ---- the process that measures


def answer(pipe):
    """In place of `measure.serve`: does as its requests say."""
    while (request := pipe.recv()) is not None:
        what = request[1] if request[0] == "check" else "answer"
        if what == "die":
            os._exit(7)
        if what == "hang":
            time.sleep(60)
        pipe.send(("broken" if what == "break" else "failed" if what == "fail" else "ok", f"{request[0]} {what}"))


def test_the_measuring_process_may_die_hang_or_lose_its_gpu():
    measurer = Measurer(60, answer)
    try:
        measurer.open("mlp")
        for what, message, deaths in (("fail", "check fail", 0), ("die", "exit 7", 1), ("break", "check break", 2)):
            with pytest.raises(Failed, match=message):
                measurer.check(what, None)
            assert measurer.deaths == deaths
        assert measurer.time("x", [], 1) == "time answer"  # it was started and opened again
        measurer.seconds = 0.5
        with pytest.raises(Failed, match="no answer after 0.5 s"):
            measurer.check("hang", None)
    finally:
        measurer.close()


@pytest.mark.gpu
def test_a_bench_measures_what_is_right(tmp_path):
    shape = {"sides": 1, "H": 2, "E": 4, "TOP_K": 2, "D": 128, "N": 4096}
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps([{"op": "gating", "dtype": "bfloat16", "shape": shape}]))
    result = cli("autotune", "--shapes", str(path), "--budget", "60s", "--jobs", "4", TRITON_MOE_CONFIG_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    (written,) = tmp_path.glob("gating.*.json")
    assert len(tuning.read(written).entries) == 1 and "gating_fwd: 1." in result.stdout
    rows = [json.loads(line) for line in next(tmp_path.glob("journal.*.jsonl")).read_text().splitlines()]
    assert sum(row["kind"] == "time" and row["error"] is None for row in rows) >= 4


# ---- what is right

WORKLOADS = [
    ("gating", {"sides": 2, "H": 2, "E": 5, "TOP_K": 2, "D": 24, "N": 33}),
    ("projection", {"H": 2, "E": 3, "TOP_K": 2, "P": 16, "D": 24, "N": 40, "width": 12}),
    ("projection", {"H": 1, "E": 5, "TOP_K": 1, "P": 16, "D": 24, "N": 21}),
    ("mlp", {"E": 3, "G": 16, "TOP_K": 2, "D": 24, "N": 40}),
    ("mlp", {"E": 3, "G": 16, "TOP_K": 2, "D": 24, "N": 40, "activation": "geglu", "bias": True}),
    ("attention", {"P": 16, "B": 2, "T": 32, "H": 4, "Hkv": 2, "padding": True, "window": 9}),
    ("attention", {"P": 16, "T": 64, "packed": True, "causal": False}),
    ("attention", {"P": 16, "B": 2, "T": 32, "H": 4, "Hkv": 2, "xl": 24}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "shape"), WORKLOADS, ids=str)
def test_workloads_agree_with_the_reference(op, shape, dtype, device):
    assert workloads.has_twin(op, shape)
    run = workloads.WORKLOADS[op]
    default, exact = (run(workloads.Inputs(device, d, dtype), **shape) for d in (dtype, torch.float64))
    right = truth(exact, default, dtype)
    assert {name for name, result in default.items() if result.numel()} <= set(right)
    for name in [name for name in right if right[name].numel()]:
        missing = default[name].clone()
        missing[(0,) * missing.ndim] = torch.nan
        for wrong in (default[name] * 1.1, missing):
            with pytest.raises(AssertionError, match=f"^{name} of the default"):
                truth(exact, default | {name: wrong}, dtype)


# ---- real lookups

KEYS = """
import itertools, json
from triton_moe import autotune, compiler, workloads

shapes = [row for rows in workloads.PRESETS.values() for row in rows]
shapes += [(op, d, shape) for op in compiler.CASES for shape in compiler.CASES[op] for d in ("float16", "float32")]
experts = {"E": 32, "TOP_K": 4, "D": 1024}
shapes += [("mlp", "bfloat16", experts | {"G": g, "activation": a}) for g, a in ((256, "relu"), (128, "swiglu"))]
shapes += [("attention", "bfloat16", {"P": 128, "B": 1, "T": 1024, m: True}) for m in ("packed", "padding")]
for target in ("sm_80", "sm_90", "gfx942"):
    defaults, asked = {}, 0

    def note(kernel, key, default):
        global asked
        asked += 1
        assert defaults.setdefault(key, default) == default, (target, key, default, defaults[key])
        return default

    for op, dtype, shape in shapes:
        compiler._on_meta(target, dtype, op, shape, note, None)
    print(target, asked, len(defaults))
for preset in workloads.PRESETS.values():
    found = autotune.problems(preset, "sm_90")
    assert len(found) == len({p.key for p in found}) > 10
    assert {p.op for p in found} == {"gating", "projection", "mlp", "attention"}
    for p in found:
        assert all(c[name] in values for c in p.configs[1:] for name, values in p.space.items()), p.key
        assert len(p.configs) > 5 and p.configs[0] not in p.configs[1:]
"""


def test_equal_keys_have_equal_defaults():
    """An entry that serves a lookup was tuned for a program whose default is the same."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", KEYS], capture_output=True, text=True, timeout=300, env=env)
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["sm_80", "sm_90", "gfx942"]


# ---- the command


def cli(*args: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "triton_moe", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=Path(__file__).parents[1])


def start(*args: str, **environment: str) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell starts what it runs beside itself deaf
    command, root = [sys.executable, "-m", "triton_moe", *args], Path(__file__).parents[1]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, cwd=root, preexec_fn=heard, **pipes)


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    result = cli("autotune", "gating", TRITON_MOE_CONFIG_DIR=str(tmp_path))
    assert result.returncode == 2 and "--dry-run" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("{}", "a list"),
        ('[{"op": "mlp"}]', "shape 0"),
        ('[{"op": "os", "dtype": "bfloat16", "shape": {}}]', "'os'"),
        ('[{"op": "position", "dtype": "bfloat16", "shape": {"P": 64, "D": "512"}}]', "D must be int"),
        ('[{"op": "position", "dtype": "bfloat16", "shape": {"P": 64}}]', "needs D"),
        ('[{"op": "position", "dtype": "int8", "shape": {"P": 64, "D": 512}}]', "int8"),
        ('[{"op": "position", "dtype": "bfloat16", "shape": {"P": 64, "D": 512, "X": 1}}]', "'X'"),
    ],
)
def test_a_file_of_shapes_that_is_none(tmp_path, text, message):
    from triton_moe import workloads

    path = tmp_path / "shapes.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="shapes.json: ") as error:
        workloads.read_shapes(path, ["position", "mlp"])
    assert message in str(error.value)


def test_a_dry_run_compiles_ranks_and_resumes(tmp_path):
    path = tmp_path / "shapes.json"
    shape = {"H": 2, "E": 4, "TOP_K": 2, "P": 64, "D": 64, "N": 4096}
    path.write_text(json.dumps([{"op": "projection", "dtype": "bfloat16", "shape": shape}]))
    command = ("autotune", "--dry-run", "--target", "sm_90", "--shapes", str(path), "--budget", "4s", "--jobs", "1")
    first = cli(*command, TRITON_MOE_CONFIG_DIR=str(tmp_path))
    assert first.returncode == 0 and "gather" in first.stdout and "compiled and fit" in first.stdout, first.stderr
    path, lines = tmp_path / "journal.sm_90.jsonl", [0]
    for sent, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):  # both once it has written more lines
        lines.append(path.read_bytes().count(b"\n"))
        process = start(*command, "--resume", "--budget", "200s", TRITON_MOE_CONFIG_DIR=str(tmp_path))
        while path.read_bytes().count(b"\n") < lines[-1] + 2 and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(sent)
        _, error = process.communicate(timeout=100)
        assert (process.returncode, "Traceback" in error) == (code, False)
    assert lines == sorted(lines)
    second = cli(*command, "--resume", TRITON_MOE_CONFIG_DIR=str(tmp_path))
    assert second.returncode == 0, second.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    done = [json.dumps([row["key"], row["config"]]) for row in rows]
    assert len(done) == len(set(done)) > 0 and {row["kind"] for row in rows} == {"compile"}
    assert not list(tmp_path.glob("*.*.json"))  # nothing was measured, so there is nothing to adopt


KINDS = """
from pathlib import Path
from triton_moe import compiler, doctor, tuning, workloads
import argparse, sys

here, sister = tuning.Device("Test GPU", "sm_89", 101376), tuning.Device("Test GPU Ti", "sm_89", 101376)
shape = {"E": 32, "G": 128, "TOP_K": 4, "D": 1024, "N": 32768}
workloads.PRESETS["paper"] = [("mlp", "bfloat16", shape)]
found = [(k, key, d) for k, key, d in compiler.lookups("mlp", "sm_89", "bfloat16", shape) if key.kernel in tuning.space("mlp")]
for (kernel, key, default), device, source in zip(found, (here, sister, here), (None, None, "0" * 16)):
    config = {name: values[0] for name, values in tuning.space("mlp")[key.kernel].items()}
    entry = tuning.Entry(key, source or tuning.source_hash(kernel), config, "3.6.0", 1, 2, 0)
    tuning.save(Path(sys.argv[1]), "mlp", device, [entry])
tuning.reload()
for line in tuning.explain("mlp", device=here, **shape):
    print("explain", line)
compiler.this_gpu = lambda: here
doctor.run(argparse.Namespace(preset="paper"))
print(tuning.digest(here) == tuning.digest(here) != tuning.digest(sister))
"""


def test_the_doctor_and_explain_say_which_and_why(tmp_path):
    environment = {"TRITON_MOE_CONFIG_DIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", KINDS, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    why = [line.split(". ", 1)[1] for line in lines if line.startswith("explain")]
    counts = {kind: sum(line.startswith(kind) for line in why) for kind in ("exact", "borrowed", "default")}
    assert counts == {"exact": 1, "borrowed": 1, "default": len(why) - 2} and len(why) > 4
    assert sum("is stale" in line for line in why) == 1 and any("tuned on Test GPU Ti" in line for line in why)
    told = next(line for line in lines if line.endswith(" stale") or " stale," in line)
    assert {part.strip() for part in told.split(",")} > {"1 exact", "1 borrowed", "1 stale"}
    assert any(line.startswith("next       python -m triton_moe autotune --preset paper") for line in lines)
    assert any(line.startswith("digest") for line in lines) and lines[-1] == "True"


def test_the_doctor_finds_what_is_wrong(tmp_path):
    first = cli("doctor", TRITON_MOE_CONFIG_DIR=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert first.returncode == 0 and "Triton" in first.stdout and str(tmp_path) in first.stdout, first.stderr
    (tmp_path / "sets.Test_GPU.json").write_text("{")
    second = cli("doctor", TRITON_MOE_CONFIG_DIR=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert second.returncode == 1 and "INVALID" in second.stdout and "sets.Test_GPU.json" in second.stdout
