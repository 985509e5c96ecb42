"""The report's counts beside what is there: bytes of caches, the most that live in a pass; what a card would run."""

import types
import weakref

import pytest
import rungs
import torch
from conftest import NEEDS_TRITON
from tiny_models import FAMILIES, tiny, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from dsa_ref import DSAConfig, blocks
from dsa_ref.integrations.transformers import attention, machine, make_sparse, memory
from dsa_ref.integrations.transformers.machine import Machine, what_runs
from dsa_ref.integrations.transformers.memory import Sizes

WIDE = {
    "hidden_size": 256,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "index_topk": 64,
}  # beside a few numbers a token
WIDE |= {"mlp_layer_types": ["sparse"] * 3}


def model_and_sizes(family, dtype, **fields):
    """A tiny random model, and what the counts need of it."""
    model = tiny(family, "sdpa", **WIDE | fields).to(dtype)
    config = model.config
    sizes = Sizes(
        DSAConfig.from_hf(config.to_dict()),
        config.num_hidden_layers,
        family == "glm_moe_dsa",
        dtype.itemsize,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        config.intermediate_size,
    )
    return model, sizes


def held(cache):
    """Bytes of a transformers cache."""
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values, layer.indexer_keys)]
    return sum(part.untyped_storage().nbytes() for part in parts if part is not None)


