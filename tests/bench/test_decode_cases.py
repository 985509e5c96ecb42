"""The bench of a decode step without a GPU: the inputs that it makes, what it calls wrong, and how peers are called."""

import dataclasses
import importlib
import types

import pytest
import rungs
import torch
from conftest import NEEDS_TRITON

import dsa_ref
from dsa_ref import DSAConfig, cost
from dsa_ref.config import V32

pytestmark = pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)

SMALL = DSAConfig(
    dim=64, n_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    index_n_heads=4, index_head_dim=16, index_topk=24,
)  # fmt: skip


@pytest.fixture
def bench():
    """`bench("inputs")` is `dsa_bench.inputs`, imported where triton is known to be there."""
    return lambda name: importlib.import_module(f"dsa_bench.{name}")


@pytest.fixture
def reference(bench, monkeypatch):
    """The reference in the place of the kernels."""

    def attention(*args, variant=None, **kwargs):
        return dsa_ref.paged_sparse_attention(*args, **kwargs)

    steps = types.SimpleNamespace(**vars(dsa_ref) | {"paged_sparse_attention": attention})
    for name in ("decode_cases", "decode_bytes", "checks", "inputs"):
        monkeypatch.setattr(bench(name), "dsa_kernels", steps)

    class Topk(bench("decode_cases").DecodeTopk):
        def __call__(self):
            start = torch.zeros_like(self.lengths)
            positions = dsa_ref.select_topk(self.given, self.k, start, self.lengths)
            pages = self.page_table.gather(1, positions.clamp(min=0).long() // 64)
            slots = (pages * 64 + positions % 64).masked_fill(positions < 0, -1)
            return positions[:, None], slots[:, None]

    monkeypatch.setattr(bench("decode_cases"), "DecodeTopk", Topk)


def small_cases(bench, device="cpu"):
    cases, small = bench("decode_cases"), {"device": device, "config": SMALL}
    return {
        "scores": lambda: cases.scores_case(5, 2, 200, **small),
        "topk": lambda: cases.topk_case(3, 200, **small),
        "FP8": lambda: cases.attention_case(2, 3, 4, "FP8", pool=200, **small),
        "bf16": lambda: cases.attention_case(2, 1, 4, "bf16", pool=200, **small),
        "chain": lambda: cases.chain_case(2, 2, 200, 4, **small),
        "bytes": lambda: bench("decode_bytes").case(200, splits=(2, 5), **small),
    }


NAMES = ("scores", "topk", "FP8", "bf16", "chain", "bytes")


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_right_in_every_case(bench, reference, name):
    case = small_cases(bench)[name]()
    for who, call in case.ours.items():
        assert case.check(call(), True) == "", who
    assert case.work > 0 and all(callable(peer) for peer in case.peers.values())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_wrong_is_found(bench, reference, name):
    """Each tensor of a result in turn: one value off, and what poisoned memory holds where nothing was written."""
    case, Wrong = small_cases(bench)[name](), bench("checks").Wrong
    right = bench("decode").parts(next(iter(case.ours.values()))())
    for i, part in enumerate(right):
        for value in (part.flatten()[0] + 1, torch.nan if part.is_floating_point() else torch.iinfo(part.dtype).max):
            broken = [x.clone() for x in right]
            broken[i].view(-1)[0] = value
            with pytest.raises(Wrong):
                case.check(broken[0] if len(broken) == 1 else broken, True)


@pytest.mark.parametrize("name", ["scores", "topk", "FP8", "bf16", "chain", "bytes"])
def test_the_kernels_are_right_in_small_cases(bench, device, name):
    case = small_cases(bench, device)[name]()
    for who, call in case.ours.items():
        assert case.check(call(), True) == "", who


def test_rows_that_lose_their_scores_get_them_back(bench, device):
    case = small_cases(bench, device)["topk"]()
    mine = case.ours["ours"]
    right = mine()
    mine.scores[1, 5:9] = 0.0
    assert mine.redone() == 1 and case.check(right, True) == "1 rows redone"
    assert mine.redone() == 0 and case.check(right, True) == ""


def test_an_unclean_score_is_wrong_for_ours_alone(bench, reference):
    case = small_cases(bench)["scores"]()
    scores = case.ours["ours"]()
    scores[0, 0, 199] = 3.0  # the first of two queries does not see the last position
    assert case.check(scores.flatten(0, 1), False) == ""
    with pytest.raises(bench("checks").Wrong, match="invisible key"):
        case.check(scores, True)


def test_a_peers_selection_is_judged_by_its_slots(bench, reference):
    case = small_cases(bench)["chain"]()
    positions, slots, out, lse = case.ours["ours"]()
    assert case.check((None, slots, out, lse), False) == ""
    assert case.check((None, slots, out, lse * 1.4426950408889634), False) == "lse in base 2"
    with pytest.raises(bench("checks").Wrong, match="range"):
        case.check((None, slots.flip(0), out.flip(0), lse.flip(0)), False)  # each the other sequence's
    with pytest.raises(bench("checks").Wrong, match="0 % of slots|% of slots are those of the positions"):
        case.check((positions.flip(2), slots, out, lse), True)


def test_positions_at_slots(bench):
    table = torch.tensor([[5, 2], [0, 3]], dtype=torch.int32)
    slots = torch.tensor(
        [[[20, 11, -1]], [[3, 20, 99]]], dtype=torch.int32
    )  # pages of 4: 5·4, 2·4+3; 0·4+3, not its own
    assert bench("checks").positions_at(slots, table, 6, 4).tolist() == [[[0, 7, -1]], [[3, 8, 8]]]


def test_pages_hold_what_the_reference_reads(bench, device):
    inputs = bench("inputs")
    table, lengths, free = inputs.page_table(3, 150, device=device)
    assert table.shape == (3, 3) and lengths.tolist() == [150] * 3
    assert sorted([*table.flatten().tolist(), *free.tolist()]) == list(range(3 * 3 + inputs.SPARE))
    assert torch.equal(table, inputs.page_table(3, 150, device=device)[0])
    values, scales = dsa_ref.unpack_index(inputs.index_pages(table, free, config=SMALL), SMALL.index_head_dim)
    values, scales = values.float().unflatten(0, (-1, 64)), scales.unflatten(0, (-1, 64))
    assert values[free].isnan().all() and scales[free].isnan().all()
    assert values[table.long()].isfinite().all() and (scales[table.long()] > 0).all()
    assert 0.5 < (values * scales[..., None])[table.long()].std() < 1.5
    for fp8 in (True, False):
        pages = inputs.kv_pages(table, free, fp8, config=SMALL)
        rows = dsa_ref.unpack_kv(pages, SMALL.kv_lora_rank) if fp8 else pages.float()
        assert rows.shape[1:] == (64, SMALL.latent_dim) and pages.dtype == (torch.uint8 if fp8 else torch.bfloat16)
        assert rows[free].isnan().all() and 0.9 < rows[table.long()].std() < 1.1


def test_pages_are_made_some_at_a_time(bench, device, monkeypatch):
    inputs = bench("inputs")
    table, _, free = inputs.page_table(2, 500, device=device)
    monkeypatch.setattr(inputs, "AT_ONCE", 3 * 64 * SMALL.index_head_dim)
    assert (inputs.index_pages(table, free, config=SMALL)[table.long()] != 0xFF).any(dim=-1).all()
    assert inputs.kv_pages(table, free, False, config=SMALL).shape == (2 * 8 + inputs.SPARE, 64, SMALL.latent_dim)


def test_random_slots_are_distinct_and_in_the_table(bench, device):
    inputs = bench("inputs")
    table, _, free = inputs.page_table(1, 640, device=device)
    slots = inputs.random_slots(3, 2, 100, table)
    assert slots.dtype == torch.int32 and slots.shape == (3, 2, 100)
    assert (slots.flatten(0, 1).sort(dim=1).values.diff(dim=1) > 0).all()
    assert not torch.isin(slots // 64, free).any() and torch.isin(slots // 64, table).all()


def test_the_shapes_are_those_that_are_asked_for(bench):
    cases = bench("decode_cases").DECODE_CASES
    assert {"1 x 1, 4K", "1 x 1, 1M", "8 x 1, 128K", "64 x 1, 128K", "64 x 2, 32K", "64 x 4, 32K"} <= set(
        cases["paged_index_scores"]
    )
    assert {"1 x 4K", "1 x 1M", "8 x 128K", "8 x 1M", "64 x 32K", "64 x 128K", "128 x 32K"} <= set(cases["decode_topk"])
    for rows in ("FP8", "bf16"):
        assert f"128 x 2, 128 heads, {rows}" in cases["paged_sparse_attention"]
    assert {"1 x 1, 1M, 128 heads", "8 x 1, 128K, 16 heads"} <= set(cases["decode_chain"])
    for step in cases.values():  # what a case is set against was measured before it
        names = list(step)
        for i, make in enumerate(step.values()):
            assert all(part in names[:i] for part in make.args if isinstance(part, str) and " x " in part)


def test_work_is_that_of_the_cost_model(bench, reference):
    made = {name: make() for name, make in small_cases(bench).items()}
    read = cost.decode_bytes(SMALL, 200)
    assert made["scores"].work == 5 * read.index + 4 * 5 * (199 + 200)
    assert made["topk"].work == 4 * 3 * 200
    assert made["FP8"].work == cost.mqa_flops_per_pair(SMALL) * 6 * 24
    assert made["chain"].work == 2 * (cost.index_flops_per_pair(SMALL) * 399 + cost.mqa_flops_per_pair(SMALL) * 48)
    wide = dataclasses.replace(V32, n_heads=16)
    assert bench("decode_cases").attention_flops(V32, 16) == cost.mqa_flops_per_pair(wide)


def test_three_queries_are_also_asked_one_by_one(bench, reference):
    cases = bench("decode_cases")
    given, _ = cases.indexer(2, 3, 200, "cpu", SMALL)
    found = cases.score_peers(given)
    assert list(found) == ["DeepGEMM", "DeepGEMM, queries apart"]
    one = found["DeepGEMM, queries apart"]
    assert one.q_idx.shape == (6, 1, 4, 16) and one.w.shape == (6, 4) and one.page_table.shape == (6, 4)
    assert one.seen.tolist() == [[198], [199], [200]] * 2 and torch.equal(one.page_table[4], given[3][1])
    assert list(cases.score_peers(cases.indexer(2, 2, 200, "cpu", SMALL)[0])) == ["DeepGEMM"]


def test_sglangs_table_has_an_entry_a_token(bench):
    table = torch.tensor([[5, 2], [0, 3]], dtype=torch.int32)
    made = bench("peers").SlotSelection(table, torch.full((2, 3), 7, dtype=torch.int32), 4)
    assert made.tokens.tolist() == [[20, 21, 22, 23, 8, 9, 10, 11], [0, 1, 2, 3, 12, 13, 14, 15]]
    assert made.starts.tolist() == [0, 3, 6] and made.lengths.tolist() == [7] * 6


def test_flashmla_gets_its_plan_back(bench, monkeypatch):
    """The first call makes it; its heads are padded; its lse [B, H, N] becomes [B, N, H]."""
    peers, seen = bench("peers"), []

    class Op:
        @staticmethod
        def default(*arguments):
            seen.append(arguments)
            return torch.zeros(2, 3, 64, 5), torch.zeros(2, 64, 3), "plan", "splits"

    monkeypatch.setattr(peers, "_sgl_kernel", lambda library, op: Op)
    q, kv = torch.randn(2, 3, 16, 40), torch.zeros(4, 64, 56, dtype=torch.uint8)
    decode = peers.FlashMLADecode(q, kv, 0.5)
    for _ in range(2):
        out, lse = decode("slots")
        assert lse.shape == (2, 3, 64)
    assert seen[0][0].shape == (2, 3, 64, 40) and seen[0][1].shape == (4, 64, 1, 56)
    assert seen[0][2:] == ("slots", None, None, None, None, None, None, None, 512, 0.5)
    assert seen[1][5:7] == ("plan", "splits")


def test_missing_peers_say_so_when_they_are_called(bench, monkeypatch, reference):
    peers = bench("peers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for load in (peers._deep_gemm, peers._sgl_kernel):
        load.cache_clear()
    for name, make in small_cases(bench).items():
        for who, call in (pair for pair in make().peers.items() if pair[0] != "torch"):
            with pytest.raises(peers.Missing, match="needs a CUDA GPU|takes k = 2048 only"):
                call()
            assert who and name
