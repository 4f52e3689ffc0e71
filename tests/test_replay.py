"""A composition done again from its recording is the composition."""

import functools
import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.utils.checkpoint
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from triton_moe import functional as F
from triton_moe import replay, tuning
from triton_moe.kernels import common
from triton_moe.replay import layout as layouts
from triton_moe.replay import writer

N_HEADS, E, P, D, G = 2, 3, 8, 24, 16
SHOWN = {"_head_forward": 3, "_moe_forward": 2, "_block_forward": 2}
HOMES = [F._gating, F._attention, F._moe, F._switchhead, F._switchall]


def head_weights(device, dtype=torch.float32, E=E, xl=False):
    def w(*shape):
        return torch.randn(*shape, device=device, dtype=dtype) / 5

    HP = N_HEADS * P
    experts = w(N_HEADS * E, D, P), w(N_HEADS * E, P, D), w(N_HEADS * E, D), w(N_HEADS * E, D)
    return F.SwitchHeadWeights(w(HP, D), w(HP, D), *experts, w(HP, D) if xl else None)


def moe_weights(device, dtype=torch.float32, bias=True):
    def w(*shape):
        return torch.randn(*shape, device=device, dtype=dtype) / 5

    biases = (w(E, G), w(D)) if bias else (None, None)
    return F.SigmaMoEWeights(w(E, D, G), w(E, G, D), w(E, D), *biases)


def recorded(monkeypatch, call, functions):
    """`call`() with each of the named functions recorded -> {name: (function, tensors, constants, recording)}."""
    call()  # as ever, not the first call: that one also makes tables
    found = {}
    for name in functions:
        home = next(m for m in HOMES if getattr(m, name, None) is not None and getattr(m, name).__module__ == m.__name__)
        function = getattr(home, name).__wrapped__
        shown = SHOWN.get(name)

        def recording(tensors, *constants, kept=replay.NOTHING, name=name, function=function, shown=shown):
            if common.recorder is not None:  # inside another, of which it is a part
                result = function((*tensors, *kept.flat()), *constants)
                return result if shown is None else (*result[:shown], replay.Kept(result[shown:]))
            device = next(t for t in tensors if t is not None).device
            result, made = replay.record(function, tensors, constants, device, shown, kept)
            found[name] = function, (*tensors, *kept.tensors), constants, made, kept.layout, len(tensors)
            if shown is None:
                return result
            if made is None:
                return *result[:shown], replay.Kept(result[shown:])
            return *result[:shown], replay.Kept(made.layout.packed(result[shown:]), made.layout)

        monkeypatch.setattr(home, name, recording)
    call()
    monkeypatch.undo()
    return found


def renewed(tensors, layout=None, own=0):
    """Other values in the same places; what counts, or masks, stays."""
    storages = {}
    for t in tensors:
        if t is not None:
            storages.setdefault(t.untyped_storage()._cdata, t.untyped_storage().clone())

    def again(t):
        new = torch.empty(0, dtype=t.dtype, device=t.device)
        return new.set_(storages[t.untyped_storage()._cdata], t.storage_offset(), t.shape, t.stride())

    new = tuple(None if t is None else again(t) for t in tensors)
    parts = {}
    if layout is not None:
        views = zip(layout.places, layout.views(new[own:]), strict=True)
        parts = {place: t for place, t in views if isinstance(place, layouts.Place) and place.slot == layout.slab}
    for t in (*new, *parts.values()):
        if t is not None and t.is_floating_point():
            t.mul_(-1.25)
    return new


