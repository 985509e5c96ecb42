"""Decode over pages: the same answers as over contiguous rows, to the bit where the contract says so.

Pools are made of 0xff bytes, NaN in every layout, and hold the sequences' tokens and nothing else. So every test here
fails for a step that reads behind a sequence's end, in a page of nobody's or in one that was freed.
"""

import re

import numpy as np
import pytest
import rungs
import torch
from inputs import (
    E4M3,
    FP8_SUMS,
    assert_close,
    assert_same_bits,
    assert_scores_close,
    exact_scores,
    from_byte,
    normal,
    page_tables,
    seen_by,
    selected,
    slots_in,
    small_integers,
)

import dsa_ref
from dsa_ref.contracts import default_splits, part_length

kernels = rungs.load("kernels") if rungs.has_triton() else None

HI, DI = 4, 16
# page, N: lengths around N, around a page, and around two
CASES = [(page, N) for page in (1, 3, 8, 64) for N in (1, 2, 3, 4)]


def lengths_around(page, N):
    return sorted({0, 1, N - 1, N, page - 1, page, page + 1, 2 * page + 1})


class Batch:
    """Sequences as contiguous rows (`keys`, `scales`, `rows`: a list each) and the same in pages."""

    def __init__(self, lengths, N, page, make=small_integers, seed=0, width=None, device="cpu", D=24, order=0):
        self.N, self.page, B = N, page, len(lengths)
        scale = (lambda x: x) if make is small_integers else (lambda x: x.clamp(-3, 3) * 100)
        self.q_idx = scale(make(B, N, HI, DI, seed=seed)).to(device).to(E4M3)
        self.w = make(B, N, HI, seed=seed + 1).to(device)
        self.keys, self.scales, self.rows = [], [], []
        for b, length in enumerate(lengths):
            self.keys.append(scale(make(length, DI, seed=seed + 10 + b)).to(device).to(E4M3))
            self.scales.append(torch.exp2(small_integers(length, seed=seed + 30 + b)).to(device))
            self.rows.append(normal(length, D, seed=seed + 50 + b).to(device))
        self.table, self.lengths, pages = page_tables(lengths, page, width=width, seed=order, device=device)
        self.index_pages = torch.full((pages, page * (DI + 4)), 0xFF, dtype=torch.uint8, device=device)
        self.kv_pages = torch.full((pages, page, D), torch.nan, device=device)
        for b, length in enumerate(lengths):
            slots = slots_in(self.table, b, torch.arange(length, device=device), page)
            dsa_ref.write_index(self.index_pages, slots, self.keys[b], self.scales[b])
            dsa_ref.write_kv(self.kv_pages, slots, self.rows[b])

    def indexer(self):
        return self.q_idx, self.index_pages, self.w

    def scores(self, ops):
        return ops.paged_index_scores(*self.indexer(), self.table, self.lengths)

    def select(self, ops, k):
        return ops.paged_select(*self.indexer(), k, self.table, self.lengths)

    def only(self, *sequences, width=None):
        """The same pools, with some of the sequences and a table of another width."""
        other, chosen = object.__new__(Batch), list(sequences)
        vars(other).update(vars(self) | {name: getattr(self, name)[chosen] for name in ("q_idx", "w", "lengths")})
        other.table = torch.nn.functional.pad(self.table[chosen], (0, width or 0), value=-1)
        return other


def bounds(seen, device):
    """start and end of one sequence's queries as the contiguous steps take them."""
    end = torch.tensor(seen, dtype=torch.int32, device=device)
    return torch.zeros_like(end), end


@pytest.mark.parametrize("make", (small_integers, normal))
@pytest.mark.parametrize("page, N", CASES)
def test_scores_are_those_of_the_contiguous_rows(ops, device, poisoned, page, N, make):
    """-inf from where a query's sight ends: the newest tokens do not see each other's future."""
    lengths = lengths_around(page, N)
    batch = Batch(lengths, N, page, make, device=device)
    scores = batch.scores(ops)
    assert scores.shape == (len(lengths), N, batch.table.shape[1] * page) and scores.dtype == torch.float32
    for b, seen in enumerate(seen_by(lengths, N)):
        parts = batch.q_idx[b].float(), batch.keys[b].float(), batch.w[b], batch.scales[b]
        wanted, room = (exact_scores(*x, *bounds(seen, "cpu")) for x in (parts, [x.abs() for x in parts]))
        tolerance = 0 if make is small_integers else FP8_SUMS if device == "cuda" and ops is kernels else 1e-6
        assert_scores_close(scores[b, :, : lengths[b]], wanted, room, tolerance)
        assert (scores[b, :, lengths[b] :] == -torch.inf).all()
        assert [int((row > -torch.inf).sum()) for row in scores[b]] == seen


