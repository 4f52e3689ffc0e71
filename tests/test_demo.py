"""The demo end to end on a tiny model: it trains, saves, checks itself against reference/, and stops when told to."""

import argparse
import importlib.util
import json
import math
import re
import sys
from dataclasses import asdict, replace

import pytest
import torch

from triton_moe import demo
from triton_moe.model import PUBLISHED, DenseAttention, LanguageModel

pytest.importorskip("tqdm", reason="the demo extra is not installed")
safetensors = pytest.importorskip("safetensors", reason="the demo extra is not installed")

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU demo runs in Triton's interpreter")


@pytest.fixture
def tiny(monkeypatch):
    model = demo.ModelConfig(32, 1, n_heads=2, d_head=16, n_experts=2, moe_n_experts=4, expert_size=16, top_k=1, moe_top_k=2)
    preset = replace(demo.CPU, model=model, batch=1, context=32, held_out=1, checked=(1, 24), generated=2)
    monkeypatch.setattr(demo, "CPU", preset)
    return preset


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(argv)


@interpreted
def test_trains_saves_and_agrees_with_the_reference(tiny, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    assert demo.run(parse("--steps", "3", "--seed", "1", "--save", str(path))) == 0

    out = capsys.readouterr().out
    trained = re.search(r"trained 3 of 3 steps in .* last batch (\S+) nats = (\S+) bits", out)
    nats, bits = float(trained[1]), float(trained[2])
    assert 0 < nats < 20 and math.isclose(bits, nats / math.log(2), rel_tol=1e-2)
    before, after = map(float, re.search(r"held out: (\S+) bits per byte before, (\S+) after", out).groups())
    assert 7.5 < before < 8.5 and after < before

    rows = re.findall(r"^  ([\w.]+) +(\d\S*e\S+) +(\d\S*e\S+)$", out, re.MULTILINE)
    names = {".".join(part for part in name.split(".") if not part.isdigit()) for name in parameters(tiny)}
    assert {row[0] for row in rows} == {"loss", *names}
    assert all(float(relative) < 2e-5 for _, _, relative in rows)
    assert out.count("  agrees: ") == 2 and len(re.findall(r" \| ['\"]", out)) == 4  # the samples

    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == set(parameters(tiny))
        assert json.loads(file.metadata()["config"]) == asdict(tiny.model)
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118 (not a dict)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def parameters(preset: demo.Preset) -> dict[str, torch.Tensor]:
    return demo.LanguageModel(preset.model).state_dict()


@interpreted
def test_a_wrong_gradient_is_reported(tiny, capsys, monkeypatch):
    from triton_moe import reference

    right = reference.entropy_regularizer
    monkeypatch.setattr(reference, "entropy_regularizer", lambda logits: 1.5 * right(logits))
    assert demo.run(parse("--steps", "1")) == 1
    out = capsys.readouterr().out
    assert "DIFFERS: the largest relative error" in out and "agrees: a gap" in out


@interpreted
def test_a_wrong_choice_of_experts_is_reported(tiny, capsys, monkeypatch):
    from triton_moe import functional

    right = functional._gating.cast_and_gate

    def rolled(*args):
        _, experts, logits, x = right(*args)
        experts = (experts + 1) % logits.shape[-1]
        return logits.gather(-1, experts.long()).sigmoid(), experts, logits, x

    for module in (functional._gating, functional._moe, functional._switchhead):
        monkeypatch.setattr(module, "cast_and_gate", rolled)
    assert demo.run(parse("--steps", "1")) == 1
    out = capsys.readouterr().out
    differ, total = map(int, re.search(r"expert choices: (\d+) of (\d+) tokens and heads differ", out).groups())
    assert total == 24 * (2 * tiny.model.n_heads + 1) and differ > total / 2
    assert "agrees: the largest relative error" in out and "DIFFERS: a gap" in out  # the gradients are right for that choice


def test_the_gap_of_a_choice():
    logits = torch.tensor([4.0, 3.0, 1.0, -8.0]).expand(5, 1, 4)
    experts = torch.tensor([[0, 1], [1, 0], [0, 2], [3, 2], [0, 0]])[:, None]
    differs, gaps = demo.choice_gaps(experts, logits)
    assert differs.flatten().tolist() == [False, False, True, True, True]
    assert gaps.flatten().tolist() == [0, 0, 2 / 8, 12 / 8, math.inf]


@interpreted
@pytest.mark.parametrize(("steps", "code"), [("2", 1), ("1", 0)])
def test_a_full_training_must_learn(steps, code, tiny, capsys, monkeypatch):
    monkeypatch.setattr(demo, "CPU", replace(tiny, steps=2, recipe=demo.Recipe(1e-9, 0.01, 1)))
    assert demo.run(parse("--steps", steps)) == code
    assert ("NOT LEARNED" in capsys.readouterr().out) == bool(code)


@interpreted
def test_the_twins_are_trained_alike(tiny, capsys, monkeypatch):
    monkeypatch.setattr(demo, "FOLLOWED", 1)
    demo.run(parse("--steps", "2", "--twins", "1", "--seed", "3"))
    out = capsys.readouterr().out
    assert out.count("trained 2 of 2 steps") == 2 and out.count("trained 1 of 1 steps") == 1
    assert out.count("seed 3, torch.float32") == 3
    assert "beside float32, the same 1 batches, 20 at a time:\n  losses differ by 0.00 % at most, which may be 2 %" in out


@pytest.mark.parametrize(
    ("worse", "further", "code"), [(0.9, 1.0, 0), (1.019, 1.019, 0), (1.021, 1.0, 1), (1.0, 1.021, 1), (1.0, 0.979, 1)]
)
def test_switchall_may_be_little_worse_than_its_twin_and_than_float32(worse, further, code, tiny, capsys, monkeypatch):
    """further: the losses in lower precision over those in float32, from the third window on."""

    def trained(run, config):
        low = run.dtype != torch.float32
        losses = [4.0] * 40 + [3.0 * (further if low else 1.0)] * ((run.stop or run.steps) - 40)
        return (worse if config.n_experts else 1.0) * (2.0 + 0.1 * run.seed), losses

    monkeypatch.setattr(demo, "trained", trained)
    assert demo.run(parse("--twins", "3", "--device", "cpu", "--dtype", "bfloat16", "--steps", "300")) == code
    out = capsys.readouterr().out
    assert f"SwitchAll  {2.1 * worse:.4f}, {2.0 * worse:.4f} to {2.2 * worse:.4f}" in out
    assert "dense twin 2.1000, 2.0000 to 2.2000" in out and f"SwitchAll / dense twin {worse:.4f}" in out
    assert f"the same 200 batches, 20 at a time:\n  losses differ by {100 * abs(further - 1):.2f} %" in out


@interpreted
def test_ctrl_c_keeps_what_was_to_be_saved(tiny, tmp_path, capsys, monkeypatch):
    losses, calls = demo.LanguageModel.losses, []

    def interrupted(self, tokens):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 2:
            raise KeyboardInterrupt
        return losses(self, tokens)

    monkeypatch.setattr(demo.LanguageModel, "losses", interrupted)
    path = tmp_path / "model.safetensors"
    assert demo.run(parse("--steps", "3", "--save", str(path))) == 130
    out = capsys.readouterr().out
    assert "interrupted after 1 of 3 steps" in out and f"saved {path}" in out
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == set(parameters(tiny))


@pytest.mark.parametrize("where", ["missing/model.safetensors", "."])
def test_a_place_that_cannot_be_saved_to_stops_it_before_training(where, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "standard_library", lambda: pytest.fail("it went on to load the text"))
    assert demo.run(parse("--save", str(tmp_path / where))) == 2
    assert re.fullmatch(r"triton_moe demo: cannot save: .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("extra", ["tqdm", "safetensors"])
def test_a_missing_extra_says_how_to_install_it(extra, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == extra else find(name))
    assert demo.run(parse("--save", str(tmp_path / "model.safetensors"))) == 2
    assert capsys.readouterr().err == f"triton_moe demo: needs {extra}: pip install 'triton-moe[demo]'\n"


@interpreted
def test_cuda_without_a_gpu(capsys):
    assert demo.run(parse("--device", "cuda")) == 2
    assert capsys.readouterr().err == "triton_moe demo: --device cuda, but torch sees no GPU\n"


@pytest.mark.parametrize("steps", ["0", "-1", "many"])
def test_steps_must_be_positive(steps, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("--steps", steps)
    assert "--steps" in capsys.readouterr().err


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    demo.write_atomically(path, b"first")
    with monkeypatch.context() as patch:
        patch.setattr(demo.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            demo.write_atomically(path, b"second")
    assert path.read_bytes() == b"first" and [entry.name for entry in tmp_path.iterdir()] == ["file"]
    demo.write_atomically(path, b"third")
    assert path.read_bytes() == b"third"


def test_the_text_is_the_same_every_time_and_split_by_file():
    train, held_out = demo.standard_library()
    assert demo.standard_library() == (train, held_out)
    assert len(train) > 5 * len(held_out) > 100_000
    assert held_out[:2000] not in train


@pytest.mark.parametrize("preset", [demo.CPU, demo.GPU], ids=["cpu", "gpu"])
def test_the_dense_twin_has_as_many_parameters(preset):
    with torch.device("meta"):
        ours, dense = (demo.LanguageModel(config) for config in (preset.model, preset.model.dense_twin()))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (ours, dense)]
    assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[0]
    assert preset is not demo.GPU or sizes[0] > 10_000_000


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_models_have_their_published_sizes(name):
    def size(config):
        with torch.device("meta"):
            return sum(p.numel() for p in LanguageModel(config).parameters())

    config, twin = PUBLISHED[name]
    published = replace(config, position="xl") if "SwitchAll" in name else config
    assert size(published) == pytest.approx(1e6 * int(re.search(r"(\d+)M", name)[1]), rel=0.012)
    assert size(replace(config, position="rope")) == pytest.approx(size(twin), rel=0.05)


def test_the_dense_attention_rotates_as_the_reference_does():
    from triton_moe import reference

    torch.manual_seed(0)
    layer, x = DenseAttention(24, 2, 12), torch.randn(2, 7, 24)
    q, k, v = layer.qkv(x).view(2, 7, 3, 2, 12).unbind(2)
    a = reference.attention(q, k, v, position=reference.RoPE(fraction=1.0))
    torch.testing.assert_close(layer(x), layer.out(a.flatten(2)))


def test_importing_it_imports_no_triton():
    import subprocess

    code = "import sys, triton_moe.demo, triton_moe.bench; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


# torch's own: Inductor imports torch.jit, deprecated under Python 3.12; in 2.11 Dynamo asks every input for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.gpu
def test_the_gpu_demo_learns(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the demo on the CPU sets it, as the command must
    path = tmp_path / "model.safetensors"
    assert demo.run(parse("--steps", "60", "--device", "cuda", "--save", str(path))) == 0
    out = capsys.readouterr().out
    assert float(re.search(r"before, (\S+) after", out)[1]) < 4.0
    assert "dense twin" in out and path.exists()