def assert_same(found, names):
    assert set(found) == set(names)
    for name, (function, tensors, constants, recording, layout, own) in found.items():
        assert recording is not None, name
        for these in (tensors, renewed(tensors, layout, own)):
            before = [None if t is None else t.clone() for t in these]
            assert recording.fits(these)
            flat = (*these[:own], *replay.Kept(these[own:], layout).flat())
            expected, (got, kept) = function(flat, *constants), recording(these)
            assert len(got) == SHOWN.get(name, len(expected))
            got = (*got, *kept.flat())
            assert len(expected) == len(got)
            for i, (a, b) in enumerate(zip(expected, got, strict=True)):
                assert (a is None) == (b is None), (name, i)
                if a is not None:
                    assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride(), (name, i)
                    assert torch.equal(a, b), (name, i)
            for i, t in enumerate(these):
                assert t is None or torch.equal(t, before[i]), "an input was written"
            for i, a in enumerate(expected):
                for j, b in enumerate(expected[:i]):
                    assert a is not b or got[i] is got[j], "one tensor became two"
            storages = {t.untyped_storage()._cdata for t in these if t is not None}
            for a, b in zip(expected, got, strict=True):
                if a is not None and a.untyped_storage()._cdata in storages:
                    assert a.data_ptr() == b.data_ptr(), "what was given was copied"


@pytest.mark.parametrize("position", ["rope", "xl"])
def test_a_recording_is_switchhead(device, monkeypatch, position):
    torch.manual_seed(0)
    x = torch.randn(2, 9, D, device=device, requires_grad=True)
    weights = head_weights(device, xl=position == "xl")
    options = {
        "top_k": 2,
        "position": F.XL() if position == "xl" else F.RoPE(),
        "training": True,
        "expert_dropout": 0.2,
        "seed": 3,
    }
    names = "_head_forward", "_head_backward"
    found = recorded(monkeypatch, lambda: F.switchhead(x, weights, **options).square().sum().backward(), names)
    assert_same(found, names)


def test_a_recording_is_switchhead_with_memory_and_masks(device, monkeypatch):
    torch.manual_seed(1)
    memory = torch.randn(2, 12, D, device=device)
    mask = torch.zeros(2, 12, dtype=torch.bool, device=device)
    mask[1, 10:] = True
    x = memory[:, -5:].clone().requires_grad_()
    options = {"top_k": 1, "k_src": memory, "key_padding_mask": mask, "dropout": 0.1, "training": True, "seed": 5}
    names = "_head_forward", "_head_backward"
    weights = head_weights(device)
    found = recorded(monkeypatch, lambda: F.switchhead(x, weights, **options).square().sum().backward(), names)
    assert_same(found, names)


def test_a_recording_is_sigma_moe(device, monkeypatch):
    torch.manual_seed(2)
    x = torch.randn(11, D, device=device, requires_grad=True)
    names = "_moe_forward", "_moe_backward"
    call = lambda: F.sigma_moe(x, moe_weights(device), top_k=2)[0].square().sum().backward()  # noqa: E731
    assert_same(recorded(monkeypatch, call, names), names)


def test_a_recording_is_switchall(device, monkeypatch):
    torch.manual_seed(3)
    x = torch.randn(2, 7, D, device=device, requires_grad=True)
    norm = torch.ones(D, device=device), torch.zeros(D, device=device)
    weights = F.SwitchAllWeights(norm, head_weights(device), norm, moe_weights(device))  # the same norm twice
    names = "_block_forward", "_block_backward"

    def call():
        y, logits = F.switchall(x, weights, top_k=2, moe_top_k=2, dropout=0.1, training=True, seed=7)
        (y.square().sum() + F.entropy_regularizer(logits)).backward()

    assert_same(recorded(monkeypatch, call, names), names)


def test_a_recording_is_attention_on_parts_of_one_tensor(device, monkeypatch):
    torch.manual_seed(4)
    qkv = torch.randn(1, 13, 3 * N_HEADS, 16, device=device, requires_grad=True)
    q, k, v = qkv.chunk(3, 2)
    names = "_attention_forward", "_attention_backward"
    found = recorded(monkeypatch, lambda: F.attention(q, k, v, position=F.RoPE()).square().sum().backward(), names)
    assert_same(found, names)
    _, tensors, _, recording, *_ = found["_attention_forward"]
    assert recording.together and not recording.fits([None if t is None else t.clone() for t in tensors])


