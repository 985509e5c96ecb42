"""What each step must compute and read, counted from a config before anything is timed.

A multiply and an add are two FLOPs. `prefill_cost` and `decode_bytes` have the steps whose cost grows with the context:
scoring, the two products of attention, cache reads. `matrices` has the rest of a layer; `dsa_ref.bill` makes seconds
and money of all of it.

Source: SPEC sections 2, 3 and 6.
"""

import dataclasses
import math

from .config import DSAConfig
from .contracts import check_count

FP8_BLOCK = 128  # latent elements that share one scale in the FP8 cache
SCALE_BYTES = 4  # an fp32 scale
BF16_BYTES = 2


def index_flops_per_pair(config: DSAConfig) -> int:
    """One query against one key in the indexer: Hi dot products of width Di."""
    return 2 * config.index_n_heads * config.index_head_dim


def mqa_flops_per_pair(config: DSAConfig) -> int:
    """One query against one key in absorbed (MQA) mode: H dots of width D, H value rows of the latent's width."""
    return 2 * config.n_heads * (config.latent_dim + config.kv_lora_rank)


def mha_flops_per_pair(config: DSAConfig) -> int:
    """One query against one key in decompressed (MHA) mode: H dots of width nope + rope, H value rows."""
    return 2 * config.n_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)


def matrices(config: DSAConfig) -> dict[str, int]:
    """Elements of each matrix of a layer; every token costs twice as many FLOPs in each.

    "kv_b" is W_UK and W_UV together. What begins with "index_" is the indexer's; dense attention has none of it.
    """
    c = config
    return {
        "q_a": c.dim * c.q_lora_rank,
        "q_b": c.q_lora_rank * c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim),
        "kv_a": c.dim * c.latent_dim,
        "kv_b": c.kv_lora_rank * c.n_heads * (c.qk_nope_head_dim + c.v_head_dim),
        "o": c.n_heads * c.v_head_dim * c.dim,
        "index_q": c.q_lora_rank * c.index_n_heads * c.index_head_dim,
        "index_k": c.dim * c.index_head_dim,
        "index_weights": c.dim * c.index_n_heads,
    }


def causal_pairs(T: int, S: int, limit: int | None = None) -> int:
    """(query, key) pairs of T queries at the end of S positions, each row counted up to `limit` keys (None: all).

    Row t sees n = S - T + t + 1 keys, so the rows see S - T + 1, ..., S of them: the exact sum of min(n, limit).

    Raises: TypeError for anything but ints, ValueError for a value below 1 or T > S.
    """
    limit = S if limit is None else limit
    for name, count in (("T", T), ("S", S), ("limit", limit)):
        check_count(name, count)
    if T > S:
        raise ValueError(f"T must be at most S = {S}: the queries are the last T positions, got {T}")
    least = S - T + 1
    uncapped = max(0, min(S, limit) - least + 1)  # rows that see no more than `limit` keys
    return uncapped * (2 * least + uncapped - 1) // 2 + (T - uncapped) * limit


@dataclasses.dataclass(frozen=True)
class PrefillCost:
    """FLOPs of one layer's prefill. `dense` is dense attention in MHA mode, `dense_mqa` the same in MQA mode."""

    indexer: int
    sparse: int
    dense: int
    dense_mqa: int

    @property
    def dsa(self) -> int:
        """Indexer and sparse attention together."""
        return self.indexer + self.sparse


def prefill_cost(config: DSAConfig, T: int, S: int) -> PrefillCost:
    """FLOPs of T queries at the end of S positions, every causal pair counted, with min(k, visible) selected a row."""
    visible = causal_pairs(T, S)
    return PrefillCost(
        indexer=index_flops_per_pair(config) * visible,
        sparse=mqa_flops_per_pair(config) * causal_pairs(T, S, config.index_topk),
        dense=mha_flops_per_pair(config) * visible,
        dense_mqa=mqa_flops_per_pair(config) * visible,
    )


def index_bytes_per_token(config: DSAConfig) -> int:
    """One token in the index cache: Di e4m3 values and a scale (132 in V3.2), or Di bf16 values without FP8."""
    Di = config.index_head_dim
    return Di + SCALE_BYTES if config.index_fp8 else BF16_BYTES * Di


def fp8_kv_bytes_per_token(config: DSAConfig) -> int:
    """One token in the FP8 KV cache: e4m3 latent, a scale for each 128 of it, bf16 RoPE part (656 in V3.2)."""
    scales = math.ceil(config.kv_lora_rank / FP8_BLOCK)
    return config.kv_lora_rank + SCALE_BYTES * scales + BF16_BYTES * config.qk_rope_head_dim


def bf16_kv_bytes_per_token(config: DSAConfig) -> int:
    """One token in the bf16 KV cache (1152 in V3.2)."""
    return BF16_BYTES * config.latent_dim


def head_bytes_per_token(config: DSAConfig) -> int:
    """One token's keys and values of all heads, as MHA mode reads them, in bf16 (81,920 in V3.2)."""
    return BF16_BYTES * config.n_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)


def check_config(config: object) -> None:
    """``config`` must be a DSAConfig."""
    if not isinstance(config, DSAConfig):
        raise TypeError(f"config must be a DSAConfig, got {type(config).__name__}")


