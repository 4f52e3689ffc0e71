"""Tools for testing a kernel against plain PyTorch: the library's own tests use them, and yours can.

    from triton_moe.testing import assert_close, check, layer_shapes, tensors

* `check` runs a kernel and its PyTorch twin, forward and backward, and compares every output and gradient.
* `assert_close` is the bar it applies to one tensor.
* `layer_shapes`, `tensors`, `strided`, `logits` and `expert_choices` are Hypothesis strategies for the inputs; they
  need `pip install triton-moe[test]`.

NOTE [The bar]
    A tolerance is measured, not guessed. The same formula runs three times: the kernel; a PyTorch twin in the kernel's
    dtype; the twin in float64, which is the truth. The kernel's error may be at most twice the twin's, both as the
    largest error and as the root mean square over the tensor, plus one unit in the last place of the kernel's dtype at
    the truth's root mean square.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["LayerShape", "assert_close", "check", "expert_choices", "layer_shapes", "logits", "poisoned", "strided", "tensors"]

POISON_LIMIT = 1 << 27  # elements; larger tensors are virtual memory that a test touches in a few places only


@contextmanager
def poisoned(limit: int = POISON_LIMIT) -> Iterator[None]:
    """Here torch.empty and its relatives return what no computation may survive (NaN, the byte 0x7f in integers, True), so that
    nothing can rely on memory that no kernel wrote. Tensors of more than `limit` elements stay as they are."""

    def fill(tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided or tensor.is_meta or tensor.numel() > limit:
            return tensor
        with torch.no_grad(), _disable_current_modes():  # what a mode sees is what there would be without this
            if tensor.is_floating_point() or tensor.is_complex():
                return tensor.fill_(float("nan"))
            if tensor.dtype == torch.bool:
                return tensor.fill_(True)
            return tensor.fill_(int.from_bytes(b"\x7f" * tensor.element_size(), "little"))

    def poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor if torch.compiler.is_compiling() else fill(tensor)

        return empty

    allocators: list[tuple[Any, str]] = [(torch, name) for name in ("empty", "empty_like", "empty_strided")]
    allocators += [(torch.Tensor, name) for name in ("new_empty", "new_empty_strided")]
    before = [(owner, name, getattr(owner, name)) for owner, name in allocators]
    try:
        for owner, name, allocate in before:
            setattr(owner, name, poisoning(allocate))
        yield
    finally:
        for owner, name, allocate in before:
            setattr(owner, name, allocate)


def assert_close(
    actual: Tensor, truth: Tensor, twin: Tensor, *, name: str = "", scale: float | None = None, ulps: float = 1.0
) -> None:
    """Raise AssertionError unless `actual` is nearly as close to `truth` as `twin` is; see NOTE [The bar].

    actual: [...] floating, what the kernel returned
    truth:  [...] float64, the right values
    twin:   [...] what PyTorch returned in the kernel's dtype
    scale:  the magnitude whose last place is granted, for a truth that cancels to (nearly) zero, as the gradient of q
            does in attention with a single key. Default: the root mean square of `truth`.
    ulps:   how many units in the last place are granted to a float32 tensor. More than one where its arithmetic is not
            the kernel's own (NumPy's float32 matrix product, which the interpreter uses, is up to three times as wrong as
            torch's) or where it is small, and the twin's largest error a matter of luck.

    NaN must stand where the truth has NaN, infinities where the truth, rounded to the kernel's dtype, has them.
    """
    label = name or "tensor"
    if truth.dtype != torch.float64:
        raise TypeError(f"{label}: truth must be float64, got {truth.dtype}")
    if not (actual.shape == truth.shape == twin.shape):
        shapes = f"{tuple(actual.shape)}, truth has {tuple(truth.shape)}, twin has {tuple(twin.shape)}"
        raise AssertionError(f"{label}: shape {shapes}")
    if actual.numel() == 0:
        return

    dtype = actual.dtype
    truth = truth.detach().to(actual.device)
    actual, twin = actual.detach().double(), twin.detach().to(actual.device, torch.float64)
    rounded = truth.to(dtype).double()
    finite = rounded.isfinite()
    same = torch.where(finite, actual.isfinite(), (actual == rounded) | (actual.isnan() & rounded.isnan()))
    if not same.all():
        raise AssertionError(
            f"{label}: {int((~same).sum())} of {same.numel()} elements are NaN or infinite where the truth is not, or "
            f"finite where it is not\n{_worst((~same).double(), actual, truth, twin)}"
        )

    def errors(x: Tensor) -> Tensor:
        return torch.where(finite & x.isfinite(), (x - truth).abs(), 0.0)

    def rms(x: Tensor) -> float:
        return math.sqrt(float(x.square().mean()))

    granted = ulps if dtype == torch.float32 else 1.0
    if scale is None:
        scale = rms(torch.where(finite, truth, 0.0))
    ulp = granted * torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(scale)) if scale > 0 else 0.0
    ours, theirs = errors(actual), errors(twin)
    for measure, error, allowed in (
        ("largest", float(ours.max()), 2 * float(theirs.max()) + ulp),
        ("RMS", rms(ours), 2 * rms(theirs) + ulp),
    ):
        if not error <= allowed:
            raise AssertionError(
                f"{label}: {measure} error {error:.4g} > {allowed:.4g} = 2 * {(allowed - ulp) / 2:.4g} (twin) + "
                f"{ulp:.4g} ({granted:g} ulp of {dtype} at {scale:.4g})\n{_worst(ours, actual, truth, twin)}"
            )


def _worst(error: Tensor, actual: Tensor, truth: Tensor, twin: Tensor) -> str:
    """The worst few elements, one a line: [coordinates] actual, truth, twin."""
    lines = []
    for flat in error.flatten().topk(min(5, error.numel())).indices.tolist():
        if error.flatten()[flat] > 0:
            index = [int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape)]
            values = [float(t.flatten()[flat]) for t in (actual, truth, twin)]
            lines.append("  {}: got {:.9g}, truth {:.9g}, twin {:.9g}".format(index, *values))
    return "\n".join(lines)


def check(
    kernel: Callable[..., Any],
    twin: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    outputs: Sequence[str] | None = None,
    name: str = "",
    repeats: int = 1,
    seed: int = 0,
    scales: Mapping[str, float] | None = None,
    ulps: float = 1.0,
) -> None:
    """Compare a kernel with its PyTorch twin: every floating output, and every gradient of random cotangents.

    kernel, twin: called as f(**inputs); return a tensor or a (named) tuple. Run in float64, the twin is the truth.
    inputs:       tensors, (named) tuples of tensors, or plain values, by name. The twin must take the floating tensors
                  in any dtype. Discrete choices (top-k) should be an input, or too clear to depend on the dtype.
    outputs:      names of the outputs, for messages; default "output", or "output.0" or "output.field" in a tuple
    repeats:      how many more times the kernel runs: every run must give the same bits, integer outputs included
    seed:         of the cotangents, drawn in float64 and rounded to each output's dtype
    ulps:         `ulps` of `assert_close`
    scales:       `scale` of `assert_close`, by output name or "d" + input name, dotted in tuples: {"dweights.q": 1.0}

    Gradients are taken with respect to every floating input that requires them; None counts as zeros. Integer outputs
    are not compared with the twin. On a CUDA device the kernel may not make the host wait, forward or backward.

        check(
            lambda x, w, weights, experts: F.value_projection(x, w, F.Routing(weights, experts)),
            reference.value_projection,
            {"x": x, "w": w, "weights": weights, "experts": experts},
        )
    """
    prefix, scales = f"{name}: " if name else "", scales or {}

    same, exact = _prepare(inputs, None), _prepare(inputs, torch.float64)
    twin_outputs, truth_outputs = (
        _floating(_leaves(twin(**same), "output")),
        _floating(_leaves(twin(**exact), "output")),
    )
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype) for _, o in twin_outputs]
    twin_gradients = _gradients(same, twin_outputs, cotangents)
    truth_gradients = _gradients(exact, truth_outputs, cotangents)

    def run() -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor | None]]]:
        ours = _prepare(inputs, None)
        with _no_sync():
            results = _leaves(kernel(**ours), "output")
            if outputs is not None:
                results = [(n, o) for n, (_, o) in zip(outputs, results, strict=True)]
            got, expected = ([(tuple(o.shape), o.dtype) for _, o in r] for r in (_floating(results), twin_outputs))
            if got != expected:
                raise AssertionError(f"{prefix}floating outputs are {got}, the twin's are {expected}")
            return results, _gradients(ours, _floating(results), cotangents)

    results, gradients = run()
    for (label, a), (_, t), (_, w) in zip(_floating(results), truth_outputs, twin_outputs, strict=True):
        assert_close(a, t.double(), w, name=prefix + label, scale=scales.get(label), ulps=ulps)
    for (label, da), (_, dt), (_, dw) in zip(gradients, truth_gradients, twin_gradients, strict=True):
        if da is None and dt is not None and dt.any():
            raise AssertionError(f"{prefix}{label} is None, the twin's is not zero")
        if da is not None:
            dt, dw = (torch.zeros_like(da) if g is None else g for g in (dt, dw))
            assert_close(da, dt.double(), dw, name=prefix + label, scale=scales.get(label), ulps=ulps)

    for repeat in range(repeats):
        results_again, gradients_again = run()
        pairs = zip([*results, *gradients], [*results_again, *gradients_again], strict=True)
        for (label, first), (_, again) in pairs:
            if not _same_bits(first, again):
                raise AssertionError(f"{prefix}{label} differs in run {repeat + 2}: the kernel is not reproducible")


def _floating(leaves: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return [(n, t) for n, t in leaves if t.is_floating_point()]


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `function` to every tensor inside nested (named) tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(function, v) for v in value))
    if isinstance(value, tuple | list):
        return type(value)(_map(function, v) for v in value)
    if isinstance(value, dict):
        return {k: _map(function, v) for k, v in value.items()}
    return value


def _leaves(value: Any, name: str) -> list[tuple[str, Tensor]]:
    """Every tensor inside nested containers with its dotted name, in the order of `_map`."""
    if isinstance(value, Tensor):
        return [(name, value)]
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        items = zip(value._fields, value, strict=True)
    elif isinstance(value, tuple | list):
        items = enumerate(value)
    elif isinstance(value, dict):
        items = value.items()
    return [leaf for key, v in items for leaf in _leaves(v, f"{name}.{key}" if name else str(key))]


def _prepare(inputs: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """The inputs as leaves of a new graph with the same strides; floating ones cast to `dtype`, if one is given."""

    def leaf(x: Tensor) -> Tensor:
        y = x.detach().to(dtype) if dtype is not None and x.is_floating_point() else x.detach()
        return y.requires_grad_(x.requires_grad)

    return _map(leaf, dict(inputs))


def _gradients(
    inputs: dict[str, Any], outputs: list[tuple[str, Tensor]], cotangents: list[Tensor]
) -> list[tuple[str, Tensor | None]]:
    wanted = [(f"d{n}", x) for n, x in _leaves(inputs, "") if x.requires_grad]
    pairs = [(o, c.to(o.dtype)) for (_, o), c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not wanted or not pairs:
        return [(n, None) for n, _ in wanted]
    heads, seeds = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(heads, [x for _, x in wanted], seeds, allow_unused=True)
    return [(n, g) for (n, _), g in zip(wanted, gradients, strict=True)]


@contextmanager
def _no_sync() -> Iterator[None]:
    """Every operation that makes the host wait for the GPU is an error in here."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls the mode a prototype each time
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(
        a.detach().reshape(-1).contiguous().view(torch.uint8), b.detach().reshape(-1).contiguous().view(torch.uint8)
    )


