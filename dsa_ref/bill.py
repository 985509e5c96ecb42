"""How long one layer takes on a card, predicted part by part, and what that costs.

A part takes the time of its kernels to start, and then its FLOPs or its bytes, whichever takes longer, at the speed
that this kind of work attains on the card:

    seconds = launches · launch + max(flops / rate, bytes / bandwidth)

`cost` counts the work. A `Card` holds the speeds, the same at every context and in every batch. Most of them are within
10 % of what one or two rows of the record attained (tests/steps/test_bill.py says which); the rest were chosen so that
all rows come out right: 14 numbers for some 80 rows, none of them for a single row.

What this leaves out: where in memory the selected rows lie (rows near each other are fetched faster), what the host
does while the card waits, and the card's clock. Dense decode attains 750 TFLOP/s in short steps and 650 in long ones;
the model takes 690 for both, and steps of 4 ms may take a fifth longer than it says.

Source: SPEC sections 2, 3 and 6; figures/layer_h200.json.
"""

import dataclasses
from collections.abc import Callable

from .config import DSAConfig
from .contracts import check_count
from .cost import (
    BF16_BYTES,
    bf16_kv_bytes_per_token,
    causal_pairs,
    decode_bytes,
    index_flops_per_pair,
    matrices,
    mha_flops_per_pair,
    mqa_flops_per_pair,
)

PREFILL = ("DSA", "dense, heads made", "dense, heads kept")
DECODE = ("DSA", "dense")


@dataclasses.dataclass(frozen=True)
class Card:
    """What each kind of work attains on a card: FLOPs a second, bytes a second, seconds.

    Raises: TypeError for speeds that are no numbers, ValueError for a rate that is not positive or negative
    seconds.
    """

    name: str
    products: float  # FLOPs/s: a prefill's matrix products
    scores: float  # FLOPs/s: a prefill's scores, in FP8
    choose: float  # s a row: a prefill's top-k, besides the scores
    sparse: float  # FLOPs/s: a prefill's attention to selected rows, MQA mode
    heads: float  # FLOPs/s: attention to all keys, MHA mode
    small: float  # bytes/s: a prefill's norms, RoPE, FP8, cache writes and merges
    memory: float  # bytes/s: weights and caches of a decode step
    launch: float  # s: a kernel of a decode step, from the end of the one before to its own work
    scan: float  # keys/s: decode's top-k in one row, by as many programs as a row gets
    scans: float  # keys/s: decode's top-k in all rows together
    passes: float  # s: decode's top-k besides, where a row has more keys than one program sorts
    gather: float  # s: decode's attention to selected rows besides: find them, merge the parts
    sparse_decode: float  # FLOPs/s: decode's attention to selected rows
    spread: float  # s: decode's attention to all rows besides: fill the card, merge the parts
    dense_decode: float  # FLOPs/s: decode's attention to all rows

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{field.name} must be a number, got {value!r}")
            seconds = field.name in ("choose", "launch", "passes", "gather", "spread")  # of which none may be needed
            if not (value > 0 or seconds and value == 0):
                raise ValueError(f"{field.name} must be {'at least 0' if seconds else 'positive'}, got {value}")


H200 = Card(
    name="NVIDIA H200",
    products=700e12, scores=1035e12, choose=140e-9, sparse=620e12, heads=610e12, small=1.2e12,
    memory=3.9e12, launch=2.6e-6, scan=75e9, scans=200e9, passes=12e-6,
    gather=13e-6, sparse_decode=135e12, spread=22e-6, dense_decode=690e12,
)  # fmt: skip

SORTED = 4096  # keys of a row that one program of decode's top-k takes at once
LAUNCHES = {"DSA": {"products": 13, "small": 6}, "dense": {"products": 9, "small": 4}}  # of a decode step


def prefill_seconds(config: DSAConfig, T: int, S: int, attention: str = "DSA", card: Card = H200) -> dict[str, float]:
    """{part: seconds} of one layer's chunk of a prefill: T tokens at the end of S positions, weights in bf16.

    attention: "DSA", whose rows that see at most k keys attend to all of them in MHA mode without scores; "dense, heads
    made", MHA mode on keys and values of all heads that are made of the S cached latents in each chunk; "dense, heads
    kept", the same where they stay in memory, `cost.head_bytes_per_token` each. Neither launches nor the reading of
    weights are counted, which a long chunk hides: for one of fewer than some hundreds of tokens this says too little.

    Raises: TypeError for counts that are no ints, ValueError for a count below 1, T > S, or another attention.
    """
    pairs = causal_pairs(T, S)
    if attention not in PREFILL:
        raise ValueError(f"attention must be one of {PREFILL}, got {attention!r}")
    every = matrices(config)
    indexer = sum(size for name, size in every.items() if name.startswith("index_"))
    new = sum(every.values()) - indexer - every["kv_b"]  # of these, each new token is multiplied with
    small = small_bytes(config)
    if attention != "DSA":
        made = T if attention == "dense, heads kept" else S
        moved = (
            small["dense"] * T + BF16_BYTES * config.n_heads * config.qk_rope_head_dim * made
        )  # RoPE's, to each head
        if T < S:  # the earlier keys are a call of their own: two outputs are read, one is written
            moved += 3 * BF16_BYTES * config.n_heads * config.v_head_dim * T
        return {
            "products": 2 * (new * T + every["kv_b"] * made) / card.products,
            "attention": mha_flops_per_pair(config) * pairs / card.heads,
            "small": moved / card.small,
        }
    whole = max(0, min(T, config.index_topk - (S - T)))  # rows that see at most k keys
    unscored = causal_pairs(whole, S - T + whole) if whole else 0
    selected = causal_pairs(T, S, config.index_topk) - unscored
    return {
        "products": 2 * (new + indexer + every["kv_b"]) * T / card.products,
        "scores and selection": index_flops_per_pair(config) * (pairs - unscored) / card.scores
        + card.choose * (T - whole),
        "attention": mqa_flops_per_pair(config) * selected / card.sparse
        + mha_flops_per_pair(config) * unscored / card.heads,
        "small": small["DSA"] * T / card.small,
    }


