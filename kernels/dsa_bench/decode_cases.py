"""The shapes of a decode step that are measured, V3.2's sizes: for each step ours, the peers, and what is right.

B sequences in pages of 64 tokens, N new tokens each, S positions; ours and the peers read the same bytes. A peer's
plan and the table that SGLang wants with an entry a token are made once, outside of what is timed: an engine makes them
once for all layers.
"""

import dataclasses
import functools
import importlib

import torch

import dsa_kernels
import dsa_ref
from dsa_ref import V32, cost

from . import checks, inputs, peers
from .cases import SIZES
from .decode_case import DecodeCase
from .decode_layer import layer_case

POOL = 128 << 10  # rows that sparse attention's random slots are drawn from
MANY = 64  # queries from which on one split is measured too


def attention_flops(config, H):
    """FLOPs of one query with H heads and one selected row."""
    return cost.mqa_flops_per_pair(dataclasses.replace(config, n_heads=H))


def indexer(B, N, S, device="cuda", config=V32):
    """(q_idx, index_pages, w, page_table, lengths), as ours take them, and the free pages."""
    table, lengths, free = inputs.page_table(B, S, device=device)
    q_idx, w, _ = inputs.paged_queries(B, N, 1, device=device, config=config)
    return (q_idx, inputs.index_pages(table, free, config=config), w, table, lengths), free


def score_peers(given):
    """DeepGEMM's scores as {name: callable}; more than two queries a sequence also as sequences of one query."""
    q_idx, index_pages, w, table, lengths = given
    N = q_idx.shape[1]
    theirs = q_idx, index_pages, w, table, checks.seen(lengths, N).contiguous()
    found = {"DeepGEMM": peers.PagedScores(*theirs)}
    return found | ({"DeepGEMM, queries apart": peers.apart(*theirs)} if N > 2 else {})


def scores_case(B, N, S, against=None, device="cuda", config=V32):
    given, _ = indexer(B, N, S, device, config)
    pairs = B * cost.causal_pairs(N, S)
    return DecodeCase(
        work=B * S * cost.index_bytes_per_token(config) + 4 * pairs,
        unit="TB/s",
        ceiling="copy",
        ours={"ours": lambda: dsa_kernels.paged_index_scores(*given)},
        check=lambda scores, own: checks.check_paged_scores(scores.flatten(0, -2), given, cleaned=own),
        peers=score_peers(given),
        against=against,
    )


def topk_case(T, S, device="cuda", config=V32):
    """T sequences of S positions, a query each: the selection from given scores, with its translation to slots."""
    table, lengths, _ = inputs.page_table(T, S, device=device)
    scores = inputs.decode_scores(T, S, device=device)
    k, start = config.index_topk, torch.zeros_like(lengths)
    expected = dsa_ref.select_topk(scores, k, start, lengths)
    mine = DecodeTopk(scores, k, table, lengths)

    def check(result, own):
        if not own:
            return checks.check_selection(result, scores, expected, ties=False)
        redone = mine.redone()
        mine.restore()
        positions, slots = result
        found = checks.positions_at(slots, table, table.numel() + inputs.SPARE, inputs.PAGE)
        if not torch.equal(found, positions.long()):
            raise checks.Wrong("slots are not those of the positions")
        checks.check_selection(positions.flatten(0, 1), scores, expected)
        return f"{redone} rows redone" if redone else ""

    return DecodeCase(
        work=4 * T * S,  # one read of the scores
        unit="TB/s",
        ceiling="copy",
        ours={"ours": mine},
        check=check,
        peers={
            "SGLang": lambda: peers.sglang_topk(scores, lengths, k),
            "torch": lambda: peers.torch_topk(scores, k),
        },
        restore=mine.restore,
    )


class DecodeTopk:
    """The launches inside `dsa_kernels.paged_select`: given scores fp32 [T, S] to (positions, slots), int32 [T, 1, k].

    Rows whose bound was unlucky are redone in the memory of their scores: `restore` gives them back.
    """

    def __init__(self, scores, k, page_table, lengths):
        self.module = importlib.import_module("dsa_kernels.topk.decode")
        T, S = scores.shape
        self.given, self.k, self.page_table, self.lengths = scores, k, page_table, lengths
        self.scores = torch.full((T, self.module.row_stride(S)), torch.nan, device=scores.device)  # read nowhere behind
        self.zeros = torch.zeros(self.module.counters(T, S), dtype=torch.int32, device=scores.device)
        self.restore()

    def __call__(self):
        (T, S), device = self.given.shape, self.given.device
        positions, slots = (torch.empty(T, self.k, dtype=torch.int32, device=device) for _ in range(2))
        self.module.launch(
            self.scores, self.page_table, self.lengths, 1, S, inputs.PAGE, self.k, positions, slots, self.zeros
        )
        return positions.unflatten(0, (T, 1)), slots.unflatten(0, (T, 1))

    def restore(self):
        """Give the scores back."""
        self.scores[:, : self.given.shape[1]] = self.given

    def redone(self):
        """How many rows lost their scores."""
        return int((self.scores[:, : self.given.shape[1]] != self.given).any(dim=1).sum())


