"""A small language model of our layers, of dense ones, or of both: what the demo trains and the benchmark times.

Read top to bottom: its configuration and the published ones, the dense layers, the model. Importing this module imports no
Triton, so that TRITON_INTERPRET=1 can still be set.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

REGULARIZER = 1e-3  # coefficient of the entropy regulariser, per block


@dataclass(frozen=True)
class ModelConfig:
    """With experts in both places a SwitchAll model, with experts in neither a dense one."""

    d_model: int
    n_layers: int
    n_heads: int
    d_head: int
    n_experts: int = 0  # per head, for values and outputs; 0: dense attention
    top_k: int = 2
    moe_n_experts: int = 0  # 0: a dense MLP of width d_ff
    expert_size: int = 128
    moe_top_k: int = 4
    d_ff: int = 0
    position: str = "rope"
    rotate_fraction: float = 0.5  # of a SwitchHead; dense attention rotates every channel
    vocabulary: int = 256  # bytes
    recompute: bool = False  # as of `functional.switchhead` and `switchall`

    def dense_twin(self) -> "ModelConfig":
        """As many parameters, with heads of about 64 channels and no experts."""
        D, HP = self.d_model, self.n_heads * self.d_head
        attention = 2 * D * (HP * (1 + self.n_experts) + self.n_heads * self.n_experts)
        moe = self.moe_n_experts * D * (2 * self.expert_size + 1)
        heads = max(1, D // 64)
        d_ff = (attention + moe) / (2 * D) - 2 * D
        dense = {"n_experts": 0, "moe_n_experts": 0, "d_ff": max(8, 8 * round(d_ff / 8))}
        return replace(self, n_heads=heads, d_head=D // heads, **dense)


# The published models (arXiv 2312.07987, tables 3 and 9), each with its dense twin. The widths of the dense MLPs are rounded up
# to multiples of 8, as a GPU likes them, and the heads of the small twin have 42 channels for 41, which cannot all be rotated.
_SMALL = ModelConfig(412, 16, n_heads=10, d_head=42, d_ff=2056, vocabulary=8000)
_LARGE = ModelConfig(1024, 18, n_heads=16, d_head=64, d_ff=4112, vocabulary=8000)


def _published(twin: ModelConfig, n_heads: int, d_head: int, n_experts: int, top_k: int, **more):
    return replace(twin, n_heads=n_heads, d_head=d_head, n_experts=n_experts, top_k=top_k, **more), twin


PUBLISHED: dict[str, tuple[ModelConfig, ModelConfig]] = {
    "SwitchHead 45M": _published(_SMALL, 2, 64, 5, 3, d_ff=2096),
    "SwitchHead 243M": _published(_LARGE, 4, 100, 4, 2, d_ff=4136),
    "SwitchAll 47M": _published(_SMALL, 2, 76, 5, 3, moe_n_experts=16),
    "SwitchAll 259M": _published(_LARGE, 4, 112, 4, 2, moe_n_experts=32),
    "SwitchHead XL 47M": _published(_SMALL, 2, 76, 5, 3, d_ff=2080, position="xl"),
    "SwitchHead XL 262M": _published(_LARGE, 4, 112, 4, 2, d_ff=4192, position="xl"),
}


class DenseAttention(nn.Module):
    """Causal multi-head attention through torch, every channel rotated (RoPE, halves convention)."""

    def __init__(self, d_model: int, n_heads: int, d_head: int, max_length: int = 16384):
        super().__init__()
        self.n_heads, self.d_head = n_heads, d_head
        self.qkv = nn.Linear(d_model, 3 * n_heads * d_head, bias=False)
        self.out = nn.Linear(n_heads * d_head, d_model, bias=False)
        frequency = 10000.0 ** (-torch.arange(0, d_head, 2) / d_head)
        angle = torch.outer(torch.arange(max_length), frequency).repeat(1, 2)  # [max_length, d_head]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.cos[: x.shape[-2]].to(x.dtype), self.sin[: x.shape[-2]].to(x.dtype)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_heads, self.d_head).permute(2, 0, 3, 1, 4)
        a = nn.functional.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.out(a.transpose(1, 2).reshape(B, T, -1))


class DenseMLP(nn.Module):
    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Block(nn.Module):
    """Pre-norm block of any attention and a dense MLP, with the interface of SwitchAll: returns (y, None)."""

    def __init__(self, d_model: int, attention: nn.Module, d_ff: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(d_model), attention
        self.norm2, self.mlp = nn.LayerNorm(d_model), DenseMLP(d_model, d_ff)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x)), None


def block(c: ModelConfig) -> nn.Module:
    if not c.n_experts:
        return Block(c.d_model, DenseAttention(c.d_model, c.n_heads, c.d_head), c.d_ff)

    from .nn import SwitchAll, SwitchHead

    shared = {"d_head": c.d_head, "top_k": c.top_k, "position": c.position, "rotate_fraction": c.rotate_fraction}
    shared |= {"init_scale": math.sqrt(2 / c.n_layers), "recompute": c.recompute}
    if not c.moe_n_experts:
        made = Block(c.d_model, SwitchHead(c.d_model, c.n_heads, c.n_experts, **shared), c.d_ff)
    else:
        moe = {"moe_n_experts": c.moe_n_experts, "expert_size": c.expert_size, "moe_top_k": c.moe_top_k}
        made = SwitchAll(c.d_model, c.n_heads, c.n_experts, **moe, **shared)
    with torch.no_grad():  # gates begin at about one half, and TOP_K of E experts speak: outputs begin as large as dense ones
        made.attention.v.mul_(2)
        made.attention.o.mul_(2)
        if c.moe_n_experts:
            made.moe.values.mul_(2 * math.sqrt(c.moe_n_experts / c.moe_top_k))
    return made


class LanguageModel(nn.Module):
    """Tokens in, logits of the next one out: embedding, blocks, LayerNorm, linear head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.d_model)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocabulary, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def compile_parts(self) -> None:
        """Each block, and what follows them, by torch.compile: blocks share what is compiled, so that depth costs no time."""
        for block in self.blocks:
            block.compile(dynamic=False)
        self.loss = torch.compile(self.loss, dynamic=False)

    def trunk(self, tokens: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """tokens [B, T] -> [B, T, D] and the MoE logits of every block."""
        x = self.embedding(tokens)
        moe_logits = []
        for block in self.blocks:
            x, logits = block(x)
            moe_logits.append(logits)
        return x, moe_logits

    def loss(self, x: Tensor, moe_logits: list[Tensor | None], tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The loss to minimise, and its cross-entropy part (nats per token)."""
        logits = self.head(self.norm(x))
        entropy = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
        return entropy + REGULARIZER * regularizer([logits for logits in moe_logits if logits is not None]), entropy

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> logits [B, T, vocabulary]."""
        return self.head(self.norm(self.trunk(tokens)[0]))

    def losses(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, T + 1] -> what `loss` returns."""
        return self.loss(*self.trunk(tokens[:, :-1]), tokens[:, 1:])


def regularizer(moe_logits: list[Tensor]) -> Tensor | float:
    if not moe_logits:
        return 0.0
    from .functional import entropy_regularizer

    return sum(entropy_regularizer(logits) for logits in moe_logits)
