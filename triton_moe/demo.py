"""`python -m triton_moe demo`: a byte-level SwitchAll language model learns the source of Python's standard library.

Read top to bottom: the text, training, one training step checked against `reference/`, sampling, the comparison with the dense
twin, the command; the model is in model.py. Importing this module imports no Triton, so that TRITON_INTERPRET=1 can still be set.
"""

import argparse
import copy
import importlib.util
import itertools
import json
import math
import os
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from .model import REGULARIZER, LanguageModel, ModelConfig

LEAST_GAIN = 1.0  # bits per held-out byte; a full training that gains less has failed
TWIN_MARGIN = 1.02  # SwitchAll's held-out bits per byte over those of its dense twin
FOLLOWED, WINDOW, FOLLOWING_MARGIN = 200, 20, 0.02  # how long, in what steps and how closely lower precision follows float32

# The text


def standard_library() -> tuple[bytes, bytes]:
    """(training text, held-out text): the top-level modules of the standard library, every tenth file held out."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_sysconfigdata"))
    texts = [path.read_bytes() for path in files]
    train, held_out = b"".join(t for i, t in enumerate(texts) if i % 10), b"".join(texts[::10])
    if len(held_out) < 10_000:
        raise FileNotFoundError(f"the demo trains on Python's own source files, and {folder} has none")
    return train, held_out


def as_tensor(text: bytes, device: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)


def windows(text: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """Rows text[start : start + length] as int64."""
    return text[starts.to(text.device)[:, None] + torch.arange(length, device=text.device)].long()


def even_windows(text: torch.Tensor, count: int, length: int) -> torch.Tensor:
    return windows(text, torch.linspace(0, text.numel() - length, count).long(), length)


# Training


@dataclass(frozen=True)
class Recipe:
    """How AdamW trains one side."""

    learning_rate: float
    weight_decay: float
    warm_up: int  # steps, a fifth of all at most


@dataclass(frozen=True)
class Preset:
    """What the demo trains on one kind of device."""

    model: ModelConfig
    batch: int
    context: int
    steps: int
    recipe: Recipe
    twins_recipe: Recipe
    held_out: int  # windows of `context` bytes
    checked: tuple[int, int]  # sequences and bytes of the step compared with reference/
    generated: int  # bytes


CPU = Preset(
    model=ModelConfig(64, 2, n_heads=2, d_head=32, n_experts=4, moe_n_experts=8, expert_size=32, moe_top_k=2),
    batch=2,
    context=256,
    steps=14,
    recipe=Recipe(1.5e-2, 0.01, 1),
    twins_recipe=Recipe(1.5e-2, 0.01, 1),
    held_out=4,
    checked=(2, 48),
    generated=16,
)
GPU = Preset(
    model=ModelConfig(512, 6, n_heads=4, d_head=64, n_experts=4, moe_n_experts=16),
    batch=32,
    context=512,
    steps=300,
    # Rates of 1.5e-3 to 4e-3, warm-ups of 20 and 60 steps and weight decays of 0.01 and 0.1 were tried on both sides, one at a
    # time and with one seed, where runs differ by 0.02 to 0.04 from seed to seed: the dense side was best without either change.
    recipe=Recipe(2e-3, 0.1, 60),
    twins_recipe=Recipe(2e-3, 0.01, 20),
    held_out=64,
    checked=(2, 128),
    generated=160,
)


@dataclass
class Run:
    """One demo: what was asked, and the data it works on."""

    preset: Preset
    steps: int
    seed: int
    device: str
    dtype: torch.dtype
    train: torch.Tensor
    held_out: torch.Tensor
    stop: int | None = None  # the steps trained, where they are fewer than the schedule's
    random: torch.Generator = field(init=False)
    losses: list[torch.Tensor] = field(init=False)  # of every batch so far

    def __post_init__(self):
        self.losses = []
        torch.manual_seed(self.seed)
        self.random = torch.Generator().manual_seed(self.seed)

    def autocast(self):
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def batch(self) -> torch.Tensor:
        starts = torch.randint(self.train.numel() - self.preset.context, (self.preset.batch,), generator=self.random)
        return windows(self.train, starts, self.preset.context + 1)


WARM_UP = 3  # steps before one is captured


def stepper(run: Run, model: LanguageModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that trains `model` on one batch and returns its cross-entropy. On a GPU it captures a whole step, optimizer
    and all, in a CUDA graph: after a few steps the host only replays it.
    """
    preset, gpu = run.preset, run.device == "cuda"
    recipe = preset.recipe if model.config.n_experts else preset.twins_recipe
    rate = torch.tensor(0.0, device=run.device)
    tokens = torch.empty(preset.batch, preset.context + 1, dtype=torch.int64, device=run.device)
    settings = {"betas": (0.9, 0.95), "weight_decay": recipe.weight_decay, "fused": True, "capturable": gpu}
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, **settings)
    scaler = torch.amp.GradScaler(run.device, enabled=run.dtype == torch.float16)
    warm_up = max(1, min(recipe.warm_up, run.steps // 5))
    stream = torch.cuda.Stream() if gpu and not scaler.is_enabled() else None  # a scaler waits for the GPU
    graph, entropy, done = None, None, 0

    def share_of_peak(step: int) -> float:  # linear warm-up, then half a cosine down to a tenth
        progress = (step - warm_up) / max(1, run.steps - warm_up)
        return (step + 1) / warm_up if step < warm_up else 0.55 + 0.45 * math.cos(math.pi * min(1.0, progress))

    def work() -> torch.Tensor:
        optimizer.zero_grad()
        with run.autocast():
            loss, entropy = model.losses(tokens)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return entropy.detach()

    def step(batch: torch.Tensor) -> torch.Tensor:
        nonlocal graph, entropy, done
        tokens.copy_(batch)
        rate.fill_(recipe.learning_rate * share_of_peak(done))
        done += 1
        if stream is None:
            return work()
        if done <= WARM_UP:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                entropy = work()
            torch.cuda.current_stream().wait_stream(stream)
            return entropy
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                entropy = work()
        graph.replay()
        return entropy.clone()

    return step


def train(run: Run, model: LanguageModel) -> bool:
    """Train with a progress bar; True when it ran to the end, False when Ctrl-C ended it."""
    from tqdm import tqdm

    step, tokens_a_step = stepper(run, model), run.preset.batch * run.preset.context
    every = 1 if run.device == "cpu" else 10  # reading the loss waits for the GPU
    loss, done, began = math.nan, 0, time.perf_counter()
    steps, finished = run.stop or run.steps, False
    with tqdm(total=steps, desc="training", unit="step") as bar:
        try:
            while done < steps:
                entropy = step(run.batch())
                run.losses.append(entropy)
                done += 1
                if done % every == 0 or done == steps:
                    loss = entropy.item()
                    if not math.isfinite(loss):
                        sys.exit(f"triton_moe demo: the loss became {loss} at step {done}")
                    speed = tokens_a_step * done / (time.perf_counter() - began)
                    bar.set_postfix_str(f"loss {loss:.3f}, {bits(loss):.3f} bits/byte, {speed:,.0f} tokens/s", refresh=False)
                    bar.update(done - bar.n)
            finished = True
        except KeyboardInterrupt:
            pass
    seconds = time.perf_counter() - began
    print(f"{'trained' if finished else 'interrupted after'} {done} of {steps} steps in {seconds:.0f} s,", end=" ")
    print(f"last batch {loss:.3f} nats = {bits(loss):.3f} bits per byte", flush=True)
    return finished


def bits(nats: float) -> float:
    return nats / math.log(2)


@torch.no_grad()
def held_out_bits(run: Run, model: LanguageModel) -> float:
    tokens = even_windows(run.held_out, run.preset.held_out, run.preset.context + 1)
    with run.autocast():
        parts = [model.losses(rows)[1].item() for rows in tokens.split(run.preset.batch)]
    return bits(sum(parts) / len(parts))


def tokens_per_second(run: Run, model: LanguageModel, steps: int = 20) -> float:
    model.compile_parts()
    step = stepper(run, model)
    for _ in range(5):
        step(run.batch())
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step(run.batch())
    torch.cuda.synchronize()
    return steps * run.preset.batch * run.preset.context / (time.perf_counter() - began)


# One training step against reference/


@dataclass(frozen=True)
class Difference:
    """How far gradients are from the reference: every parameter of one name, over all blocks."""

    name: str
    largest: float  # absolute
    relative: float  # |gradient - truth| / |truth|, Euclidean norms


@torch.no_grad()
def chosen_experts(model: LanguageModel, tokens: torch.Tensor) -> list:
    """Per block, the experts the kernels choose for tokens [B, T]: value side, output side, MoE.

    Our operations are bitwise repeatable, so asking the gates again gives the choice of the training step.
    """
    from .functional import gating

    c, chosen = model.config, []
    x = model.embedding(tokens)
    for block in model.blocks:
        h = block.norm1(x)
        value = gating(h, block.attention.sel_v, n_heads=c.n_heads, top_k=c.top_k)
        output = gating(h, block.attention.sel_o, n_heads=c.n_heads, top_k=c.top_k)
        h = block.norm2(x + block.attention(h))
        moe = gating(h, block.moe.expert_sel, top_k=c.moe_top_k)
        chosen.append((value.experts, output.experts, moe.experts))
        x, _ = block(x)
    return chosen


def reference_losses(model: LanguageModel, tokens: torch.Tensor, experts: list) -> tuple[torch.Tensor, dict, list]:
    """By reference/ in float64, for tokens [B, T + 1] and the given experts: the loss, its leaves by parameter name, and
    the logits [N, H, E] of every gate, in the order of `experts`.
    """
    from . import reference

    c, gate_logits = model.config, []
    leaves = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    x = leaves["embedding.weight"][tokens[:, :-1]]
    regularizer = 0.0
    for i, chosen in enumerate(experts):
        prefix = f"blocks.{i}."
        weights = {name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)}
        h = nn.functional.layer_norm(x, x.shape[-1:], weights["norm1.weight"], weights["norm1.bias"], model.blocks[i].norm1.eps)
        gates = [reference.gating(h, weights[f"attention.{s}"], n_heads=c.n_heads, top_k=c.top_k) for s in ("sel_v", "sel_o")]
        x, logits = reference.switchall(
            x,
            switchall_weights(weights),
            top_k=c.top_k,
            moe_top_k=c.moe_top_k,
            eps=model.blocks[i].norm1.eps,
            position=reference.RoPE(fraction=c.rotate_fraction),
            experts=chosen,
        )
        gate_logits.append((gates[0].logits, gates[1].logits, logits.view(-1, 1, c.moe_n_experts)))
        regularizer = regularizer + reference.entropy_regularizer(logits)
    x = nn.functional.layer_norm(x, x.shape[-1:], leaves["norm.weight"], leaves["norm.bias"], model.norm.eps)
    logits = x @ leaves["head.weight"].T
    entropy = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return entropy + REGULARIZER * regularizer, leaves, gate_logits


def choice_gaps(experts: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where experts [N, H, K] are not the reference's choice from logits [N, H, E] ([N, H] bool), and there the distance
    from the best expert left out to the worst one taken instead, relative to the largest logit (0 elsewhere).
    """
    from . import reference

    none = torch.zeros_like(logits, dtype=torch.bool)
    ours = none.scatter(-1, experts.long(), True)
    theirs = none.scatter(-1, reference.select(logits, experts.shape[-1]), True)
    left_out = logits.masked_fill(ours | ~theirs, -math.inf).amax(-1)
    instead = logits.masked_fill(theirs | ~ours, math.inf).amin(-1)  # stays infinite when an expert was taken twice
    differs = (ours != theirs).any(-1)
    return differs, torch.where(differs, (left_out - instead).abs(), 0.0) / logits.abs().max()


def switchall_weights(p: dict[str, torch.Tensor]):
    """The weights tuple of one block from its parameters by state-dict name."""
    from .functional import SigmaMoEWeights, SwitchAllWeights, SwitchHeadWeights

    return SwitchAllWeights(
        norm1=(p["norm1.weight"], p["norm1.bias"]),
        attention=SwitchHeadWeights(
            q=p["attention.q.weight"],
            k=p["attention.k.weight"],
            v=p["attention.v"],
            o=p["attention.o"],
            sel_v=p["attention.sel_v"],
            sel_o=p["attention.sel_o"],
        ),
        norm2=(p["norm2.weight"], p["norm2.bias"]),
        moe=SigmaMoEWeights(keys=p["moe.keys"], values=p["moe.values"], expert_sel=p["moe.expert_sel"]),
    )


def compare_with_reference(run: Run, model: LanguageModel) -> tuple[list[Difference], torch.Tensor, torch.Tensor]:
    """One training step by our kernels and by reference/: how far apart the loss and the gradients are when both use the
    kernels' choice of experts, then `choice_gaps` of that choice, over all gates.
    """
    tokens = even_windows(run.train, run.preset.checked[0], run.preset.checked[1] + 1)
    model.zero_grad()
    with run.autocast():
        experts = chosen_experts(model, tokens[:, :-1])
        loss, _ = model.losses(tokens)
    loss.backward()
    truth, leaves, logits = reference_losses(model, tokens, experts)
    truth.backward()
    gates = zip(itertools.chain(*experts), itertools.chain(*logits), strict=True)
    differs, gaps = zip(*(choice_gaps(chosen, logit.detach()) for chosen, logit in gates), strict=True)

    groups: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, parameter in model.named_parameters():
        group = ".".join(part for part in name.split(".") if not part.isdigit())
        groups.setdefault(group, []).append((parameter.grad.double(), leaves[name].grad))
    error = abs(loss.item() - truth.item())
    differences = [Difference("loss", error, error / abs(truth.item()))]
    for name, pairs in groups.items():
        error = torch.cat([(gradient - true).flatten() for gradient, true in pairs])
        size = torch.cat([true.flatten() for _, true in pairs]).norm()
        differences.append(Difference(name, error.abs().max().item(), (error.norm() / size).item()))
    model.zero_grad()
    return differences, torch.cat([d.flatten() for d in differs]), torch.cat([g.flatten() for g in gaps])


def report_comparison(run: Run, model: LanguageModel) -> bool:
    """Print the comparison; True when every error is what the number format explains."""
    bound = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 1e-1}[run.dtype]
    tie = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}[run.dtype]  # logits this close may change places
    sequences, length = run.preset.checked
    dtype = str(run.dtype).removeprefix("torch.")
    print(f"\none training step ({sequences} x {length} bytes), our kernels in {dtype} against reference/ in float64:")
    rows, differs, gaps = compare_with_reference(run, model)
    print(f"  {'gradient of':<28} {'largest error':>13} {'relative':>9}")
    for row in rows:
        print(f"  {row.name:<28} {row.largest:13.1e} {row.relative:9.1e}")
    agree = all(row.relative <= bound for row in rows)  # NaN is no agreement
    print(f"  {'agrees' if agree else 'DIFFERS'}: the largest relative error may be {bound:.0e} in {dtype}")
    gap, total = gaps.max().item(), differs.numel()
    ties = gap <= tie
    print(f"  expert choices: {differs.sum().item()} of {total} tokens and heads differ, largest logit gap {gap:.1e}")
    print(f"  {'agrees' if ties else 'DIFFERS'}: a gap may be {tie:.0e} of the largest logit in {dtype}", flush=True)
    return agree and ties


# Sampling


@torch.no_grad()
def generate(run: Run, model: LanguageModel, prompts: torch.Tensor, length: int, temperature: float = 0.7) -> torch.Tensor:
    """Continue prompts [B, window] by `length` sampled bytes; the model sees the last `window` bytes only."""
    random, text = torch.Generator().manual_seed(run.seed), prompts
    for _ in range(length):
        with run.autocast():
            logits = model(text[:, -prompts.shape[1] :])
        probability = (logits[:, -1].float().cpu() / temperature).softmax(dim=-1)
        text = torch.cat([text, torch.multinomial(probability, 1, generator=random).to(text.device)], dim=1)
    return text[:, prompts.shape[1] :]


def show_samples(run: Run, model: LanguageModel, count: int = 4, window: int = 64) -> None:
    prompts = even_windows(run.held_out, count + 2, window)[1:-1]
    texts = generate(run, model, prompts, run.preset.generated)
    print("\nheld-out text, and after the bar what the model writes next:")
    for prompt, text in zip(prompts, texts, strict=True):
        before, after = (bytes(t.tolist()).decode("utf-8", "replace") for t in (prompt[-24:], text))
        print(f"  {before!r:>36} | {after!r}")


# SwitchAll beside its dense twin


def compare_twins(runs: list[Run]) -> bool:
    """Train both with every seed, and SwitchAll in float32 for a while; True when SwitchAll is not worse than its twin by more
    than the margin, and follows float32 within it.
    """
    config = runs[0].preset.model
    found = {
        "SwitchAll": [trained(run, config) for run in runs],
        "dense twin": [trained(run, config.dense_twin()) for run in runs],
    }
    single = replace(runs[0], dtype=torch.float32, stop=min(runs[0].steps, FOLLOWED))
    _, curve = trained(single, config)
    print(f"\nheld-out bits per byte after {runs[0].steps} steps, seeds {runs[0].seed} to {runs[-1].seed}:")
    means = []
    for name, results in found.items():
        bits = [held_out for held_out, _ in results]
        means.append(statistics.mean(bits))
        print(f"  {name:<10} {means[-1]:.4f}, {min(bits):.4f} to {max(bits):.4f}")
    ratio = means[0] / means[1]
    print(f"  SwitchAll / dense twin {ratio:.4f}, which may be {TWIN_MARGIN}")
    gap = largest_gap(found["SwitchAll"][0][1], curve)
    print(f"SwitchAll in {runs[0].dtype} beside float32, the same {len(curve)} batches, {WINDOW} at a time:")
    print(f"  losses differ by {100 * gap:.2f} % at most, which may be {100 * FOLLOWING_MARGIN:.0f} %", flush=True)
    return ratio <= TWIN_MARGIN and gap <= FOLLOWING_MARGIN


def trained(run: Run, config: ModelConfig) -> tuple[float, list[float]]:
    """Held-out bits per byte, and the loss of every batch."""
    run = replace(run)  # seeds everything anew
    model = LanguageModel(config).to(run.device)
    print(f"{'SwitchAll' if config.n_experts else 'dense twin'}, {parameters(model)}, seed {run.seed}, {run.dtype}")
    if not train(run, model):
        raise KeyboardInterrupt
    bits = held_out_bits(run, model)
    print(f"held out: {bits:.4f} bits per byte", flush=True)
    return bits, torch.stack(run.losses).tolist()


def largest_gap(losses: list[float], others: list[float]) -> float:
    """Between the means of every WINDOW of batches, relative to the others', for as many as those are."""
    starts = range(0, len(others), WINDOW)
    means = [[statistics.mean(part[i : min(i + WINDOW, len(others))]) for i in starts] for part in (losses, others)]
    return max(abs(a - b) / b for a, b in zip(*means, strict=True))


# The command


def write_problem(path: Path) -> str | None:
    """Why `path` could not be written, before any work is done for it; None if it can."""
    if path.is_dir():
        return f"{path} is a folder"
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist"
    if not os.access(path.parent, os.W_OK):
        return f"the folder {path.parent} is not writable"
    return None


def write_atomically(path: Path, data: bytes) -> None:
    """Either the whole file or what was there before, whatever happens in between."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with open(draft, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def save_model(path: Path, model: LanguageModel) -> None:
    from safetensors.torch import save

    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    write_atomically(path, save(tensors, metadata={"config": json.dumps(asdict(model.config))}))
    print(f"saved {path}", flush=True)


def fail(message: str) -> int:
    print(f"triton_moe demo: {message}", file=sys.stderr)
    return 2


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=positive, help=f"training steps (default {CPU.steps} on a CPU, {GPU.steps} on a GPU)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and samples (default 0)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="what autocast computes in over float32 parameters (default float32 on a CPU, bfloat16 on a GPU)",
    )
    parser.add_argument(
        "--twins", type=positive, metavar="SEEDS", help="instead train SwitchAll and its dense twin with so many seeds each"
    )
    parser.add_argument("--save", type=Path, metavar="PATH", help="write the trained model there (safetensors)")


def run(args: argparse.Namespace) -> int:
    """0; 1 when it did not learn or differs from the reference; 2 when it cannot start; 130 when Ctrl-C ended the training."""
    needed = ["tqdm", "safetensors"] if args.save else ["tqdm"]
    for name in needed:
        if importlib.util.find_spec(name) is None:
            return fail(f"needs {name}: pip install 'triton-moe[demo]'")
    if args.save and (problem := write_problem(args.save)):
        return fail(f"cannot save: {problem}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        return fail("--device cuda, but torch sees no GPU")
    if device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")

    preset = CPU if device == "cpu" else GPU
    dtype = getattr(torch, args.dtype or ("float32" if device == "cpu" else "bfloat16"))
    text, held_out = (as_tensor(t, device) for t in standard_library())
    run = Run(preset, args.steps or preset.steps, args.seed, device, dtype, text, held_out)
    if args.twins:
        return 0 if compare_twins([replace(run, seed=args.seed + i) for i in range(args.twins)]) else 1
    model = LanguageModel(preset.model).to(device)
    where = torch.cuda.get_device_name() if device == "cuda" else "the CPU, in Triton's interpreter"
    print(f"SwitchAll language model, {parameters(model)}, {dtype} on {where}")
    print(f"{text.numel() / 1e6:.1f} MB of Python's standard library to learn, {held_out.numel() / 1e6:.1f} MB held out")
    before = held_out_bits(run, model)
    print(f"held out: {before:.3f} bits per byte before training", flush=True)

    finished = train(run, model)
    if args.save:
        save_model(args.save, model)
    if not finished:
        return 130
    after = held_out_bits(run, model)
    print(f"held out: {before:.3f} bits per byte before, {after:.3f} after training", flush=True)

    learned = run.steps < preset.steps or after < before - LEAST_GAIN
    if not learned:
        print(f"NOT LEARNED: {run.steps} steps must gain more than {LEAST_GAIN} bits per byte", flush=True)

    agree = report_comparison(run, model)
    if device == "cuda":
        print("\ntraining speed, both sides through torch.compile:", flush=True)
        twin = LanguageModel(preset.model.dense_twin()).to(device)
        for name, rival in {"SwitchAll": copy.deepcopy(model), "dense twin (SDPA)": twin}.items():
            speed = tokens_per_second(run, rival)
            print(f"  {name}, {parameters(rival)}: {speed:,.0f} tokens/s", flush=True)
    show_samples(run, model)
    return 0 if learned and agree else 1


def parameters(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters"
