import math

import pytest
import torch
from cases import randn

from triton_moe import functional as F
from triton_moe import nn


def names(module):
    return {name: tuple(p.shape) for name, p in module.state_dict().items()}


def test_state_dicts_are_those_of_the_public_modules():
    common = {
        "q.weight": (16, 24),
        "k.weight": (16, 24),
        "v": (10, 24, 8),
        "o": (10, 8, 24),
        "sel_v": (10, 24),
        "sel_o": (10, 24),
    }
    assert names(nn.SwitchHead(24, 2, 5, d_head=8)) == common
    assert names(nn.SwitchHead(24, 2, 5, d_head=8, position="xl")) == common | {"pos_to_pk": (16, 24)}
    shared = {k: v for k, v in common.items() if k != "sel_v"}
    assert names(nn.SwitchHead(24, 2, 5, d_head=8, shared_selection=True)) == shared
    assert names(nn.SwitchHead(24, 2, 1, d_head=8)) == {
        "q.weight": (16, 24), "k.weight": (16, 24), "v": (16, 24), "o": (24, 16), "sel_o": (2, 24),
    }  # fmt: skip
    moe = {"keys": (5, 24, 8), "values": (5, 8, 24), "expert_sel": (5, 24)}
    assert names(nn.SigmaMoE(24, 5, 8, 2)) == moe
    assert names(nn.SigmaMoE(24, 5, 8, 2, bias=True, d_out=7, activation="swiglu")) == {
        "keys": (5, 24, 16), "values": (5, 8, 7), "expert_sel": (5, 24), "bias": (5, 16), "o_bias": (7,),
    }  # fmt: skip
    block = names(nn.SwitchAll(24, 2, 5, 6, 8, d_head=8))
    assert set(block) == {f"attention.{n}" for n in common} | {f"moe.{n}" for n in moe} | {
        f"norm{i}.{n}" for i in (1, 2) for n in ("weight", "bias")
    }


def test_initialisation():
    torch.manual_seed(0)
    c = math.sqrt(2 / 16)
    head = nn.SwitchHead(256, 4, 5, d_head=64, position="xl", init_scale=c)
    for p, std in [
        (head.q.weight, c / 16), (head.k.weight, c / 16), (head.v, c / 16), (head.pos_to_pk, c / 16), (head.o, c / 16),
        (head.sel_v, c / 16), (head.sel_o, c / 16),
    ]:  # fmt: skip
        assert abs(p.std().item() / std - 1) < 0.06
    for sel in (head.sel_v, head.sel_o):
        rows = sel.norm(dim=1)
        torch.testing.assert_close(rows, rows[0].expand_as(rows))
    moe = nn.SigmaMoE(256, 8, 64, 2, bias=True)
    assert abs(moe.keys.std().item() * 16 - 1) < 0.05
    assert abs(moe.values.std().item() * math.sqrt(8 * 64) - 1) < 0.05
    assert not moe.bias.any() and not moe.o_bias.any()
    before = moe.keys.clone()
    moe.reset_parameters()
    assert not torch.equal(before, moe.keys)


@pytest.mark.parametrize("n_experts", [1, 2])
def test_a_model_width_of_one_initialises_to_finite_values(n_experts):
    for seed in range(20):
        torch.manual_seed(seed)
        assert all(p.isfinite().all() for p in nn.SigmaMoE(1, n_experts, 4, 1).parameters())


@pytest.mark.parametrize("position", ["rope", "xl", None])
@pytest.mark.parametrize("n_experts", [1, 3])
def test_module_is_one_functional_call(position, n_experts, device):
    head = nn.SwitchHead(12, 2, n_experts, d_head=8, position=position, device=device).eval()
    x = randn(2, 5, 12, device=device)
    memory = torch.cat([randn(2, 3, 12, device=device), x], 1)
    expected = F.switchhead(x, head.weights, top_k=head.top_k, position=head.position_encoding, k_src=memory)
    assert torch.equal(head(x, memory), expected)


def test_block_uses_its_keywords_and_trains(device):
    options = {"d_head": 8, "moe_top_k": 2, "dropout": 0.1, "moe_dropout": 0.1, "expert_dropout": 0.1, "attention_dropout": 0.1}
    block = nn.SwitchAll(12, 2, 3, 4, 8, activation="geglu", bias=True, moe_expert_dropout=0.1, device=device, **options)
    x = randn(2, 5, 12, device=device)
    y, logits = block(x, seed=3)
    assert y.shape == x.shape and logits.shape == (2, 5, 4)
    assert torch.equal(y, block(x, seed=3)[0]) and not torch.equal(y, block(x, seed=4)[0])
    (y.sum() + F.entropy_regularizer(logits)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    block.eval()
    assert torch.equal(block(x)[0], block(x)[0])


def test_state_dict_round_trip(device):
    first, second = (nn.SwitchAll(12, 2, 3, 4, 8, d_head=8, device=device) for _ in range(2))
    second.load_state_dict(first.state_dict())
    x = randn(1, 5, 12, device=device)
    assert torch.equal(first(x)[0], second(x)[0])


def test_repr_names_the_sizes():
    text = repr(nn.SwitchAll(12, 2, 3, 4, 8, d_head=8))
    assert "n_heads=2" in text and "expert_size=8" in text and "d_head=8" in text


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: nn.SwitchHead(12, 0, 3), ValueError, "n_heads must be >= 1, got 0"),
        (lambda: nn.SwitchHead(12, 2, 3, d_head=300), ValueError, "d_head must be between 1 and 256, got 300"),
        (lambda: nn.SwitchHead(12, 2, 3, top_k=4), ValueError, "top_k must be between 1 and 3"),
        (lambda: nn.SwitchHead(12, 2, 3, position="alibi"), ValueError, "position must be 'rope', 'xl' or None, got 'alibi'"),
        (lambda: nn.SigmaMoE(12, 4, 8, 5), ValueError, "top_k must be between 1 and 4"),
        (lambda: nn.SigmaMoE(12, 4, 8, 2, activation="tanh"), ValueError, "activation must be one of"),
        (lambda: nn.SigmaMoE(12, 4.0, 8, 2), TypeError, "n_experts must be an int, got float"),
    ],
)
def test_bad_construction(build, error, message):
    with pytest.raises(error, match=message):
        build()
