"""The modules with weights of their own that the layer is made of, besides torch's."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import DSAConfig
from .wrapped import in_fp32


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dim, in fp32, rounded to x.dtype once."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim], any float dtype -> the same shape and dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class Indexer(nn.Module):
    """The lightning indexer's own weights: queries from the shared latent, one key, one weight for each head."""

    def __init__(self, config: DSAConfig) -> None:
        super().__init__()
        self.config = config
        self.wq_b = nn.Linear(config.q_lora_rank, config.index_n_heads * config.index_head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.index_head_dim, bias=False)
        self.k_norm = nn.LayerNorm(config.index_head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(config.dim, config.index_n_heads, bias=False)

    def forward(self, x: Tensor, q_latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, dim], q_latent [T, q_lora_rank] (normed) -> q [T, Hi, Di], k [T, Di], both before RoPE, w fp32 [T, Hi].

        The inputs are detached: no gradient of the indexer ever reaches the main model.
        """
        return self.project(x.detach(), q_latent.detach())

    def project(self, x: Tensor, q_latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` on inputs that are detached, or not."""
        c = self.config
        q = self.wq_b(q_latent).unflatten(-1, (c.index_n_heads, c.index_head_dim))
        k = self.wk(x)
        k = in_fp32(self.k_norm, k).to(k.dtype)
        w = in_fp32(self.weights_proj, x)
        return q, k, w * c.index_n_heads**-0.5 * c.index_head_dim**-0.5
