import copy
import math

import pytest
import torch
from cases import randn
from torch.utils.checkpoint import checkpoint

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


# ---- as torch's own modules are used


def modules(device, dropout=0.0):
    """Each with its input and its outputs as a tuple of tensors."""
    factory = {"d_head": 8, "expert_dropout": dropout, "device": device}
    torch.manual_seed(0)
    return {
        "SwitchHead": nn.SwitchHead(12, 2, 3, dropout=dropout, **factory),
        "SwitchHead xl": nn.SwitchHead(12, 2, 3, position="xl", dropout=dropout, **factory),
        "SigmaMoE": nn.SigmaMoE(12, 4, 8, 2, dropout=dropout, expert_dropout=dropout, device=device),
        "SwitchAll": nn.SwitchAll(12, 2, 3, 4, 8, moe_top_k=2, dropout=dropout, moe_dropout=dropout, **factory),
    }


MODULES = ["SwitchHead", "SwitchHead xl", "SigmaMoE", "SwitchAll"]


def loss_of(result):
    y, *logits = result if isinstance(result, tuple) else (result,)
    return y.float().square().sum() + sum(F.entropy_regularizer(t) for t in logits)


def gradients(module, x):
    """Of the loss, for x and every parameter."""
    leaves = [x, *module.parameters()]
    return torch.autograd.grad(loss_of(module(x)), leaves)


# torch's own: Dynamo instantiates torch.autograd.Function while tracing one; Inductor imports torch.jit, deprecated under
# Python 3.12, and advises TF32 on a GPU.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("name", MODULES)
def test_compiles_once_more_for_other_lengths_and_never_again(name, device):
    """One graph for the first length, one for all others, forward and backward."""
    module, graphs = modules(device)[name], []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("inductor" if device == "cuda" else "aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for length in (5, 7, 3):
        x = randn(2, length, 12, device=device)
        for a, b in zip(gradients(compiled, x), gradients(module, x), strict=True):
            torch.testing.assert_close(a, b)
        assert len(graphs) == (1 if length == 5 else 2), f"length {length} compiled graph {len(graphs)}"


D, H, E, K, P, MOE_E, MOE_K, G = 64, 2, 4, 2, 41, 5, 3, 16
HEAD_BYTES = 2 * D + 2 * H * 48 * (4 + K) + 4 * H * (1 + 2 * 3 * K)  # x; q, k, v, a and u; log-sum-exps, gates and orders
U_BYTES = 2 * H * 48 * K
MOE_BYTES = 2 * D + 2 * MOE_K * G + 4 * 3 * MOE_K  # x; what enters the activation; gates and orders
BLOCK_BYTES = HEAD_BYTES + MOE_BYTES + 2 * 4 * D + 4 * 4  # the residual stream twice, and two numbers for each norm


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: nn.SwitchHead(D, H, E, d_head=P, top_k=K), HEAD_BYTES),
        (lambda: nn.SwitchHead(D, H, E, d_head=P, top_k=K, recompute=True), HEAD_BYTES - U_BYTES),
        (lambda: nn.SigmaMoE(D, MOE_E, G, MOE_K), MOE_BYTES),
        (lambda: nn.SwitchAll(D, H, E, MOE_E, G, d_head=P, top_k=K, moe_top_k=MOE_K), BLOCK_BYTES),
        (
            lambda: nn.SwitchAll(D, H, E, MOE_E, G, d_head=P, top_k=K, moe_top_k=MOE_K, recompute=True),
            BLOCK_BYTES - U_BYTES - 2 * 2 * D,  # what both norms made
        ),
    ],
    ids=["SwitchHead", "SwitchHead, recompute", "SigmaMoE", "SwitchAll", "SwitchAll, recompute"],
)
def test_a_layer_keeps_no_more_than_this_for_its_backward(make, expected, device):
    """Bytes a token under autocast to 16 bits, where heads of 41 channels are stored as 48."""
    module = make().to(device)

    def kept(module, length):
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast(device, torch.float16):
            module(randn(2, length, D, device=device))
        return sum(storage.nbytes() for storage in storages.values())

    assert kept(module, 128) - kept(module, 64) <= 128 * expected
    if device == "cpu":  # with the partitioner that decides for Inductor what is kept
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager_decomp_partition")
        assert kept(compiled, 64) <= kept(module, 64)


