"""Whole models: training steps of the published ones, beside those of their dense twins."""

import functools
from dataclasses import replace

import torch

from ..model import PUBLISHED, LanguageModel, ModelConfig
from .layers import switchall_row, switchhead_row
from .row import BOTH, TRAINING, Inputs, Rival, Row, Target, Task
from .shared import Shape


def model_rows(device: str, full: bool) -> list[Row]:
    if device == "cpu":
        twin = ModelConfig(48, 2, n_heads=2, d_head=20, d_ff=64, vocabulary=50)
        head = replace(twin, n_experts=3)
        both = replace(head, moe_n_experts=6, expert_size=16, moe_top_k=2)
        tiny = {"SwitchAll": (both, twin), "SwitchHead": (head, twin), "SwitchHead XL": (replace(head, position="xl"), twin)}
        return [model_row(name, *tiny[name], 2, 24, device) for name in list(tiny)[: None if full else 1]]
    bounds = {
        "SwitchHead 243M": (Target(0.88, 0.8), Target(0.85, 0.75)),
        "SwitchAll 259M": (Target(0.65, 0.45), Target(0.65, 0.5)),
    }
    timed = {name: configs for name, configs in PUBLISHED.items() if full or configs[0].position == "rope"}
    rows = [model_row(name, *configs, 32, 1024, device, *bounds.get(name, ())) for name, configs in timed.items()]
    for name in bounds:
        config, twin = PUBLISHED[name]
        rows.append(model_row(f"{name}, recompute", replace(config, recompute=True), twin, 32, 1024, device))
    return rows


def model_row(
    name: str,
    config: ModelConfig,
    twin: ModelConfig,
    B: int,
    T: int,
    device: str,
    time: Target | None = None,
    memory: Target | None = None,
) -> Row:
    """A model with Transformer-XL's positions, which its dense twin has not, faces itself without torch.compile."""
    c, xl, checked = config, config.position == "xl", 2  # sequences
    s = Shape(c.n_heads, c.n_experts, c.top_k, c.d_head, c.d_model, checked, T)
    fraction = None if xl else c.rotate_fraction
    if c.moe_n_experts:
        layer = switchall_row(s, c.moe_n_experts, c.expert_size, c.moe_top_k, device, fraction=fraction)
    else:
        layer = switchhead_row(s, device, fraction=fraction)
    mlp, head = 12.0 * B * T * c.d_model * c.d_ff, 6.0 * B * T * c.d_model * c.vocabulary
    flops = c.n_layers * (layer.flops[BOTH] * B / checked + mlp) + head
    step = functools.partial(training, B=B, T=T, device=device)
    if xl:
        rival = Rival("the same, eager", functools.partial(step, config, compiling=False), compiles=True)
    else:
        targets = {TRAINING: time} if time else {}
        rival = Rival("its dense twin, torch.compile", functools.partial(step, twin), targets, memory=memory, compiles=True)
    return replace(
        layer,
        name=f"{name}, {c.n_layers} layers, {B} x {T} tokens",
        flops={TRAINING: flops},
        rivals=(rival,),
        step=functools.partial(step, config),
        tokens=B * T,
        kernels="",
    )


def training(config: ModelConfig, inputs: Inputs, *, B: int, T: int, device: str, compiling: bool = True) -> Task:
    """One step of AdamW under autocast, on the same random tokens every time. n_layers in `inputs` stands for the model's own."""
    with torch.device(device):
        model = LanguageModel(replace(config, n_layers=inputs.get("n_layers", config.n_layers)))
        tokens = torch.randint(config.vocabulary, (B, T + 1))
    gpu = device == "cuda"
    if compiling and gpu:
        model.compile_parts()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True, capturable=gpu)

    def step():
        with torch.autocast(device, dtype=torch.bfloat16, enabled=gpu):
            loss, entropy = model.losses(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return entropy.detach()

    def held():
        moments = [t for state in optimizer.state.values() for t in state.values()]
        return [*model.parameters(), *model.buffers(), *moments]

    return Task(step, [], held=held)
