"""The shapes that are measured, V3.2's sizes throughout: for each step ours, the peers, and what is right.

Work is counted over the pairs that a query sees or has selected (SPEC section 3, `dsa_ref.cost`), not over those a
kernel happens to compute. Inputs are made when a case is built, and freed with it.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch

import dsa_kernels
import dsa_ref
from dsa_ref import V32, cost

from . import checks, inputs, peers

K = V32.index_topk
V = V32.kv_lora_rank
SIZES = {f"{n}K": n << 10 for n in (4, 8, 16, 32, 64, 128, 256, 512)} | {"1M": 1 << 20}


@dataclasses.dataclass
class Case:
    """One shape of one step.

    apply(function) runs ours, `function` taking the place of the step's public function; None where ours has none.
    check(result, who) returns a note or raises `checks.Wrong`; peers: {name: callable}.
    unit: "TFLOP/s" or "TB/s", of `work` FLOPs or bytes; ceiling: the measured ceiling that it compares with, if any.
    """

    work: float
    unit: str
    ceiling: str | None
    apply: Callable | None
    check: Callable
    peers: dict
    facts: dict = dataclasses.field(default_factory=dict)


def index_flops(T, S):
    """FLOPs of scoring all causal pairs of T queries at the end of S positions."""
    return cost.index_flops_per_pair(V32) * cost.causal_pairs(T, S)


def attention_flops(H, selected):
    """FLOPs of attending with H heads to `selected` (query, key) pairs in MQA mode."""
    return cost.mqa_flops_per_pair(dataclasses.replace(V32, n_heads=H)) * selected


def index_scores_case(T, S):
    given = inputs.indexer_inputs(T, S)
    start, end = inputs.causal_ranges(T, S)
    return Case(
        work=index_flops(T, S),
        unit="TFLOP/s",
        ceiling="fp8",
        apply=lambda function: function(*given, start, end),
        check=lambda scores, who: checks.check_scores(scores, given, start, end, cleaned=who == "ours"),
        peers={"DeepGEMM": lambda: peers.deepgemm_scores(*given, start, end)},
    )


def select_topk_case(T, S, distribution):
    scores = inputs.score_matrix(distribution, T, S)
    start, end = inputs.causal_ranges(T, S)
    expected = dsa_ref.select_topk(scores, K, start, end)
    return Case(
        work=scores.element_size() * cost.causal_pairs(T, S),  # one read of the visible scores
        unit="TB/s",
        ceiling="copy",
        apply=lambda function: function(scores, K, start, end),
        check=lambda indices, who: checks.check_selection(indices, scores, expected, ties=who == "ours"),
        peers={
            "SGLang": lambda: peers.sglang_topk(scores, end),
            "torch": lambda: peers.torch_topk(scores, K),
        },
    )


def _peers_selection(given, start, end):
    """DeepGEMM's scores into SGLang's selection, as serving engines chain them: the scores are not cleaned."""
    return peers.sglang_topk(peers.deepgemm_scores(*given, start, end), end)


def lightning_select_case(T, S):
    given = inputs.indexer_inputs(T, S)
    start, end = inputs.causal_ranges(T, S)
    q_idx, k_idx, w, k_scale = given
    return Case(
        work=index_flops(T, S),
        unit="TFLOP/s",
        ceiling="fp8",
        apply=lambda function: function(q_idx, k_idx, w, K, k_scale, start, end),
        check=lambda indices, who: checks.check_lightning(indices, given, start, end, own=who == "ours"),
        peers={"DeepGEMM + SGLang": lambda: _peers_selection(given, start, end)},
    )


def sparse_attention_case(T, S, H, indices="random"):
    """indices: "random", "short" (random, then -1 from a random place in the second half on) or "correlated"."""
    q, kv, scale = inputs.attention_inputs(T, S, H)
    selected = (inputs.correlated_indices if indices == "correlated" else inputs.random_indices)(T, S, K)
    selected = inputs.shortened(selected) if indices == "short" else selected
    padded = peers.padded_heads(q)  # outside of the timing: a model would store its weights padded
    return Case(
        work=attention_flops(H, int((selected >= 0).sum())),
        unit="TFLOP/s",
        ceiling="bf16",
        apply=lambda function: function(q, kv, selected, scale, V),
        check=lambda result, who: checks.check_attention(result, q, kv, selected, scale, V),
        peers={"FlashMLA": lambda: peers.flashmla_prefill(padded, kv, selected, scale)},
        facts={"union_of_4": round(inputs.mean_union(selected), 3), "peer_heads": padded.shape[1]},
    )


def chain(given, start, end, q, kv, scale):
    """Ours from the indexer's vectors to attention's output: (indices, out, lse)."""
    q_idx, k_idx, w, k_scale = given
    indices = dsa_kernels.lightning_select(q_idx, k_idx, w, K, k_scale, start, end)
    return indices, *dsa_kernels.sparse_attention(q, kv, indices, scale, V)


def chain_case(T, S):
    given = inputs.indexer_inputs(T, S)
    start, end = inputs.causal_ranges(T, S)
    q, kv, scale = inputs.attention_inputs(T, S, V32.n_heads)

    def check(result, who):
        indices, out, lse = result
        notes = (
            checks.check_lightning(indices, given, start, end, own=who == "ours"),
            checks.check_attention((out, lse), q, kv, indices, scale, V),
        )
        return "; ".join(filter(None, notes))

    def theirs():
        indices = _peers_selection(given, start, end)
        return indices, *peers.flashmla_prefill(q, kv, indices, scale)

    return Case(
        work=index_flops(T, S) + attention_flops(V32.n_heads, cost.causal_pairs(T, S, K)),
        unit="TFLOP/s",
        ceiling=None,  # part FP8, part bf16
        apply=lambda function: function(given, start, end, q, kv, scale),
        check=check,
        peers={"DeepGEMM + SGLang + FlashMLA": theirs},
    )


def dense_case(S):
    """The other way, for context: dense attention in MHA mode, all S queries of a prefill."""
    H, D = V32.n_heads, V32.qk_nope_head_dim + V32.qk_rope_head_dim
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(H, S, width, device="cuda", dtype=torch.bfloat16, generator=generator)
        for width in (D, D, V32.v_head_dim)
    )
    return Case(
        work=cost.mha_flops_per_pair(V32) * cost.causal_pairs(S, S),
        unit="TFLOP/s",
        ceiling="bf16",
        apply=None,
        check=lambda out, who: checks.check_dense(out, q, k, v, V32.softmax_scale),
        peers={"cuDNN": lambda: peers.cudnn_attention(q, k, v, V32.softmax_scale)},
    )


def _named(make, form, *shapes):
    """{name: function that builds the case}; a shape's third and later entries are passed on as they are."""
    return {form.format(T=T, S=S, rest=rest): functools.partial(make, T, SIZES[S], *rest) for T, S, *rest in shapes}