@pytest.mark.parametrize("k", (1, 5, 70))
@pytest.mark.parametrize("page, N", CASES)
def test_selection_is_prefills(ops, device, poisoned, small_blocks, page, N, k):
    """Ties everywhere: small whole numbers. Slots are where the page table has the positions, in the same order."""
    lengths = lengths_around(page, N)
    batch = Batch(lengths, N, page, device=device)
    positions, slots = batch.select(ops, k)
    assert positions.shape == slots.shape == (len(lengths), N, k)
    assert positions.dtype == slots.dtype == torch.int32
    for b, seen in enumerate(seen_by(lengths, N)):
        if lengths[b]:
            start, end = bounds(seen, device)
            wanted = dsa_ref.lightning_select(batch.q_idx[b], batch.keys[b], batch.w[b], k, batch.scales[b], start, end)
            assert selected(positions[b]) == selected(wanted)
        assert [sum(s >= 0 for s in row) for row in positions[b].tolist()] == [min(k, n) for n in seen]
        assert torch.equal(slots[b].long(), slots_in(batch.table, b, positions[b], page))


def test_positions_ascend(ops, device):
    positions, _ = Batch([40, 3], 2, 8, device=device).select(ops, 9)
    for row in positions.flatten(0, 1).tolist():
        kept = [s for s in row if s >= 0]
        assert kept == sorted(kept)


@pytest.mark.parametrize("H", (1, 3))
@pytest.mark.parametrize("page, N", [(1, 1), (3, 4), (8, 2), (64, 3)])
def test_decode_is_prefill(ops, device, poisoned, page, N, H):
    """Scores, selection and attention of the newest tokens, against the same steps on contiguous rows."""
    lengths, k = lengths_around(page, N), 6
    batch, q = Batch(lengths, N, page, device=device), normal(len(lengths), N, H, 24, device=device)
    out, lse = ops.paged_sparse_attention(q, batch.kv_pages, batch.select(ops, k)[1], 0.2, 16)
    assert out.shape == (len(lengths), N, H, 16) and lse.shape == (len(lengths), N, H)
    for b, length in enumerate(lengths):
        start, end = bounds(seen_by(lengths, N)[b], device)
        if length == 0:
            assert (out[b] == 0).all() and (lse[b] == -torch.inf).all()
            continue
        indices = dsa_ref.lightning_select(batch.q_idx[b], batch.keys[b], batch.w[b], k, batch.scales[b], start, end)
        wanted_out, wanted_lse = dsa_ref.sparse_attention(q[b], batch.rows[b], indices, 0.2, 16)
        assert_close(out[b], wanted_out, 5e-6)
        assert_close(lse[b], wanted_lse, 5e-6)


@pytest.mark.parametrize("page", (1, 5, 8, 64))
def test_page_size_and_page_order_change_nothing(ops, device, page):
    lengths = [70, 0, 9, 64]
    wanted, k = Batch(lengths, 2, 16, normal, device=device), 12
    wanted_scores, wanted_positions = wanted.scores(ops), wanted.select(ops, k)[0]
    q = normal(4, 2, 3, 24, device=device)
    by_position = [wanted_positions[b].sort(dim=1, descending=True).values for b in range(4)]

    def attend(batch):
        slots = torch.stack([slots_in(batch.table, b, by_position[b], batch.page) for b in range(4)]).to(torch.int32)
        return ops.paged_sparse_attention(q, batch.kv_pages, slots, 0.2, 16)

    for order in (1, 2):
        batch = Batch(lengths, 2, page, normal, device=device, order=order)
        scores, positions = batch.scores(ops), batch.select(ops, k)[0]
        for b, length in enumerate(lengths):
            assert_same_bits(scores[b, :, :length], wanted_scores[b, :, :length])
            assert selected(positions[b]) == selected(wanted_positions[b])
        for a, b in zip(attend(batch), attend(wanted), strict=True):
            assert_same_bits(a, b)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of the interpreter, which multiplies what it masks