def test_a_recording_is_gating_backward(device, monkeypatch):
    torch.manual_seed(5)
    x = torch.randn(10, D, device=device, requires_grad=True)
    sel = torch.randn(N_HEADS * E, D, device=device, requires_grad=True)
    names = ("_gating_backward",)
    call = lambda: F.gating(x, sel, n_heads=N_HEADS, top_k=2).weights.square().sum().backward()  # noqa: E731
    assert_same(recorded(monkeypatch, call, names), names)


def test_parts_of_one_tensor_are_not_neighbours(device):
    """Tensors that lie beside each other by chance, as parts of one did."""
    buffer = torch.randn(2, 3, 4, device=device)
    function = lambda tensors: (tensors[0] + tensors[1],)  # noqa: E731
    _, recording = replay.record(function, tuple(buffer), (), buffer.device)
    address = buffer.data_ptr()

    class Beside(torch.Tensor):
        def data_ptr(self):
            return address + 48

    assert recording.fits(tuple(buffer))
    assert not recording.fits((buffer[0], buffer[1].clone().as_subclass(Beside)))


def test_an_empty_tensor_is_not_the_address_of_its_storage(device):
    x = torch.randn(4, 3, device=device)
    function = lambda tensors: (tensors[1] + 1, tensors[0])  # noqa: E731
    _, recording = replay.record(function, (x[4:], x[1:]), (), x.device)
    assert recording is None


def test_nothing_of_the_recorded_call_stays(device, monkeypatch):
    """Not even what a tensor descriptor points at."""
    torch.manual_seed(8)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x = torch.randn(1, 160 if device == "cpu" else 700, D, device=device, dtype=dtype, requires_grad=True)
    weights = head_weights(device, dtype, E=2)
    names = "_head_forward", "_head_backward"

    def call(x=x, weights=weights):
        F.switchhead(x, weights, top_k=1).float().square().sum().backward()

    calls = recorded(monkeypatch, call, names)
    assert_same(calls, names)
    kept = [weakref.ref(t) for _, tensors, *_ in calls.values() for t in tensors if t is not None]
    recordings = [recording for _, _, _, recording, *_ in calls.values()]
    del x, weights, call, calls
    gc.collect()
    assert all(recordings) and not any(t() is not None for t in kept)


def test_what_reads_values_or_foreign_tensors_is_not_recorded(device):
    x, foreign = torch.randn(4, device=device), torch.ones(4, device=device)
    for function in (
        lambda tensors: (tensors[0] * tensors[0].sum().item(),),
        lambda tensors: (tensors[0] + foreign,),
        lambda tensors: (tensors[0].view(torch.int16) + 1,),
        lambda tensors: (tensors[0][tensors[0] > 0] * 2,),
    ):
        result, recording = replay.record(function, (x,), (), x.device)
        assert recording is None and torch.equal(result[0], function((x,))[0])
        assert common.recorder is None


def test_a_recording_frees_what_it_needs_no_more(device):
    def function(tensors):
        a = tensors[0] + 1
        b = a * 2
        return (b - 1,)

    x = torch.randn(5, device=device)
    _, recording = replay.record(function, (x,), (), x.device)
    made, alive = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            alive.append([t() is not None for t in made])
            result = func(*args, **kwargs or {})
            made.append(weakref.ref(result))
            return result

    with Watch():
        (got,), _ = recording((x,))
    assert alive == [[], [True], [False, True]] and torch.equal(got, function((x,))[0])


def test_indices_are_recorded(device):
    x, order = torch.randn(5, device=device), torch.tensor([3, 1, 0], device=device)
    function = lambda tensors: (tensors[0][tensors[1]],)  # noqa: E731
    _, recording = replay.record(function, (x, order), (), x.device)
    assert torch.equal(recording((x + 1, order.flip(0)))[0][0], (x + 1)[order.flip(0)])


@pytest.fixture
def recordings(monkeypatch):
    """An empty store."""
    monkeypatch.setattr(replay, "_recordings", type(replay._recordings)())
    monkeypatch.setattr(replay, "_seen", type(replay._seen)())
    return replay._recordings


