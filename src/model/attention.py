"""Attention modules: on the last feature map, on the pooled vector, and a gate inside the backbone.

`SpatialAttention` is this project's: self-attention over the T = H·W positions of the last feature map.
`CrossAttention` pools that map by learned queries. `OneTokenAttention` is what the study's notebook ran:
attention over the single pooled vector. `ChannelGate` is the SCRA of the fine-grained study.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from src import SetupError


class SpatialAttention(nn.Module):
    """Layers of x + gate · Proj(MultiHeadAttention(LayerNorm(x))) over the tokens of a feature map.

    Pre-norm multi-head self-attention (Vaswani et al. 2017; Xiong et al. 2020). The scalar gates start at
    zero (ReZero, Bachlechner et al. 2021), so the network starts as the one without attention. With a
    `window` (h, w) every offset between tokens has a learned bias (Liu et al. 2021), interpolated to maps of
    other sizes.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dropout: float = 0.0,
        n_layers: int = 1,
        gate: float = 0.0,
        window: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        require_divisible(dim, heads)
        self.layers = nn.ModuleList(
            AttentionLayer(dim, heads, dropout, gate, window) for _ in range(n_layers)
        )

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("position_bias")}

    @property
    def gates(self) -> list[nn.Parameter]:
        """The gate of every layer."""
        return [layer.gate for layer in self.layers]

    def forward(self, map_BCHW: torch.Tensor) -> torch.Tensor:
        """(B,C,H,W) -> (B,C,H,W)."""
        tokens_BTC = map_BCHW.flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens_BTC = layer(tokens_BTC, map_BCHW.shape[2:])
        return tokens_BTC.transpose(1, 2).reshape(map_BCHW.shape)

    def weights(self, map_BCHW: torch.Tensor) -> list[torch.Tensor]:
        """Attention weights (B, heads, T, T) of every layer: how much a query (row) takes of each token."""
        tokens_BTC, weights = map_BCHW.flatten(2).transpose(1, 2), []
        for layer in self.layers:
            q, k, _, bias = layer.attention_inputs(tokens_BTC, map_BCHW.shape[2:])
            weights.append(attention_weights(q, k, bias))
            tokens_BTC = layer(tokens_BTC, map_BCHW.shape[2:])
        return weights