def attention_case(B, N, H, rows="FP8", device="cuda", config=V32, pool=POOL):
    """All queries select at random from the same rows, as in the study; rows: "FP8" or "bf16"."""
    table, _, free = inputs.page_table(1, pool, device=device)
    kv_pages = inputs.kv_pages(table, free, rows == "FP8", config=config)
    _, _, q = inputs.paged_queries(B, N, H, device=device, config=config)
    k, v_dim, scale = config.index_topk, config.kv_lora_rank, config.softmax_scale
    slots = inputs.random_slots(B, N, k, table)
    ours = {"ours": lambda: dsa_kernels.paged_sparse_attention(q, kv_pages, slots, scale, v_dim)}
    if rows == "FP8":
        ours["ours, portable"] = lambda: dsa_kernels.paged_sparse_attention(
            q, kv_pages, slots, scale, v_dim, variant="portable"
        )
    if B * N >= MANY:
        ours["ours, 1 split"] = lambda: dsa_kernels.paged_sparse_attention(q, kv_pages, slots, scale, v_dim, splits=1)
    padded = -(-H // peers.FLASHMLA_HEADS) * peers.FLASHMLA_HEADS
    if rows == "FP8":
        decode = peers.FlashMLADecode(q, kv_pages, scale)
        theirs = {"FlashMLA": lambda: decode(slots)}
    else:  # FlashMLA has no sparse decode on bf16 rows; its prefill reads them
        flat_q, flat_kv = peers.padded_heads(q.flatten(0, 1)), kv_pages.flatten(0, 1)
        flat_slots = slots.flatten(0, 1)
        theirs = {
            "FlashMLA prefill": lambda: tuple(
                x.unflatten(0, (B, N)) for x in peers.flashmla_prefill(flat_q, flat_kv, flat_slots, scale)
            )
        }
    return DecodeCase(
        work=attention_flops(config, H) * B * N * k,
        unit="TFLOP/s",
        ceiling="bf16",
        ours=ours,
        check=lambda result, own: checks.check_paged_attention(result, q, kv_pages, slots, scale, v_dim),
        peers=theirs,
        facts={"peer_heads": padded, "pool_rows": pool},
    )


def chain(given, k, q, kv_pages, scale, v_dim, splits=None):
    """Ours from the indexer's vectors to attention's output: (positions, slots, out, lse)."""
    q_idx, index_pages, w, table, lengths = given
    positions, slots = dsa_kernels.paged_select(q_idx, index_pages, w, k, table, lengths)
    return positions, slots, *dsa_kernels.paged_sparse_attention(q, kv_pages, slots, scale, v_dim, splits)


def chain_case(B, N, S, H, device="cuda", config=V32):
    given, free = indexer(B, N, S, device, config)
    q_idx, index_pages, w, table, lengths = given
    kv_pages = inputs.kv_pages(table, free, fp8=True, config=config)
    _, _, q = inputs.paged_queries(B, N, H, device=device, config=config)
    k, v_dim, scale = config.index_topk, config.kv_lora_rank, config.softmax_scale

    def check(result, own):
        positions, slots, out, lse = result
        notes = (
            checks.check_paged_selection(positions, slots, given, inputs.PAGE, own),
            checks.check_paged_attention((out, lse), q, kv_pages, slots, scale, v_dim),
        )
        return "; ".join(filter(None, notes))

    seen = checks.seen(lengths, N).contiguous()
    score = peers.PagedScores(q_idx, index_pages, w, table, seen)
    select = peers.SlotSelection(table, seen, inputs.PAGE)
    attend = peers.FlashMLADecode(q, kv_pages, scale)

    def theirs():
        slots = select(score()).unflatten(0, (B, N))
        return None, slots, *attend(slots)

    ours = {"ours": lambda: chain(given, k, q, kv_pages, scale, v_dim)}
    if B * N >= MANY:
        ours["ours, 1 split"] = lambda: chain(given, k, q, kv_pages, scale, v_dim, splits=1)
    pairs = cost.causal_pairs(N, S)
    selected = cost.causal_pairs(N, S, k)
    return DecodeCase(
        work=B * (cost.index_flops_per_pair(config) * pairs + attention_flops(config, H) * selected),
        unit="TFLOP/s",
        ceiling=None,  # part FP8, part bf16, and for few queries bound by neither
        ours=ours,
        check=check,
        peers={"DeepGEMM + SGLang + FlashMLA": theirs},
        facts={"peer_heads": -(-H // peers.FLASHMLA_HEADS) * peers.FLASHMLA_HEADS},
    )


def _named(make, form, shapes):
    """{name: function that builds the case} of tuples (arguments of make); those in SIZES are written as sizes."""
    return {
        form.format(*shape): functools.partial(make, *(SIZES.get(part, part) for part in shape)) for shape in shapes
    }


ATTENTION = ((1, 1, 16), (8, 1, 16), (1, 1, 128), (8, 1, 128), (64, 1, 128), (128, 1, 128), (128, 2, 128))
DECODE_CASES = {
    "paged_index_scores": _named(
        scores_case,
        "{} x {}, {}",
        (
            *((1, 1, S) for S in ("4K", "32K", "128K", "1M")),
            (8, 1, "128K"),
            (64, 1, "128K"),
            (64, 1, "32K"),
            *((64, N, "32K", "64 x 1, 32K") for N in (2, 3, 4)),
        ),
    ),
    "decode_topk": _named(
        topk_case,
        "{} x {}",
        (
            *((1, S) for S in ("4K", "8K", "32K", "128K", "1M")),
            (8, "128K"),
            (8, "1M"),
            (64, "32K"),
            (64, "128K"),
            (128, "32K"),
        ),
    ),
    "paged_sparse_attention": _named(
        attention_case, "{} x {}, {} heads, {}", [(*shape, rows) for rows in ("FP8", "bf16") for shape in ATTENTION]
    ),
    "decode_chain": _named(
        chain_case,
        "{} x {}, {}, {} heads",
        ((1, 1, "128K", 128), (1, 1, "1M", 128), (8, 1, "128K", 16), (64, 1, "128K", 128), (64, 2, "32K", 128)),
    ),
    "layer_step": _named(layer_case, "{} x 1, {}", ((1, "4K"), (1, "128K"), (1, "1M"), (8, "128K"))),
}