def small_bytes(config: DSAConfig) -> dict[str, int]:
    """Bytes that norms, RoPE, quantisation and cache writes read and write for a token: {"dense", "DSA"}."""
    c = config
    latents = 2 * BF16_BYTES * (c.q_lora_rank + c.latent_dim)  # normed, turned, stored
    queries = 2 * BF16_BYTES * c.n_heads * c.qk_rope_head_dim  # turned
    index = (BF16_BYTES + 1) * (c.index_n_heads + 1) * c.index_head_dim  # turned, and stored in a byte each
    return {"dense": latents + queries, "DSA": latents + queries + index}


def decode_seconds(config: DSAConfig, B: int, S: int, attention: str = "DSA", card: Card = H200) -> dict[str, float]:
    """{part: seconds} of one layer's decode step: one new token of each of B sequences, which sees S tokens.

    Replayed from a CUDA graph; weights in bf16, FP8 rows for DSA. attention: "DSA", or "dense", MQA mode on all rows
    in bf16, by a kernel that FLOPs bound.

    Raises: TypeError for counts that are no ints, ValueError for a count below 1 or another attention.
    """
    for name, count in (("B", B), ("S", S)):
        check_count(name, count)
    if attention not in DECODE:
        raise ValueError(f"attention must be one of {DECODE}, got {attention!r}")
    every = matrices(config)
    indexer = sum(size for name, size in every.items() if name.startswith("index_"))
    pair, read = mqa_flops_per_pair(config), decode_bytes(config, S)
    if attention == "dense":
        rows = bf16_kv_bytes_per_token(config) * S
        return {
            "products": step(card, LAUNCHES[attention]["products"], BF16_BYTES * (sum(every.values()) - indexer)),
            "attention": card.spread + step(card, 2, B * rows, B * pair * S / card.dense_decode),
            "small": step(card, LAUNCHES[attention]["small"], 0),
        }
    chosen = max(S / card.scan, B * S / card.scans)
    return {
        "products": step(card, LAUNCHES[attention]["products"], BF16_BYTES * sum(every.values())),
        "scores": step(card, 1, B * read.index),
        "selection": step(card, 2, 0, card.passes + chosen) if S > SORTED else step(card, 2, 0),
        "attention": card.gather
        + step(card, 2, B * read.selected, B * pair * min(S, config.index_topk) / card.sparse_decode),
        "small": step(card, LAUNCHES[attention]["small"], 0),
    }


def step(card: Card, launches: int, size: float, seconds: float = 0.0) -> float:
    """Seconds of a part of a decode step that moves `size` bytes, and meanwhile computes for `seconds`."""
    return launches * card.launch + max(size / card.memory, seconds)


def prompt_seconds(
    config: DSAConfig, tokens: int, attention: str = "DSA", chunk: int = 4096, card: Card = H200
) -> float:
    """Seconds of one layer's prefill of a whole prompt, chunk after chunk, the last one as long as what is left."""
    for name, count in (("tokens", tokens), ("chunk", chunk)):
        check_count(name, count)
    ends = [*range(chunk, tokens, chunk), tokens]
    return sum(
        sum(prefill_seconds(config, min(chunk, end - first), end, attention, card).values())
        for first, end in zip([0, *ends], ends, strict=False)
    )


def pays_from(
    dsa: Callable[[int], float], dense: Callable[[int], float], times: float = 1.0, most: int = 2**24
) -> int | None:
    """The smallest position at which `dense` costs at least `times` as much as `dsa`, None if not even `most` does.

    dsa, dense: the cost at a position, such that dense / dsa grows with it. 1.0 asks where DSA stops losing, 2.0 where
    half the cost is reached.

    Raises: ValueError for times that is not positive.
    """
    check_count("most", most)
    if not times > 0:
        raise ValueError(f"times must be positive, got {times}")

    def pays(position):
        return dense(position) >= times * dsa(position)

    if not pays(most):
        return None
    low, high = 0, most  # high pays, low does not: nobody asks for position 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high