class AttentionLayer(nn.Module):
    """One layer of `SpatialAttention`."""

    def __init__(
        self, dim: int, heads: int, dropout: float, gate: float, window: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.gate = nn.Parameter(torch.full((1,), gate))
        self.position_bias = None
        if window:
            self.position_bias = nn.Parameter(torch.zeros(heads, 2 * window[0] - 1, 2 * window[1] - 1))
        start_small(self.qkv, self.proj)

    def forward(self, tokens_BTC: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(B,T,C) -> (B,T,C), the T tokens of a map of `size` (H,W)."""
        mixed = F.scaled_dot_product_attention(*self.attention_inputs(tokens_BTC, size))
        mixed_BTC = mixed.transpose(1, 2).reshape(tokens_BTC.shape)
        return tokens_BTC + self.gate * self.dropout(self.proj(mixed_BTC))

    def attention_inputs(
        self, tokens_BTC: torch.Tensor, size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Queries, keys and values, each (B, heads, T, C / heads), and the bias (heads, T, T) or None."""
        B, T, C = tokens_BTC.shape
        qkv = self.qkv(self.norm(tokens_BTC)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        bias = None if self.position_bias is None else offset_bias(self.position_bias, *size).to(q.dtype)
        return q, k, v, bias


def attention_weights(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(q kᵀ / √d + bias), (..., Q, T): what `scaled_dot_product_attention` never writes down."""
    scores = q / math.sqrt(q.shape[-1]) @ k.transpose(-2, -1)  # divided first: the product fits 16 bits
    return (scores if bias is None else scores + bias).softmax(-1)


def attention_entropy(weights_BHQT: torch.Tensor) -> torch.Tensor:
    """(B, heads, Q, T) -> (B,): entropy of the weights over log T, mean over heads and queries.

    1 is the uniform average over all tokens, 0 a single token (and where there is but one).
    """
    entropy_BHQ = torch.special.entr(weights_BHQT).sum(-1)
    return entropy_BHQ.mean((1, 2)) / math.log(max(weights_BHQT.shape[-1], 2))


def offset_bias(table: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(heads, T, T) for the T tokens of a map: the table's entry of the offset from one token to another.

    `table` (heads, 2h-1, 2w-1) is interpolated where the map is not (h, w).
    """
    size = (2 * height - 1, 2 * width - 1)
    if table.shape[1:] != size:
        table = F.interpolate(table[None], size, mode="bicubic", align_corners=True)[0]
    y, x = (torch.arange(length, device=table.device) for length in (height, width))
    rows = (y[:, None] - y + height - 1)[:, None, :, None]
    columns = (x[:, None] - x + width - 1)[None, :, None, :]
    n_tokens = height * width
    return table[:, rows, columns].reshape(-1, n_tokens, n_tokens)


class CrossAttention(nn.Module):
    """mean(x) + gate · MultiHeadAttention(query, LayerNorm(x)) for each of Q learned queries.

    One query sums the tokens up for all classes (as in attention pooling, Lee et al. 2019), one query a class
    lets every class look where it wants (Liu et al. 2021, Query2Label). The gate starts at zero: average
    pooling.
    """

    def __init__(self, dim: int, heads: int, n_queries: int, dropout: float = 0.0, gate: float = 0.0) -> None:
        super().__init__()
        require_divisible(dim, heads)
        self.heads, self.n_queries = heads, n_queries
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Parameter(torch.empty(n_queries, dim))
        self.kv = nn.Linear(dim, 2 * dim)
        self.dropout = nn.Dropout(dropout)
        self.gate = nn.Parameter(torch.full((1,), gate))
        nn.init.trunc_normal_(self.query, std=0.02)
        start_small(self.kv)

    def no_weight_decay(self) -> set[str]:
        return {"query"}

    @property
    def gates(self) -> list[nn.Parameter]:
        """The one gate."""
        return [self.gate]

    def forward(self, map_BCHW: torch.Tensor) -> torch.Tensor:
        """(B,C,H,W) -> (B·Q,C,1,1): maps of one position, the queries of an image next to each other."""
        B, C = map_BCHW.shape[:2]
        tokens_BTC = map_BCHW.flatten(2).transpose(1, 2)
        attended = F.scaled_dot_product_attention(*self.attention_inputs(tokens_BTC))
        attended_BQC = attended.transpose(1, 2).reshape(B, self.n_queries, C)
        summary_BQC = tokens_BTC.mean(1, keepdim=True) + self.gate * self.dropout(attended_BQC)
        return summary_BQC.reshape(B * self.n_queries, C, 1, 1)

    def weights(self, map_BCHW: torch.Tensor) -> list[torch.Tensor]:
        """Attention weights (B, heads, Q, T) of the one layer: how much a query takes of each token."""
        q, k, _ = self.attention_inputs(map_BCHW.flatten(2).transpose(1, 2))
        return [attention_weights(q, k)]

    def attention_inputs(self, tokens_BTC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (B, heads, Q, C / heads), keys and values, each (B, heads, T, C / heads)."""
        B, T, C = tokens_BTC.shape
        kv = self.kv(self.norm(tokens_BTC)).view(B, T, 2, self.heads, C // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4)
        q = self.query.view(self.n_queries, self.heads, -1).transpose(0, 1).expand(B, -1, -1, -1)
        return q.to(k.dtype), k, v


class ChannelGate(nn.Module):
    """Selective Channel Recalibration Attention: x · sigmoid(Conv1x1(x)), gates for channels and places."""

    def __init__(self, channels: int, nhwc: bool = False) -> None:
        super().__init__()
        self.nhwc = nhwc
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, map_BCHW: torch.Tensor) -> torch.Tensor:
        """(B,C,H,W) -> (B,C,H,W), or (B,H,W,C) -> the same."""
        map_ = map_BCHW.permute(0, 3, 1, 2) if self.nhwc else map_BCHW
        gated = map_ * self.conv(map_).sigmoid()
        return gated.permute(0, 2, 3, 1) if self.nhwc else gated

    def gate_output(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        """As a forward hook: gates what a module of the backbone gives."""
        return self(output)


def require_divisible(dim: int, heads: int) -> None:
    if dim % heads:
        raise SetupError(f"model.attention_heads = {heads} does not divide the backbone's {dim} channels.")


def start_small(*layers: nn.Linear) -> None:
    for layer in layers:
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)


class OneTokenAttention(nn.Module):
    """Attention over one token, without a residual, as the study's notebook ran it.

    The softmax over a single key is 1 whatever the query, so `query` and `key` cannot learn: their
    gradient is exactly zero and they are held fixed here. What is left is Dropout(Linear(x)).
    """

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        for layer in (self.query, self.key):
            layer.requires_grad_(False)

    def forward(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        """(B,D) -> (B,D)."""
        token_B1D = pooled_BD.unsqueeze(1)
        scores_B11 = self.query(token_B1D) @ self.key(token_B1D).transpose(1, 2) / pooled_BD.shape[1] ** 0.5
        mixed_B1D = self.dropout(scores_B11.softmax(dim=-1)) @ self.value(token_B1D)
        return self.dropout(mixed_B1D).squeeze(1)
