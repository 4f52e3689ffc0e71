"""triton_moe.testing: the bar lets good kernels pass and planted faults fail; the strategies stay in their bounds."""

import math
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from hypothesis import find, given
from hypothesis import strategies as st

from triton_moe.testing import assert_close, check, expert_choices, layer_shapes, logits, strided, tensors

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def product(dtype, seed=0):
    """(truth, twin) of a matrix product [37, 19]: float64, and PyTorch's own in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(37, 41, generator=generator).to(dtype), torch.randn(41, 19, generator=generator).to(dtype)
    return a.double() @ b.double(), a @ b


@pytest.mark.parametrize("dtype", DTYPES)
def test_assert_close_accepts_the_twin_and_the_rounded_truth(dtype):
    truth, twin = product(dtype)
    assert_close(twin, truth, twin)
    assert_close(truth.to(dtype), truth, twin)
    assert_close(twin[:0], truth[:0], twin[:0])


def ulp(truth, dtype):
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(truth.square().mean().sqrt()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_assert_close_rejects_a_bias_that_only_the_rms_shows(dtype):
    truth, twin = product(dtype)
    twin_rms = float((twin.double() - truth).square().mean().sqrt())
    bias = 3 * ulp(truth, dtype) + 2 * twin_rms
    with pytest.raises(AssertionError, match=r"y: (RMS|largest) error"):
        assert_close((truth + bias).to(dtype), truth, twin, name="y")


def test_assert_close_measures_the_rms_apart_from_the_largest_error():
    truth, twin = torch.ones(1000, dtype=torch.float64), torch.ones(1000)
    twin[0] += 0.5  # the twin has one bad element: the largest error allows 1, the root mean square does not
    with pytest.raises(AssertionError, match="RMS error"):
        assert_close(torch.full((1000,), 1.5), truth, twin)


@pytest.mark.parametrize("dtype", DTYPES)
def test_assert_close_names_a_single_wrong_element(dtype):
    truth, twin = product(dtype)
    wrong = twin.clone()
    wrong[5, 7] += 1
    with pytest.raises(AssertionError, match=r"dw: largest error .*twin.*\n  \[5, 7\]: got .* truth .* twin"):
        assert_close(wrong, truth, twin, name="dw")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_assert_close_wants_nan_and_inf_where_the_truth_has_them(value):
    truth, twin = product(torch.float32)
    wrong = twin.clone()
    wrong[3, 2] = value
    with pytest.raises(AssertionError, match=r"1 of 703 elements.*\n  \[3, 2\]"):
        assert_close(wrong, truth, twin)
    with pytest.raises(AssertionError, match="1 of 703 elements"):
        assert_close(twin, wrong.double(), wrong)
    assert_close(wrong, wrong.double(), wrong)
    with pytest.raises(AssertionError, match="1 of 703 elements"):
        assert_close(-wrong if math.isinf(value) else twin, wrong.double(), wrong)


def test_assert_close_takes_overflow_of_the_dtype_for_infinity():
    truth = torch.tensor([1e6, 1.0], dtype=torch.float64)
    assert_close(truth.half(), truth, truth.half())


def test_a_twin_that_is_not_finite_widens_nothing():
    truth, twin = product(torch.float32)
    broken = twin.clone()
    broken[0, 0] = math.inf
    with pytest.raises(AssertionError, match="largest error"):
        assert_close(twin + 1, truth, broken)


def test_assert_close_rejects_other_shapes_and_a_rounded_truth():
    truth, twin = product(torch.float32)
    with pytest.raises(AssertionError, match=r"shape \(19, 37\), truth has \(37, 19\)"):
        assert_close(twin.T, truth, twin)
    with pytest.raises(TypeError, match="truth must be float64, got torch.float32"):
        assert_close(twin, twin, twin)


def test_scale_says_what_rounding_means_where_the_truth_is_zero():
    zero = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(AssertionError, match="largest error"):
        assert_close(torch.full((4,), 1e-7), zero, zero.float())
    assert_close(torch.full((4,), 1e-7), zero, zero.float(), scale=1.0)


class Weights(NamedTuple):
    up: torch.Tensor
    bias: torch.Tensor | None
    power: int = 2


def twin_of_mlp(x, weights, chosen):
    """Two outputs: floating y [N, G] and the integer ids it was given."""
    y = torch.relu(x @ weights.up) ** weights.power
    return (y if weights.bias is None else y + weights.bias), chosen


class Mlp(torch.autograd.Function):
    """The same with its backward written out, and a switch for each fault that `check` must see."""

    @staticmethod
    def forward(ctx, x, up, fault):
        ctx.save_for_backward(x, up)
        ctx.fault = fault
        y = torch.relu(x @ up) ** 2
        return y + torch.randn(()) * 1e-8 if fault == "random" else y

    @staticmethod
    def backward(ctx, grad):
        x, up = ctx.saved_tensors
        d = 2 * torch.relu(x @ up) * grad
        if ctx.fault == "gradient":
            d = d + 1e-3
        return (None if ctx.fault == "no dx" else d @ up.T), x.T @ d, None


def mlp(fault=""):
    def kernel(x, weights, chosen):
        y = Mlp.apply(x, weights.up, fault)
        if fault == "dtype":
            y = y.bfloat16()
        return (y if weights.bias is None else y + weights.bias), chosen

    return kernel


def mlp_inputs(bias=True):
    generator = torch.Generator().manual_seed(1)
    x, up, b = (torch.randn(s, generator=generator).requires_grad_() for s in ((11, 5), (5, 7), (7,)))
    return {"x": x, "weights": Weights(up, b if bias else None), "chosen": torch.arange(11)}


@pytest.mark.parametrize("bias", [False, True])
def test_check_accepts_a_right_kernel_and_leaves_no_gradients_behind(bias):
    inputs = mlp_inputs(bias)
    check(mlp(), twin_of_mlp, inputs, outputs=["y", "chosen"], repeats=2)
    assert inputs["x"].grad is None and inputs["weights"].up.grad is None


@pytest.mark.parametrize(
    "fault, message",
    [
        ("gradient", r"mlp: dx: (largest|RMS) error"),
        ("no dx", "mlp: dx is None, the twin's is not zero"),
        ("dtype", r"floating outputs are \[\(\(11, 7\), torch.bfloat16\)\]"),
        ("random", "mlp: y differs in run 2: the kernel is not reproducible"),
    ],
)
def test_check_catches(fault, message):
    with pytest.raises(AssertionError, match=message):
        check(mlp(fault), twin_of_mlp, mlp_inputs(bias=False), outputs=["y", "chosen"], name="mlp")


def test_check_names_a_gradient_inside_a_tuple():
    def kernel(x, weights, chosen):
        return twin_of_mlp(x, weights._replace(up=weights.up * 1.0, bias=weights.bias.detach()), chosen)

    with pytest.raises(AssertionError, match="dweights.bias is None"):
        check(kernel, twin_of_mlp, mlp_inputs())


def test_check_counts_runs_that_differ_in_integers_only():
    runs = iter(range(10))

    def kernel(x):
        return x * 2, torch.tensor(next(runs) // 3)  # the first three runs agree

    x = torch.ones(3)
    check(kernel, lambda x: x * 2, {"x": x}, repeats=2)
    runs = iter(range(10))
    with pytest.raises(AssertionError, match="output.1 differs in run 4"):
        check(kernel, lambda x: x * 2, {"x": x}, repeats=5)


def test_check_takes_no_gradient_for_zeros_on_either_side():
    x, unused = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    inputs = {"x": x, "unused": unused}
    check(lambda x, unused: x * 2, lambda x, unused: x * 2 + unused.sum() * 0, inputs)
    check(lambda x, unused: x * 2 + unused.sum() * 0, lambda x, unused: x * 2, inputs)
    check(lambda x, unused: x * 2, lambda x, unused: x * 2, inputs)
    with pytest.raises(AssertionError, match="dunused"):
        check(lambda x, unused: x * 2 + (unused.sum() - unused.sum().detach()), lambda x, unused: x * 2, inputs)


def test_check_keeps_the_strides_of_the_inputs():
    x, seen = torch.ones(4, 3).T, []

    def kernel(x):
        seen.append(x.stride())
        return x + 1

    check(kernel, lambda x: x + 1, {"x": x})
    assert seen == [(1, 3), (1, 3)]


@given(layer_shapes(max_tokens=9, max_width=8, max_heads=3, max_experts=6, max_top_k=3, max_head_width=7))
def test_layer_shapes_stay_in_their_bounds(shape):
    assert 1 <= shape.N <= 9 and 1 <= shape.D <= 8 and 1 <= shape.H <= 3 and 1 <= shape.P <= 7
    assert 1 <= shape.TOP_K <= min(3, shape.E) and shape.E <= 6


def test_layer_shapes_shrink():
    assert find(layer_shapes(), lambda s: True) == (1, 1, 1, 1, 1, 1)
    assert find(layer_shapes(), lambda s: s.TOP_K == 3 and s.D % 2 == 1 and s.D > 30) == (1, 31, 1, 3, 3, 1)


@given(tensors((3, 5), torch.bfloat16, scale=0.0, requires_grad=True))
def test_tensors_have_the_shape_dtype_and_scale_asked_for(x):
    assert x.shape == (3, 5) and x.dtype == torch.bfloat16 and x.requires_grad and x.is_leaf and not x.any()


def test_tensors_repeat_for_a_seed_and_differ_between_seeds():
    first, second = (find(tensors((4,)), lambda x: True) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(find(tensors((4,)), lambda x: not torch.equal(x, first)), first)


@given(st.data())
def test_strided_changes_the_layout_and_nothing_else(data):
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4).map(tuple))
    x = data.draw(st.sampled_from([torch.float16, torch.float64, torch.int64, torch.bool]).map(torch.ones(shape).to))
    y = data.draw(strided(x))
    assert y.dtype == x.dtype and torch.equal(x, y) and (y.numel() <= 1 or not y.is_contiguous())


def test_strided_finds_other_layouts_and_keeps_requires_grad():
    x = torch.randn(3, 4, requires_grad=True)
    assert find(strided(x), lambda y: y.stride(0) == 1).requires_grad  # a transpose
    assert find(strided(x), lambda y: y.stride(1) == 1 and y.stride(0) == 5).is_leaf  # rows padded by one
    assert find(strided(x), lambda y: y.storage_offset() > 0 and y.stride(1) == 2).shape == x.shape


@given(logits((13, 2, 5), torch.float16))
def test_logits_have_the_shape_and_dtype_asked_for(x):
    assert x.shape == (13, 2, 5) and x.dtype == torch.float16


@pytest.mark.parametrize(
    "wanted",
    [
        lambda x: bool(x.isnan().all(-1).any()) and bool(x.isfinite().any()),
        lambda x: bool((x.isnan().any(-1) & ~x.isnan().all(-1)).any()),
        lambda x: bool((x == -math.inf).all(-1).any()),
        lambda x: bool((x == math.inf).any()),
        lambda x: any(len(set(row.tolist())) < 5 for row in x if row.isfinite().all()),
        lambda x: bool(((x == 0) & x.signbit()).any()),
    ],
    ids=["nan row", "single nan", "-inf row", "inf", "ties", "negative zero"],
)
def test_logits_find_every_difficult_row(wanted):
    assert wanted(find(logits((13, 5)), wanted))


def test_logits_shrink_to_ordinary_rows():
    simplest = find(logits((13, 5)), lambda x: True)
    assert simplest.isfinite().all() and simplest.unique().numel() == simplest.numel()


@given(st.data())
def test_expert_choices_are_unique_and_in_range(data):
    shape = data.draw(layer_shapes())
    ids = data.draw(expert_choices(n_tokens=shape.N, n_heads=shape.H, n_experts=shape.E, top_k=shape.TOP_K))
    assert ids.shape == (shape.N, shape.H, shape.TOP_K) and ids.dtype == torch.int32
    assert int(ids.min()) >= 0 and int(ids.max()) < shape.E
    assert all(len(set(row)) == shape.TOP_K for row in ids.flatten(0, 1).tolist())


def test_expert_choices_find_one_expert_taking_all_and_every_expert_in_use():
    strategy = expert_choices(n_tokens=20, n_heads=1, n_experts=4, top_k=1)
    assert find(strategy, lambda ids: len(ids.unique()) == 1).unique().numel() == 1  # three experts empty
    assert find(strategy, lambda ids: len(ids.unique()) == 4).unique().tolist() == [0, 1, 2, 3]


def test_without_hypothesis_the_strategies_say_what_to_install_and_the_rest_works():
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import torch; from triton_moe import testing\n"
        "testing.check(lambda x: x + 1, lambda x: x + 1, {'x': torch.ones(3)})\n"
        "testing.layer_shapes()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("ImportError: ") and "pip install triton-moe[test]" in run.stderr