@pytest.mark.parametrize("name", MODULES)
def test_what_is_computed_again_is_the_same(name, device):
    """Outputs and gradients, with every dropout on, of passes that are recorded and replayed as well."""
    module, x = modules(device, dropout=0.3)[name], randn(2, 5, 12, device=device)
    head = getattr(module, "attention", module)
    if not hasattr(head, "recompute"):
        pytest.skip("keeps nothing that could be made again")
    number = 4 if device == "cuda" else 1  # the third is recorded
    for dtype in (torch.float32, torch.float16):
        passes = []
        for recompute in number * [False] + number * [True]:
            head.recompute = recompute
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                torch.manual_seed(1)
                passes.append(gradients(module, x))
        for other in passes[1:]:
            for a, b in zip(passes[0], other, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("name", MODULES)
def test_inference_mode(name, device):
    module = modules(device)[name]
    x = randn(2, 5, 12, device=device)
    with torch.inference_mode():
        result = module(x.detach())
        again = module(x.detach().clone())  # an inference tensor
    for a, b, c in zip(*(r if isinstance(r, tuple) else (r,) for r in (module(x), result, again)), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and b.is_inference()


@pytest.mark.parametrize("name", MODULES)
def test_functional_call(name, device):
    """Other parameters than the module's own are used, and get the gradients."""
    module, x = modules(device)[name], randn(2, 5, 12, device=device)
    other = {key: (1.5 * p).detach().requires_grad_() for key, p in module.named_parameters()}
    loss = loss_of(torch.func.functional_call(module, other, (x,)))
    ours = torch.autograd.grad(loss, [x, *other.values()])
    module.load_state_dict(other)
    for a, b in zip(ours, gradients(module, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MODULES)
def test_checkpointing_repeats_what_was_drawn(name, device):
    """Every dropout is on, without a seed: the second forward pass draws the same."""
    module, x = modules(device, dropout=0.3)[name], randn(2, 5, 12, device=device)
    torch.manual_seed(1)
    expected = gradients(module, x)
    torch.manual_seed(1)
    loss = loss_of(checkpoint(module, x, use_reentrant=False))
    for a, b in zip(expected, torch.autograd.grad(loss, [x, *module.parameters()]), strict=True):
        assert torch.equal(a, b)
    other = gradients(module, x)
    assert not any(torch.equal(a, b) for a, b in zip(expected, other, strict=True))


@pytest.mark.parametrize("name", MODULES)
def test_gradients_accumulate(name, device):
    module = modules(device)[name]
    first, second = (randn(2, 5, 12, device=device, seed=seed) for seed in (0, 1))
    expected = [a + b for a, b in zip(gradients(module, first)[1:], gradients(module, second)[1:], strict=True)]
    for x in (first, second):
        loss_of(module(x)).backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(module.parameters(), expected, strict=True))


@pytest.mark.parametrize("name", MODULES)
def test_any_part_may_be_frozen(name, device):
    """What stays trainable gets the same gradient, bit by bit, and the rest none."""
    module, x = modules(device)[name], randn(2, 5, 12, device=device)
    leaves = [x, *module.parameters()]
    expected = gradients(module, x)
    for trained in ({0}, set(range(0, len(leaves), 2)), set(range(1, len(leaves), 2))):
        for i, leaf in enumerate(leaves):
            leaf.grad = None
            leaf.requires_grad_(i in trained)
        loss_of(module(x)).backward()
        for i, (leaf, gradient) in enumerate(zip(leaves, expected, strict=True)):
            assert torch.equal(leaf.grad, gradient) if i in trained else leaf.grad is None


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
@pytest.mark.parametrize("name", MODULES)
def test_streams_do_not_disturb_each_other(name, device):
    """Four at once, each with its own input, as one after the other."""
    module = modules(device)[name]
    inputs = [randn(8, 300, 12, device=device, seed=seed) for seed in range(4)]
    expected = [gradients(module, x) for x in inputs]
    streams, found = [torch.cuda.Stream() for _ in inputs], [None] * len(inputs)
    for _ in range(5):
        for i, (stream, x) in enumerate(zip(streams, inputs, strict=True)):
            stream.wait_stream(torch.cuda.default_stream())
            with torch.cuda.stream(stream):
                found[i] = gradients(module, x)
        torch.cuda.synchronize()
        for alone, together in zip(expected, found, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


class TwoBlocks(torch.nn.Module):
    def __init__(self, dropout):
        super().__init__()
        shared = {"d_head": 100, "moe_top_k": 4, "dropout": dropout, "expert_dropout": dropout, "moe_dropout": dropout}
        self.blocks = torch.nn.ModuleList(nn.SwitchAll(256, 2, 4, 16, 64, **shared) for _ in range(2))
        self.head = torch.nn.Linear(256, 50)

    def forward(self, x, targets):
        regularizer = 0.0
        for block in self.blocks:
            x, logits = block(x)
            regularizer = regularizer + F.entropy_regularizer(logits)
        return torch.nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), targets.flatten()) + 1e-2 * regularizer


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_training_step_replays_from_a_cuda_graph(dtype, dropout, device):
    """Forward, backward, clipping and optimizer: replays leave the weights of eager steps, bit by bit, dropouts too."""
    torch.manual_seed(0)
    eager = TwoBlocks(dropout).to(device)
    captured = copy.deepcopy(eager)
    x, targets = torch.empty(4, 130, 256, device=device), torch.empty(4, 130, dtype=torch.int64, device=device)

    def stepper(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)

        def step():
            optimizer.zero_grad()
            with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
                loss = model(x, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return loss

        return step

    def batch(i):
        x.copy_(randn(*x.shape, device=device, seed=i, requires_grad=False))
        targets.copy_(torch.arange(targets.numel(), device=device).view_as(targets) * (i + 3) % 50)

    def warmed_up(step):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.manual_seed(1)
            batch(0)
            step()
        torch.cuda.current_stream().wait_stream(stream)

    losses, step = [], stepper(eager)
    warmed_up(step)
    torch.manual_seed(2)
    for i in range(1, 4):
        batch(i)
        losses.append(step().clone())

    step = stepper(captured)
    warmed_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    torch.manual_seed(2)
    for i in range(1, 4):
        batch(i)
        graph.replay()
        assert torch.equal(loss, losses[i - 1]), f"step {i}"
    for (key, a), b in zip(eager.named_parameters(), captured.parameters(), strict=True):
        assert torch.equal(a, b), key
