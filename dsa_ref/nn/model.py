"""A small byte-level GPT whose attention is `DSALayer`: enough of a language model to watch an indexer learn.

Pre-norm blocks of DSA and a SwiGLU feed-forward, tied embeddings, no special tokens: token = byte.
"""

import dataclasses
import json
import pathlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dsa_ref

from ..config import DSAConfig
from ..contracts import check_dtype, check_shapes
from .cache import LayerCache, all_or_nothing
from .layer import DSALayer, Ops, RMSNorm
from .wrapped import is_plain

SMALL_MODEL = pathlib.Path(__file__).parent / "small_model.safetensors"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the small model. The defaults are those of the checkpoint in this repository."""

    n_layers: int = 4
    hidden_dim: int = 512  # feed-forward width
    vocab_size: int = 256
    attention: DSAConfig = DSAConfig(
        dim=256,
        n_heads=8,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        index_n_heads=16,
        index_head_dim=32,
        index_topk=64,
        max_seq_len=4096,
    )


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        dim, eps = config.attention.dim, config.attention.norm_eps
        self.attention_norm = RMSNorm(dim, eps)
        self.self_attn = DSALayer(config.attention, ops)
        self.mlp_norm = RMSNorm(dim, eps)
        self.gate_proj = nn.Linear(dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, dim, bias=False)

    def forward(
        self, x: Tensor, positions: Tensor, cache: LayerCache | None, attention: str, record: list[dict] | None
    ) -> Tensor:
        """x [T, dim] -> [T, dim]; arguments as for `DSALayer`."""
        x = x + self.self_attn(self.attention_norm(x), positions, cache, attention, record)
        y = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class SmallModel(nn.Module):
    """Next-byte logits of packed byte sequences."""

    def __init__(self, config: ModelConfig = ModelConfig(), ops: Ops = dsa_ref) -> None:
        super().__init__()
        if config.attention.index_pattern:
            raise ValueError("config.attention.index_pattern must be empty: every layer of this model has an indexer")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.attention.dim)
        self.layers = nn.ModuleList(Block(config, ops) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.attention.dim, config.attention.norm_eps)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        caches: list[LayerCache] | None = None,
        attention: str = "sparse",
        record: list[dict] | None = None,
    ) -> Tensor:
        """tokens: int64 [T]; positions: int [T] as for `DSALayer`, default one sequence (after the cache, if any).

        caches: what `new_caches` returned, or None; attention, record: as for `DSALayer`, record gets one dict a layer.
        Where the call fails or is interrupted, all caches and the record are what they were.
        Returns logits fp32 [T, vocab_size]. Raises as `DSALayer` does, and ValueError or TypeError for other caches.
        """
        check_shapes(tokens=(tokens, "T"))
        check_dtype("tokens", tokens, (torch.int64,))
        self._check_caches(caches)
        if positions is None:
            before = 0 if caches is None else caches[0].length
            positions = torch.arange(before, before + tokens.shape[0], device=tokens.device)
        with all_or_nothing(caches or [], record):
            x = self.embed(tokens)
            for block, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
                x = block(x, positions, cache, attention, record)
            return F.linear(self.norm(x), self._embedding()).float()

    def new_caches(self, capacity: int) -> list[LayerCache]:
        """One empty LayerCache a layer, for one sequence of up to `capacity` tokens."""
        weight = next(self.parameters())
        return [LayerCache(self.config.attention, capacity, weight.dtype, weight.device) for _ in self.layers]

    def _embedding(self) -> Tensor:
        """The rows of all tokens, [vocab_size, dim], with whatever an adapter or hook adds to them."""
        if is_plain(self.embed):
            return self.embed.weight
        return self.embed(torch.arange(self.config.vocab_size, device=next(self.parameters()).device))

    def _check_caches(self, caches) -> None:
        """One cache a layer, each another one, all of the same length."""
        if caches is None:
            return
        if not isinstance(caches, (list, tuple)) or not all(isinstance(cache, LayerCache) for cache in caches):
            raise TypeError("caches must be a list of LayerCache, as new_caches returns it, or None")
        if len(caches) != len(self.layers) or len({id(cache) for cache in caches}) != len(caches):
            distinct = len({id(cache) for cache in caches})
            raise ValueError(f"caches must be {len(self.layers)} distinct ones, one a layer, got {distinct}")
        if len({cache.length for cache in caches}) > 1:
            raise ValueError(f"caches must hold the same tokens, got lengths {[cache.length for cache in caches]}")


def save_small_model(model: SmallModel, path: str | pathlib.Path) -> None:
    """Write weights (bf16) and sizes into one safetensors file.

    Raises: ValueError where modules are wrapped, whose weights no model could read, and for the path of a device or a
    folder, in whose place safetensors would put a file.
    """
    from safetensors.torch import save_file

    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"path must be that of a regular file or of a new one, got {path}")
    with torch.device("meta"):
        known = SmallModel(model.config).state_dict()
    if other := sorted(model.state_dict().keys() ^ known.keys()):
        raise ValueError(f"model must have a SmallModel's weights: merge adapters first, got {', '.join(other)}")
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, path, metadata={"config": json.dumps(dataclasses.asdict(model.config))})


def load_small_model(
    path: str | pathlib.Path = SMALL_MODEL, ops: Ops = dsa_ref, **attention: int | float | bool
) -> SmallModel:
    """The trained small model in fp32, ready for inference; keywords replace fields of its DSAConfig.

    Source: trained by `python -m dsa_ref.training.train`; figures/small_model.json has the command, seed and losses.
    Raises: FileNotFoundError where there is no such file, TypeError for an unknown DSAConfig field.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        fields = json.loads(file.metadata()["config"])
        weights = {name: file.get_tensor(name).float() for name in file.keys()}
    if "max_seq_len" in attention and not DSAConfig(**fields["attention"]).yarn:
        attention = {"rope_factor": 1.0} | attention  # trained without YaRN: a length alone must not turn it on
    fields["attention"] = DSAConfig(**(fields["attention"] | attention))
    model = SmallModel(ModelConfig(**fields), ops).float()  # whatever torch's default dtype is
    model.load_state_dict(weights)
    return model.requires_grad_(False)