class LayerShape(NamedTuple):
    """Sizes of one layer: tokens, model width, heads, experts per head, experts per token and head, head width."""

    N: int
    D: int
    H: int
    E: int
    TOP_K: int
    P: int


def _strategies() -> Any:
    try:
        from hypothesis import strategies
    except ImportError as error:
        raise ImportError("the strategies of triton_moe.testing need Hypothesis: pip install triton-moe[test]") from error
    return strategies


def layer_shapes(
    *,
    max_tokens: int = 40,
    max_width: int = 48,
    max_heads: int = 3,
    max_experts: int = 7,
    max_top_k: int = 4,
    max_head_width: int = 24,
) -> Any:
    """Strategy for LayerShape: every size from 1 to its bound, odd ones included, with TOP_K <= E.

    @given(shape=layer_shapes(max_tokens=100))
    """
    st = _strategies()

    def with_experts(n_experts: int) -> Any:
        return st.builds(
            LayerShape,
            N=st.integers(1, max_tokens),
            D=st.integers(1, max_width),
            H=st.integers(1, max_heads),
            E=st.just(n_experts),
            TOP_K=st.integers(1, min(max_top_k, n_experts)),
            P=st.integers(1, max_head_width),
        )

    return st.integers(1, max_experts).flatmap(with_experts)