CASES = {
    "index_scores": _named(index_scores_case, "{T} x {S}", (4096, "32K"), (4096, "128K"), (1024, "1M")),
    "select_topk": _named(
        select_topk_case,
        "{T} x {S} {rest[0]}",
        (4096, "32K", "independent"),
        *((4096, "128K", distribution) for distribution in inputs.DISTRIBUTIONS),
        (8, "1M", "independent"),
        (512, "1M", "independent"),
    ),
    "lightning_select": _named(lightning_select_case, "{T} x {S}", (4096, "32K"), (4096, "128K"), (1024, "1M")),
    "sparse_attention": _named(
        sparse_attention_case,
        "{T} x {S}, {rest[0]} heads, {rest[1]}",
        (4096, "8K", 128, "random"),
        (4096, "32K", 128, "random"),
        (4096, "128K", 128, "random"),
        (4096, "32K", 128, "short"),
        (4096, "32K", 64, "random"),
        (4096, "32K", 16, "random"),
        (4096, "32K", 16, "correlated"),
        (4096, "128K", 16, "correlated"),
    ),
    "chain": _named(chain_case, "{T} x {S}", (4096, "32K"), (4096, "128K"), (1024, "1M"))
    | {"dense MHA mode, 32K x 32K": functools.partial(dense_case, SIZES["32K"])},
}


def public_function(step):
    """What `Case.apply` gets where ours itself is measured."""
    return chain if step == "chain" else getattr(dsa_kernels, step)
