"""A small byte-level GPT whose attention is `DSALayer`: enough of a language model to watch an indexer learn.

Pre-norm blocks of DSA and a SwiGLU feed-forward, tied embeddings, no special tokens: token = byte.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dsa_ref

from ..config import DSAConfig
from ..contracts import check_dtype, check_queries, check_shapes, values_readable
from ..page_table import Batch, PageTable
from ..paged_cache import PagedCache, SequenceCache
from .cache import LayerCache, all_or_nothing
from .layer import DSALayer, Ops
from .parts import RMSNorm
from .wrapped import is_plain

Cache = LayerCache | SequenceCache
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
        self, x: Tensor, positions: Tensor, cache: Cache | None, attention: str, record: list[dict] | None
    ) -> Tensor:
        """x [T, dim] -> [T, dim]; arguments as for `DSALayer`."""
        return self._feed_forward(x + self.self_attn(self.attention_norm(x), positions, cache, attention, record))

    def decode(self, x: Tensor, cache: PagedCache, batch: Batch, record: list[dict] | None) -> Tensor:
        """x [B, N, dim] -> [B, N, dim]; arguments as for `DSALayer.decode`."""
        return self._feed_forward(x + self.self_attn.decode(self.attention_norm(x), cache, batch, record))

    def _feed_forward(self, x: Tensor) -> Tensor:
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
        caches: list[Cache] | None = None,
        attention: str = "sparse",
        record: list[dict] | None = None,
    ) -> Tensor:
        """tokens: int64 [T]; positions: int [T] as for `DSALayer`, default one sequence (after the cache, if any).

        caches: what `new_caches` returned, or one `PagedCache.sequence` a layer, or None; attention, record: as for
        `DSALayer`, record gets one dict a layer.
        Where the call fails or is interrupted, all caches and the record are what they were.
        Returns logits fp32 [T, vocab_size]. Raises as `DSALayer` does, and ValueError or TypeError for other caches.
        """
        check_shapes(tokens=(tokens, "T"))
        self._check_tokens(tokens)
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

    def decode(
        self,
        tokens: Tensor,
        table: PageTable,
        caches: list[PagedCache],
        sequences: Sequence[int],
        record: list[dict] | None = None,
    ) -> Tensor:
        """The next N tokens of each of B sequences: logits fp32 [B, N, vocab_size] of what follows each.

        tokens: int64 [B, N], N at most 4; table, caches: what `new_paged_caches` returned; sequences: B numbers of the
        table's; record: as for `DSALayer.decode`, one dict a layer. The tokens are part of the sequences afterwards;
        where the call fails or is interrupted, they are not, and the record is what it was.

        Raises: as `PageTable.batch` and `DSALayer.decode` do, ValueError or TypeError for other tokens and caches.
        """
        check_shapes(tokens=(tokens, "B N"))
        self._check_tokens(tokens)
        self._check_paged(table, caches)
        check_queries("tokens", tokens)
        if not isinstance(sequences, Sequence):
            raise TypeError(f"sequences must be a list of ints, got {type(sequences).__name__}")
        if len(tokens) != len(sequences):
            raise ValueError(f"tokens must be those of {len(sequences)} sequences, got shape {list(tokens.shape)}")
        logits = self.decode_batch(tokens, caches, table.batch(sequences, tokens.shape[1]), record)
        table.advance(sequences, tokens.shape[1])
        return logits

    def decode_batch(
        self, tokens: Tensor, caches: list[PagedCache], batch: Batch, record: list[dict] | None = None
    ) -> Tensor:
        """`decode` of a batch that the table made, without committing it, as a `CapturedStep` repeats it."""
        with all_or_nothing([], record):
            x = self.embed(tokens)
            for block, cache in zip(self.layers, caches, strict=True):
                x = block.decode(x, cache, batch, record)
            return F.linear(self.norm(x), self._embedding()).float()

    def new_paged_caches(
        self,
        pages: int,
        sequences: int,
        max_length: int | None = None,
        page_size: int = 64,
        fp8: bool = False,
        splits: int | None = None,
    ) -> tuple[PageTable, list[PagedCache]]:
        """An empty PageTable, and one PagedCache a layer in its pages. max_length: None for the model's max_seq_len.

        fp8: keep latents as FP8 rows, else in the weights' dtype; splits: as for `PagedCache`.

        Raises: as `PageTable` and `PagedCache` do.
        """
        weight, attention = next(self.parameters()), self.config.attention
        longest = attention.max_seq_len if max_length is None else max_length
        table = PageTable(pages, sequences, longest, page_size, weight.device)
        return table, [PagedCache(table, attention, weight.dtype, fp8, splits=splits) for _ in self.layers]

    def _embedding(self) -> Tensor:
        """The rows of all tokens, [vocab_size, dim], with whatever an adapter or hook adds to them."""
        if is_plain(self.embed):
            return self.embed.weight
        return self.embed(torch.arange(self.config.vocab_size, device=next(self.parameters()).device))

    def _check_tokens(self, tokens) -> None:
        """Rows of the embedding, beside it."""
        check_dtype("tokens", tokens, (torch.int64,))
        device, rows = next(self.parameters()).device, self.config.vocab_size
        if tokens.device != device:
            raise ValueError(f"tokens must be on {device} like the model's weights, got {tokens.device}")
        if tokens.numel() and values_readable(tokens):
            low, high = (int(token) for token in torch.aminmax(tokens))
            if low < 0 or high >= rows:
                raise ValueError(f"tokens must lie in [0, vocab_size) = [0, {rows}), got {low if low < 0 else high}")

    def _check_caches(self, caches) -> None:
        """One cache a layer, each another one, all of the same length."""
        if caches is None:
            return
        if not isinstance(caches, (list, tuple)) or not all(isinstance(cache, Cache) for cache in caches):
            raise TypeError("caches must be a list of LayerCache, as new_caches returns it, or None")
        self._check_one_a_layer([cache.cache if isinstance(cache, SequenceCache) else cache for cache in caches])
        if len({cache.length for cache in caches}) > 1:
            raise ValueError(f"caches must hold the same tokens, got lengths {[cache.length for cache in caches]}")
        paged = [cache for cache in caches if isinstance(cache, SequenceCache)]
        if not paged:
            return
        if len(paged) < len(caches) or len({(id(cache.cache.table), cache.sequence) for cache in paged}) > 1:
            raise ValueError("caches must be of one sequence of one table, or all LayerCaches, got others")
        paged[0].cache.table.check_caches([cache.cache for cache in paged])

    def _check_one_a_layer(self, caches) -> None:
        if len(caches) != len(self.layers) or len({id(cache) for cache in caches}) != len(caches):
            distinct = len({id(cache) for cache in caches})
            raise ValueError(f"caches must be {len(self.layers)} distinct ones, one a layer, got {distinct}")

    def _check_paged(self, table, caches) -> None:
        """A table and one paged cache a layer in its pages, each another one."""
        if not isinstance(table, PageTable):
            raise TypeError(f"table must be a PageTable, got {type(table).__name__}")
        if not isinstance(caches, (list, tuple)) or not all(isinstance(cache, PagedCache) for cache in caches):
            raise TypeError("caches must be a list of PagedCache, as new_paged_caches returns it")
        self._check_one_a_layer(caches)
        if any(cache.table is not table for cache in caches):
            raise ValueError("caches must be in the pages of table, got another table's")
        table.check_caches(caches)


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

    The model of the course was trained on windows of 8192 bytes with 256 keys selected; its file selects 64, for texts
    that a notebook can show. `index_topk=256` gives what it was trained with.

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