class Live(TorchDispatchMode):
    """Counts the bytes of what is made inside, as long as it lives: `most` of them at once, `largest` of one tensor."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.most, self.largest = {}, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self.sizes:  # no view, and nothing written in place
                    self.sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.gone, key)
                    self.most, self.largest = max(self.most, self.now), max(self.largest, storage.nbytes())
        return out

    def gone(self, key):
        self.now -= self.sizes.pop(key)


@torch.no_grad()
def run(model, B, N, queries):
    """(what lived at most besides the cache, the largest tensor, the cache) of the last `queries` of N tokens."""
    text = tokens(B, N)
    cache = DynamicCache(config=model.config)
    if queries < N:
        model(text[:, :-queries], past_key_values=cache)
    with Live() as live:
        model(text[:, -queries:], past_key_values=cache, logits_to_keep=1)
    return live.most - held(cache), live.largest, cache


@pytest.mark.parametrize("sparse", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("family", FAMILIES)
def test_cache_bytes_are_those_of_a_cache(family, dtype, sparse):
    model, sizes = model_and_sizes(family, dtype)
    if sparse:
        make_sparse(model, index_fp8=True)
    cache = run(model, 2, 80, 80)[2]
    assert held(cache) == 2 * 80 * memory.cache_bytes_per_token(sizes)


FP32, BF16 = torch.float32, torch.bfloat16
PASSES = {  # family, dtype; B, N, queries; the reference's blocks, the layer's blocks; other sizes
    "scores": ("deepseek_v32", BF16, 1, 512, 512, 1 << 24, 1 << 30, {}),
    "scores of two sequences": ("deepseek_v32", FP32, 2, 256, 256, 1 << 24, 1 << 30, {}),
    "blocks of queries": ("glm_moe_dsa", BF16, 1, 512, 512, 1 << 24, 1 << 18, {}),
    "experts": ("deepseek_v32", BF16, 1, 256, 256, 1 << 17, 1 << 18, {"num_experts_per_tok": 4}),
    "wide experts": ("glm_moe_dsa", FP32, 1, 256, 256, 1 << 17, 1 << 18, {"moe_intermediate_size": 400}),
    "lists": ("glm_moe_dsa", FP32, 1, 512, 512, 1 << 18, 1 << 18, {"index_topk": 500, "num_experts_per_tok": 1}),
    "a chunk": ("glm_moe_dsa", BF16, 1, 512, 256, 1 << 24, 1 << 30, {}),
    "all heads of no more than k": (
        "deepseek_v32",
        BF16,
        4,
        64,
        64,
        1 << 24,
        1 << 14,
        {"num_experts_per_tok": 1, "num_attention_heads": 32, "num_key_value_heads": 32},
    ),  # fmt: skip
    "no more than k": ("deepseek_v32", BF16, 2, 64, 64, 1 << 24, 1 << 30, {"num_experts_per_tok": 1}),
}


@pytest.mark.parametrize("name", PASSES)
def test_what_a_pass_takes_is_counted_from_above(name, monkeypatch):
    """From 0.70 to 1.02 of the count when written, 0.61 to 1.02 over both families and dtypes: what is left out are a
    few numbers a token."""
    family, dtype, B, N, queries, pairs, numbers, fields = PASSES[name]
    monkeypatch.setattr(blocks, "pairs_at_once", lambda tensor: pairs)
    monkeypatch.setattr(memory, "REFERENCE_PAIRS", {False: pairs})
    monkeypatch.setattr(memory, "NUMBERS_AT_ONCE", numbers)
    monkeypatch.setattr(attention, "NUMBERS_AT_ONCE", numbers)
    model, sizes = model_and_sizes(family, dtype, **fields)
    counted = memory.prefill(sizes, N, queries, B, kernels=False, cuda=False).most
    share = run(make_sparse(model), B, N, queries)[0] / counted
    print(f"{share:.2f}")
    assert 0.6 < share < 1.04


@pytest.mark.parametrize("queries", (400, 100))
@pytest.mark.parametrize("family", FAMILIES)
def test_what_sdpa_takes_is_counted_from_below(family, queries):
    model, sizes = model_and_sizes(family, torch.float32)
    most, largest, _ = run(model, 1, 400, queries)
    counted = memory.dense_attention(sizes, 400, queries, 1)
    assert largest == 4 * queries * 16 * 400  # one of the two
    assert 1 <= most / counted < 1.3


def test_blocks_are_cut_by_the_same_numbers():
    model, sizes = model_and_sizes("glm_moe_dsa", torch.float32)
    assert memory.numbers_a_query(sizes.config) == make_sparse(model).model.layers[0].self_attn._numbers_a_query()
    for cuda in (False, True):
        assert memory.REFERENCE_PAIRS[cuda] == blocks.pairs_at_once(types.SimpleNamespace(is_cuda=cuda))


@pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)
def test_the_kernels_limits_are_theirs():
    """They are copied, since nothing in dsa_ref imports dsa_kernels."""
    from dsa_kernels import cards, runtime
    from dsa_kernels.hopper import index_scores, lightning_select, sparse_attention

    assert memory.KERNEL_SCORES == runtime.SCORES_AT_ONCE
    assert (machine.OLDEST, machine.NATIVE_FP8, machine.HOPPER) == (cards.OLDEST, cards.NATIVE_FP8, cards.HOPPER)
    assert (index_scores.HEADS.value, index_scores.DIM.value) == machine.HOPPER_INDEXER
    assert lightning_select.LARGEST_LISTED_K == machine.HOPPER_LISTS
    assert (sparse_attention.D, sparse_attention.V) == machine.HOPPER_ROWS


@pytest.mark.parametrize("free, found", ((0, 0), (9, 0), (10, 1), (99, 9), (100, 10), (1000, 10)))
def test_the_longest_that_fits(free, found):
    assert memory.longest(lambda tokens: 10 * tokens, free, 10) == found


V32, GLM = DSAConfig(), DSAConfig(n_heads=64, index_n_heads=32, index_rope="interleaved")
HERE = Machine("2.13.0", "5.23.0", "3.7.1", True, None, "a card", (9, 0), 1, 1 << 30)
CASES = {  # machine, config, dtype, the first call, what it runs
    "Hopper": (
        HERE,
        V32,
        torch.bfloat16,
        "index_fp8=True",
        "scores FP8 and selects at once; Hopper's",
    ),
    "Hopper, GLM": (HERE, GLM, torch.bfloat16, "index_fp8=True", "Hopper's take 64 index heads of 128, got 32 of 128"),
    "Hopper, fp32": (HERE, V32, torch.float32, "index_fp8=True", "portable sparse attention: Hopper's takes bf16"),
    "Blackwell": (HERE._replace(capability=(10, 0)), V32, torch.bfloat16, "index_fp8=True", "FP8 products"),
    "Ampere": (HERE._replace(capability=(8, 0)), V32, torch.bfloat16, "make_sparse(model, dsa_kernels)", "bfloat16"),
    "Volta": (HERE._replace(capability=(7, 0)), V32, torch.float16, "make_sparse(model)", "this GPU has 7.0"),
    "ROCm": (HERE._replace(rocm="6.4"), V32, torch.bfloat16, "make_sparse(model)", "for ROCm 6.4"),
    "no triton": (HERE._replace(triton=None), V32, torch.bfloat16, "make_sparse(model)", "need triton, not found"),
    "no kernels": (HERE._replace(kernels=False), V32, torch.bfloat16, "make_sparse(model)", "need dsa_kernels, not"),
    "a CPU": (HERE._replace(capability=None, card=None, cards=0), V32, torch.bfloat16, "make_sparse(model)", "no GPU"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_would_run(name):
    here, config, dtype, call, what = CASES[name]
    (first, runs), (second, others) = what_runs(here, config, dtype)
    assert call in first and what in runs
    assert ("dsa_kernels" in first) == ("dsa_kernels" in second) == (here.why_not is None)
    assert name != "Ampere" or "widen FP8 to bf16" in others
    assert here.keeps_fp8 == (name not in ("Ampere", "Volta", "a CPU"))
