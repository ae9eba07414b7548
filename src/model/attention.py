"""Attention modules of the heads.

`SpatialAttention` is this project's: self-attention over the T = H·W positions of the last feature map.
`OneTokenAttention` is what the study's notebook ran: attention over the single pooled vector.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from src import SetupError


class SpatialAttention(nn.Module):
    """x + gate · Proj(MultiHeadAttention(LayerNorm(x))) over the tokens of a feature map.

    Pre-norm multi-head self-attention (Vaswani et al. 2017; Xiong et al. 2020). The scalar gate starts at
    zero (ReZero, Bachlechner et al. 2021), so the network starts as the one without attention.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise SetupError(
                f"model.attention_heads = {heads} does not divide the backbone's {dim} channels."
            )
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.gate = nn.Parameter(torch.zeros(1))
        for layer in (self.qkv, self.proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, map_BCHW: torch.Tensor) -> torch.Tensor:
        """(B,C,H,W) -> (B,C,H,W)."""
        B, C, H, W = map_BCHW.shape
        tokens_BTC = map_BCHW.flatten(2).transpose(1, 2)
        qkv = self.qkv(self.norm(tokens_BTC)).view(B, H * W, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, C / heads)
        mixed_BTC = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H * W, C)
        tokens_BTC = tokens_BTC + self.gate * self.dropout(self.proj(mixed_BTC))
        return tokens_BTC.transpose(1, 2).reshape(B, C, H, W)


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