def tensors(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    scale: float = 1.0,
    requires_grad: bool = False,
    device: torch.device | str = "cpu",
) -> Any:
    """Strategy for tensors of `shape` with normal values times `scale`: Hypothesis draws the seed, torch the values.

    x = data.draw(tensors((shape.N, shape.D), torch.bfloat16, requires_grad=True))
    """

    def fill(seed: int) -> Tensor:
        values = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) * scale
        return values.to(device, dtype).requires_grad_(requires_grad)

    return _strategies().integers(0, 2**32 - 1).map(fill)


def strided(tensor: Tensor) -> Any:
    """Strategy for views with the shape and values of `tensor` in another memory layout: axes permuted, every other
    element, padded rows, an offset, and NaN (or the largest integer) in between. Never contiguous, unless there is one
    element or none.

        x = data.draw(strided(x))
    """
    st = _strategies()
    n = tensor.dim()
    filler = math.nan if tensor.is_floating_point() else 1 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max

    def lay_out(order: Sequence[int], steps: list[int], pads: list[int]) -> Tensor:
        sizes = [tensor.shape[axis] * steps[axis] + pads[axis] for axis in order]
        storage = torch.full(sizes, filler, dtype=tensor.dtype, device=tensor.device)
        storage = storage.permute([order.index(axis) for axis in range(n)])
        view = storage[tuple(slice(pad, None, step) for pad, step in zip(pads, steps, strict=True))]
        if view.is_contiguous() and tensor.numel() > 1:
            return lay_out(range(n), [2] * n, pads)
        return view.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)

    def per_axis(low: int, high: int) -> Any:
        return st.lists(st.integers(low, high), min_size=n, max_size=n)

    return st.builds(lay_out, st.permutations(range(n)), per_axis(1, 2), per_axis(0, 3))