def test_the_third_call_records_and_what_differs_is_told_apart(device, recordings, monkeypatch):
    monkeypatch.setattr(replay, "possible", lambda: True)
    if device == "cpu":
        monkeypatch.setattr(replay, "here", lambda device: True)
    ran = []

    @replay.replayed
    def function(tensors, factor):
        ran.append(factor)
        return (tensors[0] * factor,)

    x = torch.randn(6, 4, device=device)
    for _ in range(5):
        assert torch.equal(function((x,), 3)[0], x * 3)
    assert ran == [3] * 3 and len(recordings) == 1
    for other in (x.T, x[:3], x.double(), x.flatten()[1:]):  # strides, shape, dtype, alignment
        for _ in range(4):
            assert torch.equal(function((other,), 3)[0], other * 3)
    assert len(ran) == 15 and len(recordings) == 5
    function((x,), 4)
    assert ran[-1] == 4
    monkeypatch.setattr(tuning, "generation", tuning.generation + 1)  # other configurations
    function((x,), 3)
    assert len(ran) == 17
    monkeypatch.setattr(replay, "RECORDINGS", 2)
    for n in range(1, 5):
        for _ in range(3):
            function((x[:n],), 3)
    assert len(recordings) == 2


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 6)), max_size=12))
def test_what_is_used_at_one_time_shares_no_bytes(lives):
    lives = [(min(a, b), max(a, b), 512 * size) for a, b, size in lives]
    offsets, total = writer.packing(lives)
    taken = [set(range(at, at + size, 512)) for at, (_, _, size) in zip(offsets, lives, strict=True)]
    for i, (first, last, _) in enumerate(lives):
        for j, (begin, end, _) in enumerate(lives[:i]):
            assert last < begin or end < first or not taken[i] & taken[j]
    assert total == max((at + size for at, (_, _, size) in zip(offsets, lives, strict=True)), default=0)
    assert total <= sum(size for *_, size in lives) and all(at % 512 == 0 for at in offsets)


def test_a_slab_is_used_again_and_what_the_caller_sees_is_not_in_it(device):
    """A chain of kernels: the results between need the bytes of two."""

    def function(tensors):
        (x,) = tensors
        for _ in range(6):
            x, before = torch.empty_like(x), x
            common.launch(_double, (1,), before, x, x.numel())
        return x, before

    x = torch.arange(5.0, device=device)
    _, recording = replay.record(function, (x,), (), x.device, 1)
    assert f"slab = empty_strided(({2 * writer.ALIGNMENT},)" in recording.source
    assert f"kept = empty_strided(({writer.ALIGNMENT},)" in recording.source
    (y,), kept = recording((x,))
    (again,), other = recording((x + 1,))
    assert torch.equal(y, 64 * x) and torch.equal(kept.flat()[0], 32 * x), "another call wrote to what this one gave"
    assert torch.equal(again, 64 * (x + 1)) and torch.equal(other.flat()[0], 32 * (x + 1))
    assert y.untyped_storage().nbytes() == 20 and len(kept.tensors) == 1


@triton.jit
def _double(x_ptr, y_ptr, N):
    offs = tl.arange(0, 8)
    tl.store(y_ptr + offs, 2 * tl.load(x_ptr + offs, mask=offs < N, other=0.0), mask=offs < N)


@pytest.fixture
def replaying(recordings, monkeypatch):
    """On the CPU too, where the kernels of a recording are interpreted."""
    monkeypatch.setattr(replay, "possible", lambda: common.recorder is None)
    monkeypatch.setattr(replay, "here", lambda device: True)
    return recordings


def transposed(t):
    return t.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)


HOOKS = {
    "copied": (torch.clone, lambda t: t),
    "other strides": (transposed, lambda t: t),
    "off the GPU": (lambda t: (t.device, t.to("cpu", copy=True).contiguous()), lambda packed: packed[1].to(packed[0])),
}