def gathered_bytes_per_token(config: DSAConfig) -> int:
    """One token's rows as ranks gather them: a latent row in bf16 and an index row (1284 in V3.2, 1408 all in bf16)."""
    check_config(config)
    return bf16_kv_bytes_per_token(config) + index_bytes_per_token(config)


def gathered_bytes(config: DSAConfig, S: int, size: int) -> int:
    """Bytes that each of `size` ranks receives where the rows of S tokens are gathered, ceil(S / size) of each rank.

    Raises: TypeError for another config or counts that are no ints, ValueError for a count below 1.
    """
    for name, count in (("S", S), ("size", size)):
        check_count(name, count)
    return (size - 1) * gathered_bytes_per_token(config) * -(-S // size)


def sharded_bytes(config: DSAConfig, T: int, S: int, size: int) -> dict[str, int]:
    """Bytes that each rank receives where T tokens attend to sharded keys, S with themselves: {"candidates", "parts"}.

    candidates: min(k, S) places and scores of 4 bytes each a token and rank; parts: out and its log-sum-exp, in fp32.

    Raises: as `gathered_bytes`, and ValueError for T > S.
    """
    check_config(config)
    for name, count in (("T", T), ("S", S), ("size", size)):
        check_count(name, count)
    if T > S:
        raise ValueError(f"T must be at most S = {S}: the queries are the last T positions, got {T}")
    part = config.n_heads * (config.kv_lora_rank + 1) * 4
    return {"candidates": (size - 1) * T * 8 * min(config.index_topk, S), "parts": (size - 1) * T * part}


@dataclasses.dataclass(frozen=True)
class DecodeBytes:
    """Bytes that one decode step of one layer reads from its caches. `dense` is the whole KV cache."""

    index: int
    selected: int
    dense: int

    @property
    def dsa(self) -> int:
        """Index cache and selected rows together."""
        return self.index + self.selected


def decode_bytes(config: DSAConfig, S: int) -> DecodeBytes:
    """Bytes read by one query that sees S tokens: the index cache of all, FP8 KV rows of min(k, S) of them."""
    check_count("S", S)
    row = fp8_kv_bytes_per_token(config)
    selected = min(config.index_topk, S)
    return DecodeBytes(index=index_bytes_per_token(config) * S, selected=row * selected, dense=row * S)


def break_even_prefill(config: DSAConfig) -> float:
    """Mean context above which DSA takes fewer FLOPs than dense MHA-mode attention (some 8.7 K tokens in V3.2).

    Exact where every query sees at least k keys. inf: never; 0: always.
    """
    return _break_even(config, index_flops_per_pair(config), mqa_flops_per_pair(config), mha_flops_per_pair(config))


def break_even_decode(config: DSAConfig) -> float:
    """Context above which one decode step takes fewer FLOPs than dense MQA attention (some 2.2 K tokens in V3.2)."""
    return _break_even(config, index_flops_per_pair(config), mqa_flops_per_pair(config), mqa_flops_per_pair(config))


def break_even_decode_bytes(config: DSAConfig) -> float:
    """Context above which one decode step reads fewer bytes than dense attention (some 2.6 K tokens in V3.2)."""
    row = fp8_kv_bytes_per_token(config)
    return _break_even(config, index_bytes_per_token(config), row, row)


def _break_even(config: DSAConfig, scan: int, selected: int, dense: int) -> float:
    """The context c where scan · c + selected · min(k, c) = dense · c."""
    if scan + selected < dense:
        return 0.0
    if scan >= dense:
        return math.inf
    return selected * config.index_topk / (dense - scan)


def decode_bytes_ceiling(config: DSAConfig) -> float:
    """The limit of dense / DSA bytes for an endless context: every token's index entry must be read (4.97 in V3.2)."""
    return fp8_kv_bytes_per_token(config) / index_bytes_per_token(config)


def roofline_seconds(flops: float, bytes: float, flops_per_second: float, bytes_per_second: float) -> float:
    """The least time in seconds for this work: the longer of computing and moving, as if they overlapped fully.

    Raises: ValueError for negative work or a rate that is not positive.
    """
    for name, work in (("flops", flops), ("bytes", bytes)):
        if not work >= 0:
            raise ValueError(f"{name} must be at least 0, got {work}")
    for name, rate in (("flops_per_second", flops_per_second), ("bytes_per_second", bytes_per_second)):
        if not rate > 0:
            raise ValueError(f"{name} must be positive, got {rate}")
    return max(flops / flops_per_second, bytes / bytes_per_second)


def dollars_per_million(ms_per_1000: float, layers: int, price: float) -> float:
    """What a million tokens cost, in whatever `price` is: milliseconds of one layer for 1000 tokens, on one GPU.

    1 ms for 1000 tokens is 1 s for a million. price: of a GPU for an hour. Only what is counted costs: here, attention.

    Raises: ValueError for negative or infinite numbers, and as `check_count` for layers.
    """
    check_count("layers", layers)
    for name, value in (("ms_per_1000", ms_per_1000), ("price", price)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    return ms_per_1000 * layers * price / 3600