def test_what_nobody_owns_is_never_read(ops, device):
    """NaN, infinity, zeros, noise: behind each sequence's end, in pages of no sequence, in unused table entries."""
    batch, k = Batch([13, 0, 8, 3], 2, 8, device=device), 5
    q, scores, (positions, slots) = normal(4, 2, 3, 24, device=device), batch.scores(ops), batch.select(ops, k)
    out, lse = ops.paged_sparse_attention(q, batch.kv_pages, slots, 0.2, 16)
    owned = torch.zeros(batch.kv_pages.shape[:2], dtype=torch.bool, device=device).flatten()
    for b, length in enumerate((13, 0, 8, 3)):
        owned[slots_in(batch.table, b, torch.arange(length, device=device), 8)] = True
    owned = owned.unflatten(0, (-1, 8))
    values, scales = batch.index_pages[:, : 8 * DI].unflatten(1, (8, DI)), batch.index_pages[:, 8 * DI :]
    for byte, number in ((0, 0.0), (0x7E, torch.inf), (0x55, 1e30)):
        values[~owned] = byte
        scales.unflatten(1, (8, 4))[~owned] = byte
        batch.kv_pages[~owned] = number
        batch.table[batch.table < 0] = 1 << 24
        assert_same_bits(batch.scores(ops), scores)
        for got, wanted in zip(batch.select(ops, k), (positions, slots), strict=True):
            assert torch.equal(got.sort().values, wanted.sort().values)
        for got, wanted in zip(ops.paged_sparse_attention(q, batch.kv_pages, slots, 0.2, 16), (out, lse), strict=True):
            assert_same_bits(got, wanted)
        batch.table[batch.table == 1 << 24] = -1


def test_the_rest_of_the_batch_changes_no_bit(ops, device, small_blocks):
    lengths, k = [70, 0, 9, 64, 33], 12
    whole, q = Batch(lengths, 2, 16, normal, device=device), normal(5, 2, 3, 24, device=device)
    positions, slots = whole.select(ops, k)
    slots = slots.sort(dim=2, descending=True).values
    wanted = whole.scores(ops), *ops.paged_sparse_attention(q, whole.kv_pages, slots, 0.2, 16)
    for chosen in ([0], [4, 0], [3, 2, 1, 0], [2, 2, 2, 4]):
        part = whole.only(*chosen, width=len(chosen))
        scores, got_positions = part.scores(ops), part.select(ops, k)[0]
        out, lse = ops.paged_sparse_attention(q[chosen], whole.kv_pages, slots[chosen], 0.2, 16)
        for i, b in enumerate(chosen):
            assert_same_bits(scores[i, :, : lengths[b]], wanted[0][b, :, : lengths[b]])
            assert selected(got_positions[i]) == selected(positions[b])
            assert_same_bits(out[i], wanted[1][b])
            assert_same_bits(lse[i], wanted[2][b])


def random_slots(B, N, k, places, seed=0, device="cpu"):
    """int32 [B, N, k]: distinct slots, -1 anywhere between them, the first row empty."""
    rng = np.random.default_rng(seed)
    slots = np.full((B * N, k), -1, dtype=np.int32)
    for row in slots[1:]:
        count = int(rng.integers(1, min(k, places) + 1))
        row[rng.permutation(k)[:count]] = rng.permutation(places)[:count]
    return torch.tensor(slots.reshape(B, N, k), device=device)


def softmax_over(q, rows, slots, scale, v_dim):
    """One softmax in float64 over rows [places, D], from the definition."""
    q, rows = q.cpu().double(), rows.cpu().double()
    out, lse = torch.zeros(*q.shape[:-1], v_dim, dtype=torch.float64), torch.full(q.shape[:-1], -torch.inf).double()
    for b, n in np.ndindex(*slots.shape[:2]):
        kv = rows[[slot for slot in slots[b, n].tolist() if slot >= 0]]
        if len(kv):
            logits = scale * q[b, n] @ kv.T
            out[b, n], lse[b, n] = logits.softmax(dim=-1) @ kv[:, :v_dim], logits.logsumexp(dim=-1)
    return out, lse