def logits(shape: Sequence[int], dtype: torch.dtype = torch.float32, *, device: torch.device | str = "cpu") -> Any:
    """Strategy for gate logits [..., E] that mix ordinary rows with difficult ones: ties, all equal (-0 among 0),
    single NaN and infinities, whole rows of NaN or -inf. The simplest example is all ordinary.
    """
    st = _strategies()
    kinds = ("ties", "equal", "nan", "inf", "all nan", "all -inf")

    def fill(seed: int, drawn: list[str]) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(tuple(shape), generator=generator)
        difficult = {
            "ties": rows.round(),
            "equal": rows.sign() * 0.0,
            "nan": rows.masked_fill(rows > 0.7, math.nan),
            "inf": rows.masked_fill(rows > 0.7, math.inf).masked_fill(rows < -0.7, -math.inf),
            "all nan": torch.full_like(rows, math.nan),
            "all -inf": torch.full_like(rows, -math.inf),
        }
        pick = torch.randint(len(drawn) + 1, tuple(shape)[:-1], generator=generator)  # one kind a row; 0: as it is
        for i, kind in enumerate(drawn):
            rows = torch.where((pick == i + 1)[..., None], difficult[kind], rows)
        return rows.to(device, dtype)

    return st.builds(fill, st.integers(0, 2**32 - 1), st.lists(st.sampled_from(kinds), unique=True, max_size=3))


def expert_choices(*, n_tokens: int, n_heads: int, n_experts: int, top_k: int, device: torch.device | str = "cpu") -> Any:
    """Strategy for chosen experts, int32 [N, H, TOP_K]: ids in [0, E), different within a token and head, in any order.

    The number of experts in use per head runs from TOP_K (the same few take every token, all others stay empty) to E.
    """
    st = _strategies()

    def fill(seed: int, used: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.rand(n_heads, n_experts, generator=generator).argsort(-1)[:, :used]  # [H, used]
        order = torch.rand(n_tokens, n_heads, used, generator=generator).argsort(-1)[..., :top_k]
        return ids.expand(n_tokens, -1, -1).gather(-1, order).to(device, torch.int32)

    return st.builds(fill, st.integers(0, 2**32 - 1), st.integers(top_k, n_experts))