@pytest.mark.parametrize("layer", ["switchhead", "sigma_moe", "switchall"])
def test_what_is_kept_for_the_backward_pass_may_move(layer, device, replaying):
    """By hooks on saved tensors, between one pass and the next; and a pass backward may come twice."""
    torch.manual_seed(10)
    head, moe = head_weights(device), moe_weights(device)
    norm = torch.ones(D, device=device), torch.zeros(D, device=device)
    function, weights = {
        "switchhead": (lambda x: F.switchhead(x, head, top_k=2, return_logits=True), head),
        "sigma_moe": (lambda x: F.sigma_moe(x, moe, top_k=2), moe),
        "switchall": (lambda x: F.switchall(x, F.SwitchAllWeights(norm, head, norm, moe), top_k=2, moe_top_k=2), (*head, *moe)),
    }[layer]
    x = torch.randn(1, 9, D, device=device, requires_grad=True)
    leaves = [x, *(t.requires_grad_() for t in weights if t is not None)]

    def gradients(times=1):
        y, logits = function(x)
        loss = y.square().sum() + sum(part.square().sum() for part in (logits if isinstance(logits, tuple) else (logits,)))
        for _ in range(times):
            grads = torch.autograd.grad(loss, leaves, retain_graph=times > 1, allow_unused=True)
        return y, *grads

    def assert_equal(got, expected):
        for a, b in zip(got, expected, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)

    first = gradients()
    for _ in range(3):
        assert_equal(gradients(), first)
    assert len(replaying) == 2 and None not in replaying.values()
    assert_equal(gradients(times=2), first)
    for pack, unpack in HOOKS.values():
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            y, logits = function(x)
        loss = y.square().sum() + sum(part.square().sum() for part in (logits if isinstance(logits, tuple) else (logits,)))
        assert_equal((y, *torch.autograd.grad(loss, leaves, allow_unused=True)), first)
    checkpointed = torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)
    y, logits = checkpointed
    loss = y.square().sum() + sum(part.square().sum() for part in (logits if isinstance(logits, tuple) else (logits,)))
    assert_equal((y, *torch.autograd.grad(loss, leaves, allow_unused=True)), first)


def test_hooks_move_no_more_than_was_kept(device, replaying):
    """Of two inputs that are parts of one tensor, each its own part."""
    buffer = torch.randn(2, 3, 4, device=device)
    forward = functools.partial(replay.replayed, shown=1)(lambda tensors: (tensors[0] + 1, *tensors, tensors[1][1:]))
    backward = replay.replayed(lambda tensors: (tensors[1] - tensors[2], tensors[3] * tensors[0].sum()))
    for i in range(6):
        y, kept = forward(tuple(buffer))
        assert (kept.layout is not None) == (i >= 2)
        for moved in (kept, kept._replace(tensors=tuple(t.clone() for t in kept.tensors))):
            a, b = backward((y,), kept=moved)
            assert torch.equal(a, buffer[0] - buffer[1]) and torch.equal(b, buffer[1, 1:] * y.sum())
    assert all(t.numel() <= 12 for t in kept.tensors)


def test_checkpointed_layers_save_as_many_tensors_each_time(device, replaying):
    """Layers of one shape, which are first called, then recorded, then replayed, between a pass and its repetition."""
    torch.manual_seed(12)
    layers = [moe_weights(device) for _ in range(4)]
    leaves = [t.requires_grad_() for weights in layers for t in weights]
    x = torch.randn(9, D, device=device)

    def gradients(call):
        h = x
        for weights in layers:
            h = h + call(lambda h, w=weights: F.sigma_moe(h, w, top_k=2)[0], h)
        return torch.autograd.grad(h.square().sum(), leaves)

    first = gradients(functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False))
    assert replaying and None not in replaying.values()
    for a, b in zip(first, gradients(lambda function, h: function(h)), strict=True):
        assert torch.equal(a, b)