@pytest.mark.parametrize("splits", (None, 1, 2, 3, 16))
@pytest.mark.parametrize("k", (1, 63, 64, 65, 200, 300))
def test_however_a_row_is_cut_it_is_one_softmax(ops, device, poisoned, k, splits):
    """Also with parts that hold nothing, and with more parts than there are places."""
    q, pages = normal(2, 2, 3, 24, device=device), normal(40, 8, 24, seed=1, device=device)
    slots = random_slots(2, 2, k, 320, device=device)
    slots[1, 1, : k // 2] = -1
    out, lse = ops.paged_sparse_attention(q, pages, slots, 0.4, 16, splits=splits)
    wanted_out, wanted_lse = softmax_over(q, pages.flatten(0, 1), slots, 0.4, 16)
    assert_close(out, wanted_out, 5e-6)
    assert_close(lse, wanted_lse, 5e-6)
    assert (out[0, 0] == 0).all() and (lse[0, 0] == -torch.inf).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 5e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("D, v_dim", [(24, 16), (130, 128), (300, 256)])
def test_fp8_rows(ops, device, D, v_dim, dtype, tolerance):
    """Over what the rows hold, whatever their scales: no power of two, negative, each tile another."""
    rows = dsa_ref.pack_kv(normal(48, D, device=device), v_dim)
    scales = rows[:, v_dim : v_dim + 4 * -(-v_dim // 128)]
    odd = normal(*scales.shape[:1], scales.shape[1] // 4, seed=7, device=device) * 0.01
    scales.copy_(odd.view(torch.uint8))
    q, slots = normal(2, 2, 3, D, dtype=dtype, device=device), random_slots(2, 2, 20, 48, device=device)
    out, lse = ops.paged_sparse_attention(q, rows.view(6, 8, -1), slots, D**-0.5, v_dim)
    assert out.dtype == dtype and lse.dtype == torch.float32
    plain = torch.tensor(dsa_ref.unpack_kv_loops(rows.cpu().numpy(), v_dim))
    wanted_out, wanted_lse = softmax_over(q, plain, slots, D**-0.5, v_dim)
    assert_close(out, wanted_out, tolerance)
    assert_close(lse, wanted_lse, tolerance)


@pytest.mark.parametrize("offset", (1, 2, 3))
def test_pools_may_begin_at_any_byte(ops, device, offset):
    """Scales and bf16 columns then lie at addresses at which no fp32 and no bf16 may be read."""
    batch, k = Batch([20, 9], 2, 8, device=device), 6
    rows = dsa_ref.pack_kv(normal(batch.kv_pages[..., 0].numel(), 24, device=device), 16)
    kv_pages, q = rows.view(-1, 8, rows.shape[1]), normal(2, 2, 3, 24, device=device)
    scores, (_, slots) = batch.scores(ops), batch.select(ops, k)
    out, lse = ops.paged_sparse_attention(q, kv_pages, slots, 0.2, 16)
    batch.index_pages, kv_pages = from_byte(offset, batch.index_pages), from_byte(offset, kv_pages)
    assert batch.index_pages.data_ptr() % 4 == kv_pages.data_ptr() % 4 == offset
    assert_same_bits(batch.scores(ops), scores)
    assert selected(batch.select(ops, k)[1][0]) == selected(slots[0])
    for got, wanted in zip(ops.paged_sparse_attention(q, kv_pages, slots, 0.2, 16), (out, lse), strict=True):
        assert_same_bits(got, wanted)


def test_merge_parts(ops, device):
    """An empty part counts for nothing, even where nobody wrote its output; nothing but empty parts is an empty row."""
    logits, values = normal(3, 5, 2, 7, device=device) * 9, normal(3, 5, 2, 7, 6, seed=1, device=device)
    lses, outs = logits.logsumexp(-1), torch.einsum("pbhs,pbhsv->pbhv", logits.softmax(-1), values)
    hidden = [(0, 1), (2, 1), (1, 2), (0, 3), (1, 3), (2, 3)]
    for part, b in hidden:
        lses[part, b], outs[part, b], logits[part, b] = -torch.inf, torch.nan, -torch.inf
    out, lse = ops.merge_parts(outs, lses)
    logits = logits.double().movedim(0, -2).flatten(-2)
    values = values.double().movedim(0, -3).flatten(-3, -2)
    full = [0, 1, 2, 4]
    weights = logits[full].softmax(-1)
    assert_close(out[full], torch.einsum("bhs,bhsv->bhv", weights, values[full]), 2e-6)
    assert_close(lse[full], logits[full].logsumexp(-1), 2e-6)
    assert (out[3] == 0).all() and (lse[3] == -torch.inf).all()
    whole = ops.merge_parts(outs[:1, [0, 4]], lses[:1, [0, 4]])
    assert_same_bits(whole[0], outs[0, [0, 4]])
    assert_same_bits(whole[1], lses[0, [0, 4]])


def test_the_split_is_a_function_of_k_alone():
    assert [default_splits(k) for k in (1, 128, 129, 2047, 2048, 2049, 1 << 20)] == [1, 1, 2, 16, 16, 16, 16]
    assert part_length(2048, 16) == 128 and part_length(65, 2) == 64 and part_length(65, 1) == 128
    assert part_length(1, 16) == 64 and part_length(300, 2) == 192
    for k in range(1, 700):
        assert part_length(k, default_splits(k)) * default_splits(k) >= k


@pytest.mark.rungs("reference", "kernels")
def test_splits_and_only_splits_choose_the_bits(ops, device):
    """None is the default's number; -1 at a list's end may be cut off or added within the same number of parts."""
    q, pages = normal(2, 1, 3, 24, device=device), normal(40, 8, 24, seed=1, device=device)
    slots = random_slots(2, 1, 300, 320, device=device)
    wanted = ops.paged_sparse_attention(q, pages, slots, 0.4, 16)
    for got, value in zip(ops.paged_sparse_attention(q, pages, slots, 0.4, 16, splits=3), wanted, strict=True):
        assert_same_bits(got, value)
    one = ops.paged_sparse_attention(q, pages, slots, 0.4, 16, splits=1)
    assert not torch.equal(one[0], wanted[0])  # else this test shows nothing


@pytest.mark.rungs("reference", "kernels")
def test_parts_that_have_no_place_take_no_memory(ops, device):
    q, kv_pages = normal(1, 2, 3, 24, device=device), normal(5, 64, 24, seed=1, device=device)
    for k in (7, 130):
        slots = random_slots(1, 2, k, 5 * 64, device=device)
        wanted = ops.paged_sparse_attention(q, kv_pages, slots, 0.3, 16, -(-k // 64))
        for splits in (16, 10**9):
            for got, part in zip(ops.paged_sparse_attention(q, kv_pages, slots, 0.3, 16, splits), wanted, strict=True):
                assert_same_bits(got, part)
    with pytest.raises(ValueError, match="splits must be an int64, got 1000"):
        ops.paged_sparse_attention(q, kv_pages, slots, 0.3, 16, 10**30)


@pytest.mark.rungs("reference")
def test_nan_among_the_scores_is_refused(ops, device):
    """In the one row that sees it: row 3 of [B · N] is sequence 1's newer query."""
    batch = Batch([4, 9], 2, 8, device=device)
    newest = slots_in(batch.table, 1, torch.tensor([8], device=device), 8)
    key = torch.full((1, DI), torch.nan, device=device).to(E4M3)
    dsa_ref.write_index(batch.index_pages, newest, key, torch.ones(1, device=device))
    with pytest.raises(ValueError, match="NaN in row 3 for key 8"):
        batch.select(ops, 3)


@pytest.mark.rungs("reference")
def test_gradient(ops):
    """Through both outputs, parts and merge: in q and in rows of floats, an empty row and a list with -1 among them."""
    slots = random_slots(1, 3, 70, 6)
    q, pages = normal(1, 3, 2, 6).double().requires_grad_(), normal(3, 2, 6, seed=1).double().requires_grad_()

    def run(q, pages):
        out, lse = ops.paged_sparse_attention(q, pages, slots, 0.4, 4, splits=2)
        return out, lse[:, 1:]

    assert torch.autograd.gradcheck(run, (q, pages))


GOOD = {
    "q_idx": normal(2, 2, HI, DI).to(E4M3),
    "index_pages": torch.zeros(6, 8 * (DI + 4), dtype=torch.uint8),
    "w": normal(2, 2, HI),
    "k": 3,
    "page_table": torch.tensor([[4, 1, -1], [0, 2, 5]], dtype=torch.int32),
    "lengths": torch.tensor([9, 24], dtype=torch.int32),
    "q": normal(2, 2, 3, 24),
    "kv_pages": torch.zeros(6, 8, 24),
    "slots": torch.tensor([[[3, -1], [0, 47]], [[-1, -1], [1, 2]]], dtype=torch.int32),
    "scale": 0.2,
    "v_dim": 16,
    "splits": None,
    "outs": normal(3, 2, 4),
    "lses": normal(3, 2),
}
STEPS = {
    "paged_index_scores": ("q_idx", "index_pages", "w", "page_table", "lengths"),
    "paged_select": ("q_idx", "index_pages", "w", "k", "page_table", "lengths"),
    "paged_sparse_attention": ("q", "kv_pages", "slots", "scale", "v_dim", "splits"),
    "merge_parts": ("outs", "lses"),
}


def changed(name, place, value):
    bad = GOOD[name].clone()
    bad[place] = value
    return bad


BAD = [  # argument, value, error, what it says
    ("q_idx", normal(2, 5, HI, DI).to(E4M3), ValueError, "w must have .* N = 5"),  # another N than w's
    ("q_idx", normal(2, 2, HI, DI), TypeError, "float8_e4m3fn, got float32"),
    ("q_idx", normal(2, HI, DI).to(E4M3), ValueError, "shape"),
    ("index_pages", torch.zeros(6, 8 * (DI + 4) - 1, dtype=torch.uint8), ValueError, "multiple of Di . 4 = 20"),
    ("index_pages", torch.zeros(6, 8 * (DI + 4)), TypeError, "uint8, got float32"),
    ("w", normal(2, 2, HI).double(), TypeError, "float32, got float64"),
    ("k", 0, ValueError, "at least 1, got 0"),
    ("page_table", changed("page_table", (0, 1), -1), ValueError, "got -1 in row 0, page 1"),
    ("page_table", changed("page_table", (1, 2), 6), ValueError, r"\[0, 6\), got 6 in row 1, page 2"),
    ("page_table", changed("page_table", (1, 2), 0), ValueError, "got 0 twice in row 1"),
    ("page_table", GOOD["page_table"].long(), TypeError, "int32, got int64"),
    ("lengths", changed("lengths", 0, -1), ValueError, "got -1 in row 0"),
    ("lengths", changed("lengths", 1, 25), ValueError, r"\[0, 24\].*got 25 in row 1"),
    ("lengths", GOOD["lengths"].float(), TypeError, "int32, got float32"),
    ("lengths", GOOD["lengths"][:1], ValueError, "B = 2"),
    ("kv_pages", torch.zeros(6, 8, 23), ValueError, "D = 24 numbers, got 23"),
    ("kv_pages", torch.zeros(6, 8, 24, dtype=torch.uint8), ValueError, "36 bytes .FP8, D = 24, v_dim = 16., got 24"),
    ("kv_pages", torch.zeros(6, 8, 24).half(), TypeError, "float32, uint8, got float16"),
    ("slots", changed("slots", (0, 1, 0), 48), ValueError, "S = 48, got 48"),
    ("slots", changed("slots", (0, 1, 0), -2), ValueError, "got -2"),
    ("slots", changed("slots", (1, 1, 0), 2), ValueError, "got 2 twice in row 3"),
    ("slots", GOOD["slots"].long(), TypeError, "int32, got int64"),
    ("scale", 0.0, ValueError, "positive"),
    ("v_dim", 25, ValueError, "at most D = 24, got 25"),
    ("splits", 0, ValueError, "at least 1, got 0"),
    ("splits", 2.0, TypeError, "int"),
    ("outs", normal(3, 2, 4).half(), TypeError, "got float16"),
    ("lses", normal(2, 2), ValueError, "splits"),
]


@pytest.mark.rungs("reference", "kernels")
@pytest.mark.parametrize("step", STEPS)
def test_bad_arguments(ops, device, step):
    def call(**other):
        arguments = {name: GOOD[name] for name in STEPS[step]} | other
        moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        return getattr(ops, step)(**moved)

    call()
    for name, value, error, message in BAD:
        if name in STEPS[step]:
            with pytest.raises(error) as caught:
                call(**{name: value})
            assert re.search(rf"\b{name}\b", str(caught.value)) and re.search(message, str(caught.value)), caught.value


@pytest.mark.rungs("reference", "kernels")
def test_no_more_than_four_queries_a_sequence(ops, device):
    batch = Batch([9, 3], 5, 8, device=device)
    q, slots = normal(2, 5, 1, 24, device=device), torch.full((2, 5, 1), -1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="q_idx must have at most N = 4 query tokens a sequence, got 5"):
        batch.scores(ops)
    with pytest.raises(ValueError, match="q must have at most N = 4 query tokens a sequence, got 5"):
        ops.paged_sparse_attention(q, batch.kv_pages, slots, 0.2, 16)


@pytest.mark.rungs("reference", "kernels")
def test_fp8_rows_have_whole_tiles(ops):
    q, rows = normal(1, 1, 1, 300), torch.zeros(1, 8, 700, dtype=torch.uint8)
    with pytest.raises(ValueError, match="v_dim must be below 128 or a multiple of it in FP8 rows, got 200"):
        ops.paged_sparse_attention(q, rows, torch.zeros(1, 1, 1, dtype=torch.int32), 0.2, 200)