def test_what_a_forward_saved_in_several_dtypes_is_recorded(device, replaying):
    """Parts of one slab, which `switchhead_backward` is given one by one."""
    torch.manual_seed(13)
    weights = head_weights(device, torch.float16)
    x, dy = (torch.randn(1, 9, D, device=device, dtype=torch.float16) for _ in range(2))
    rounds = [F.switchhead_backward(dy, F.switchhead_forward(x, weights, top_k=2)[1]) for _ in range(7)]
    assert {key[0].__name__: made is not None for key, made in replaying.items()} == {
        "_head_forward": True,
        "_head_backward": True,
    }
    for found in rounds[1:]:
        assert torch.equal(found.x, rounds[0].x)
        for a, b in zip(found.weights, rounds[0].weights, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_what_is_kept_comes_back_in_any_place(device):
    """A tensor that was expanded, and a slab at an odd address."""
    expanded, slab = torch.randn(3, 1, device=device).expand(3, 4), torch.arange(64, device=device, dtype=torch.uint8)
    holders = [layouts.Place(i, 0, t.dtype, tuple(t.shape), t.stride()) for i, t in enumerate((expanded, slab))]
    places = [holders[0], layouts.Place(1, 16, torch.float32, (3,), (1,))]
    layout = layouts.Layout(holders, places, 1, expanded.device)
    assert all(a is b for a, b in zip(layout.restored((expanded, slab)), (expanded, slab), strict=True))
    odd = torch.empty(65, device=device, dtype=torch.uint8)[1:].copy_(slab)
    restored = layout.restored((expanded.contiguous(), odd))
    assert restored[0].stride() == expanded.stride() and restored[1].data_ptr() % 16 == 0
    for a, b in zip(layout.views(restored), layout.views((expanded, slab)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_a_recording_takes_no_more_memory(device, recordings, monkeypatch):
    torch.manual_seed(11)
    weights = head_weights(device)
    leaves = [t.requires_grad_() for t in weights if t is not None]
    for tokens in (300, 30000):
        x = torch.randn(3, tokens // 3, D, device=device, requires_grad=True)

        def peak(x=x):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            grads = torch.autograd.grad(F.switchhead(x, weights, top_k=2).square().sum(), [x, *leaves])
            torch.cuda.synchronize()
            del grads
            return torch.cuda.max_memory_allocated() - before

        with monkeypatch.context() as patch:
            patch.setattr(replay, "possible", lambda: False)
            peak()
            plain = peak()
        for _ in range(4):
            peak()
        assert recordings and peak() <= 1.02 * plain + writer.SMALL


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_the_fifth_call_is_the_first(device, recordings, autocast):
    """Through the public functions, with other values at each call, bitwise; and in a CUDA graph."""
    torch.manual_seed(6)
    norm = torch.ones(D, device=device), torch.zeros(D, device=device)
    weights = F.SwitchAllWeights(norm, head_weights(device), norm, moe_weights(device))
    leaves = [t.requires_grad_() for part in weights for t in part if t is not None]
    xs = [torch.randn(2, 33, D, device=device, requires_grad=True) for _ in range(3)]

    def gradients(x):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            y, _ = F.switchall(x, weights, top_k=2, moe_top_k=2)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *leaves], allow_unused=True)]

    first = [gradients(x) for x in xs]  # the last of them is written down
    assert len(recordings) == 2  # forward and backward
    for x, expected in zip(xs, first, strict=True):
        for a, b in zip(expected, gradients(x), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(xs[1])
    graph.replay()
    for a, b in zip(first[1], captured, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("inference", [False, True])
def test_autocast_without_gradients(device, recordings, inference):
    torch.manual_seed(9)
    weights, x = moe_weights(device), torch.randn(300, D, device=device)
    with torch.inference_mode() if inference else torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        ys = [F.sigma_moe(x, weights, top_k=2)[0] for _ in range(5)]
    assert len(recordings) == 1 and None not in recordings.values()
    assert all(torch.equal(y, ys[0]) for y in ys)


@pytest.mark.gpu
def test_a_profiler_that_wants_to_know_of_launches_does(device, recordings):
    weights, x = moe_weights(device), torch.randn(65, D, device=device)
    for _ in range(4):
        F.sigma_moe(x, weights, top_k=2)
    hook, launches = triton.knobs.runtime.launch_enter_hook, []
    hook.add(launches.append)
    try:
        y = F.sigma_moe(x, weights, top_k=2)[0]
    finally:
        hook.remove(launches.append)
    assert len(launches) >= 5
    n = len(launches)
    assert torch.equal(F.sigma_moe(x, weights, top_k=2)[0], y) and len(launches) == n


@pytest.mark.gpu
def test_threads_share_a_recording(device, recordings, monkeypatch):
    """And make it while others run."""
    torch.manual_seed(7)
    weights = moe_weights(device)
    xs = [torch.randn(65, D, device=device) for _ in range(4)]
    with monkeypatch.context() as patch:
        patch.setattr(replay, "possible", lambda: False)
        expected = [F.sigma_moe(x, weights, top_k=2)[0] for x in xs]
    wrong = []

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                if not torch.equal(F.sigma_moe(xs[i], weights, top_k=2)[0], expected[i]):
                    wrong.append(i)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(recordings) == 1


def test_a_check_is_remembered_by_what_it_may_ask(device, monkeypatch):
    seen = []

    @replay.remembered
    def check(x, *, scale=1.0, weights=()):
        seen.append(scale)
        if scale == 0:
            raise ValueError("scale")
        return scale

    x = torch.randn(3, 4, device=device)
    for _ in range(3):
        assert check(x, scale=2.0) == 2.0
    assert len(seen) == 1
    check(x + 1, scale=2.0)  # values do not count
    assert len(seen) == 1
    for other in (x[:2], x.double()):
        check(other, scale=2.0)
    check(x, scale=True)
    check(x, scale=1)
    check(x, weights=(x,))
    check(x, weights=(x[:1],))
    assert len(seen) == 7
    with torch.no_grad():
        check(x, scale=2.0)
    check(x, scale=[2.0])  # no key: asked every time
    check(x, scale=[2.0])
    assert len(seen) == 10
    for _ in range(2):
        with pytest.raises(ValueError, match="scale"):  # what failed fails again
            check(x, scale=0)
    with torch.autocast(device, torch.bfloat16):
        check(x, scale=2.0)
    assert len(seen) == 13


def test_a_second_launch_of_a_kind_does_not_ask_triton(monkeypatch):
    """On a stand-in for a kernel: the real way needs a GPU."""
    calls = []
    compiled = SimpleNamespace(function=7, packed_metadata=(4, 1, 0), run=lambda *args: calls.append(args))

    class Kernel:
        fn, arg_names = object(), ["x_ptr", "n", "BLOCK"]
        params = [SimpleNamespace(is_constexpr=constant) for constant in (False, False, True)]

        def __getitem__(self, grid):
            return lambda *args, **meta: calls.append("triton") or compiled

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(common, "current_stream", lambda: lambda device: 99)
    monkeypatch.setattr(common, "_ready", {})
    kernel, x, meta = Kernel(), torch.zeros(8), {"BLOCK": 16, "num_warps": 4}
    for a, n in ((x, 48), (x, 32)):
        assert common.start(kernel, (3,), (a, n), meta) == (compiled, compiled.run, [a.data_ptr(), n, 16])
    assert calls == ["triton", (3, 1, 1, 99, 7, (4, 1, 0), None, None, None, x.data_ptr(), 32, 16)]
    for args, other in (
        ((x[1:], 32), meta),
        ((x, 33), meta),
        ((x, 1), meta),
        ((x, 2**31), meta),
        ((x, 32), meta | {"BLOCK": 32}),
    ):
        calls.clear()
        common.start(kernel, (3,), args, other)  # alignment, divisibility, one, 64 bits, a constant
        assert calls == ["triton"]
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not replay.possible()
