"""Notebook 12: a step's bytes, a page of the index cache, slots, scores read out of pages, the merge of all parts."""

import contextlib
import functools
import pathlib

import numpy as np
import torch

from dsa_ref.index_scores import index_scores
from dsa_ref.sparse_attention import masked_softmax

from ..checking import Check, expect, expect_close, expect_shape, normal, whole

step_bytes = Check("step_bytes")  # (lengths [B] ints, k, index_bytes, kv_bytes) -> (dsa, dense)
pack_page = Check("pack_page")  # (k_idx e4m3 [n, Di], k_scale fp32 [n], page_size) -> uint8 [page_size · (Di + 4)]
slots_of = Check("slots_of")  # (positions int32 [B, k], page_table int32 [B, P], page_size) -> int [B, k]
paged_scores = Check("paged_scores")  # (q_idx [Hi, Di], w [Hi], index_pages, table [P], length, page_size) -> fp32
merge_splits = Check("merge_splits")  # (outs [n, H, V], lses [n, H]) -> (out [H, V], lse [H])


def _pair(got, names):
    expect(
        isinstance(got, (tuple, list)) and len(got) == 2,
        f"got {type(got).__name__}, expected the pair ({names})",
        f"return {names}",
    )
    return got


# -------------------------------------------------------------------------------------------------------- step_bytes


def _dsa(lengths, k, index_bytes, kv_bytes):
    return sum(index_bytes * L + kv_bytes * min(k, L) for L in lengths)


def _expect_bytes(solution, place, lengths, k, index_bytes, kv_bytes, expected, suspects, cause):
    """Compare one of the two numbers, the first (dsa) or the second (dense)."""
    got = _pair(solution(list(lengths), k, index_bytes, kv_bytes), "dsa, dense")[place]
    expect(
        isinstance(got, (int, float, np.number)) or getattr(got, "ndim", None) == 0,
        f"{('dsa', 'dense')[place]}: got {type(got).__name__}, expected one number",
        "one number for the whole batch: sum over its sequences",
    )
    for suspicion, answer in suspects.items():
        if float(got) == answer != expected:
            cause = suspicion
    expect(
        float(got) == expected,
        f"{('dsa', 'dense')[place]}, lengths {list(lengths)}, k={k}, {index_bytes} and {kv_bytes} bytes: got "
        f"{float(got):,.0f}, expected {expected:,}",
        cause,
    )


@step_bytes.property("dense")
def step_bytes_dense(solution):
    for lengths, k, index_bytes, kv_bytes in (([5000], 2048, 132, 656), ([7, 301, 64], 10, 36, 112)):
        suspects = {
            "dense attention has no indexer: it reads no index cache": (index_bytes + kv_bytes) * sum(lengths),
            "every sequence was counted as long as the longest": kv_bytes * max(lengths) * len(lengths),
            "dense attention reads every row, not k of them": kv_bytes * sum(min(k, L) for L in lengths),
            "that is DSA's number: the order is (dsa, dense)": _dsa(lengths, k, index_bytes, kv_bytes),
        }
        cause = "dense attention reads each row of each sequence once: kv_bytes times all tokens"
        _expect_bytes(solution, 1, lengths, k, index_bytes, kv_bytes, kv_bytes * sum(lengths), suspects, cause)


@step_bytes.property("long context")
def step_bytes_long_context(solution):
    for L, k, index_bytes, kv_bytes in ((131_072, 2048, 132, 656), (301, 7, 36, 112)):
        suspects = {
            "the indexer is missing: to choose, it reads an entry of every token": kv_bytes * k,
            "the index cache was read for k tokens only: to choose k, all must be scored": (index_bytes + kv_bytes) * k,
            "the selected rows are missing": index_bytes * L,
            "every row was read, not k of them": (index_bytes + kv_bytes) * L,
        }
        cause = "index_bytes for every token, and kv_bytes for each of the k selected"
        _expect_bytes(solution, 0, [L], k, index_bytes, kv_bytes, index_bytes * L + kv_bytes * k, suspects, cause)


@step_bytes.property("short context")
def step_bytes_short_context(solution):
    for L, k, index_bytes, kv_bytes in ((100, 2048, 132, 656), (7, 8, 36, 112), (1, 64, 36, 112)):
        suspects = {
            "k rows were read, but there are fewer than k tokens": index_bytes * L + kv_bytes * k,
            "the indexer runs for short sequences too": kv_bytes * L,
        }
        cause = "a sequence of fewer than k tokens selects all of them: min(k, length)"
        _expect_bytes(solution, 0, [L], k, index_bytes, kv_bytes, (index_bytes + kv_bytes) * L, suspects, cause)


@step_bytes.property("batch")
def step_bytes_batch(solution):
    for lengths, k, index_bytes, kv_bytes in (([100, 131_072, 3000], 2048, 132, 656), ([7, 301, 64, 7, 8], 8, 36, 112)):
        B, longest = len(lengths), max(lengths)
        suspects = {
            "every sequence was counted as long as the longest": B * _dsa([longest], k, index_bytes, kv_bytes),
            "k rows for the whole batch: each sequence selects its own": _dsa([sum(lengths)], k, index_bytes, kv_bytes),
            "the mean length was taken: min(k, length) is no straight line": B
            * _dsa([sum(lengths) / B], k, index_bytes, kv_bytes),
            "only the first sequence was counted": _dsa(lengths[:1], k, index_bytes, kv_bytes),
            "sequences of the same length were counted once": _dsa(set(lengths), k, index_bytes, kv_bytes),
        }
        expected = _dsa(lengths, k, index_bytes, kv_bytes)
        cause = "sum over the sequences, each with its own length and its own min(k, length)"
        _expect_bytes(solution, 0, lengths, k, index_bytes, kv_bytes, expected, suspects, cause)


# --------------------------------------------------------------------------------------------------------- pack_page

PAGES = ((1, 8, 8, 8), (2, 5, 6, 5), (3, 64, 128, 64))  # seed, tokens, Di, page size: full pages
SHORT = ((4, 3, 8, 8), (5, 1, 6, 5), (6, 37, 32, 64))  # pages that are not full


def _keys(seed, n, Di):
    """Every byte but NaN's two may be a value; scales are powers of two, and one other number."""
    rng = np.random.default_rng(seed)
    codes = rng.choice([byte for byte in range(256) if byte & 0x7F != 0x7F], (n, Di)).astype(np.uint8)
    scales = (2.0 ** rng.integers(-12, 5, n)).astype(np.float32)
    scales[0] = 0.3
    return torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(scales)


def page_of(k_idx, k_scale, page_size):
    """The page, byte by byte: all values, then all scales; unused places are 0. uint8 [page_size · (Di + 4)]."""
    n, Di = k_idx.shape
    page = torch.zeros(page_size * (Di + 4), dtype=torch.uint8)
    page[: n * Di] = k_idx.contiguous().view(torch.uint8).flatten()
    page[page_size * Di : page_size * Di + 4 * n] = k_scale.contiguous().view(torch.uint8)
    return page


def token_by_token(k_idx, k_scale, page_size):
    """The wrong page: each token's values and its scale together, Di + 4 bytes a token."""
    n, Di = k_idx.shape
    page = torch.zeros(page_size, Di + 4, dtype=torch.uint8)
    page[:n, :Di], page[:n, Di:] = k_idx.contiguous().view(torch.uint8), k_scale.view(torch.uint8).view(n, 4)
    return page.flatten()


def _packed(solution, case):
    """(the learner's page as a tensor, the right one, the keys, the scales)."""
    seed, n, Di, page_size = case
    k_idx, k_scale = _keys(seed, n, Di)
    got = solution(k_idx, k_scale, page_size)
    if isinstance(got, np.ndarray):
        got = torch.from_numpy(np.ascontiguousarray(got))
    expect_shape(got, [page_size * (Di + 4)], torch.uint8, "the page")
    return got, page_of(k_idx, k_scale, page_size), k_idx, k_scale


@pack_page.property("shape and type")
def pack_page_shape_and_type(solution):
    for case in (*PAGES, *SHORT):
        _packed(solution, case)


@pack_page.property("values first")
def pack_page_values_first(solution):
    for case in PAGES:
        _, n, Di, page_size = case
        got, page, k_idx, k_scale = _packed(solution, case)
        codes, scale_bytes = k_idx.view(torch.uint8), k_scale.view(torch.uint8)
        rounded = k_idx.float().to(torch.int32).to(torch.uint8)
        suspects = {
            "values and scale of each token lie together: a page holds all values, then all scales": token_by_token(
                k_idx, k_scale, page_size
            )[: n * Di],
            "the scales came first: the values begin at byte 0": torch.cat((scale_bytes, codes.flatten()))[: n * Di],
            "the values were converted, which rounds them: .view(torch.uint8) keeps the bits": rounded.flatten(),
            "the page was filled dim by dim: token after token, each with its Di values": codes.T.flatten(),
        }
        cause = f"byte i·Di + d of the page is value d of token i (Di = {Di})"
        expect_close(got[: n * Di], page[: n * Di], 0.0, "byte", cause, suspects)


@pack_page.property("scales behind")
def pack_page_scales_behind(solution):
    for case in PAGES:
        _, n, Di, page_size = case
        got, page, _, k_scale = _packed(solution, case)
        four = k_scale.view(torch.uint8).view(n, 4)
        suspects = {
            "the four bytes of each scale are in the opposite order: little-endian, as memory has them": four.flip(
                1
            ).flatten(),
            "1 / scale was stored: it is the number that the values are multiplied by": (1 / k_scale).view(torch.uint8),
            "the scales were not stored": torch.zeros(4 * n),
            "the scales were converted to bytes: .view(torch.uint8) gives the four bytes of each fp32 number": (
                k_scale.to(torch.uint8).repeat_interleave(4)
            ),
        }
        cause = f"byte {page_size}·Di + 4·i begins the fp32 scale of token i"
        expect_close(got[page_size * Di :], page[page_size * Di :], 0.0, "byte_behind_the_values", cause, suspects)


@pack_page.property("short page")
def pack_page_short_page(solution):
    for case in SHORT:
        _, n, Di, page_size = case
        got, page, k_idx, k_scale = _packed(solution, case)
        codes, scale_bytes = k_idx.view(torch.uint8).flatten(), k_scale.view(torch.uint8)
        directly = torch.cat((codes, scale_bytes, page.new_zeros(len(page) - len(codes) - len(scale_bytes))))
        suspects = {
            "the scales follow the last value: they begin at page_size·Di, however many tokens are there": directly,
        }
        cause = (
            f"{n} tokens in a page of {page_size}: scales begin at byte page_size·Di = {page_size * Di}, and what no "
            "token uses is 0"
        )
        expect_close(got, page, 0.0, "byte", cause, suspects)


# ---------------------------------------------------------------------------------------------------------- slots_of


def _tables(seed, B, P, pages, used=None):
    """Page tables of B sequences with different pages, -1 behind the first used[b]."""
    order = np.random.default_rng(seed).permutation(pages)[: B * P].reshape(B, P).astype(np.int32)
    for row, n in zip(order, used or [P] * B, strict=True):
        row[n:] = -1
    return torch.from_numpy(order)


def _positions(seed, B, k, lengths):
    """Positions in no order, as a fast selection may give them."""
    rng = np.random.default_rng(seed + 10)
    rows = [rng.permutation(L)[:k] for L in lengths]
    return torch.from_numpy(np.stack([np.pad(row, (0, k - len(row)), constant_values=-1) for row in rows])).int()


def _slots(positions, table, page_size):
    """The right answer, int64."""
    there, entries = positions.clamp(min=0).long(), table.long()
    slots = entries.gather(1, there // page_size) * page_size + there % page_size
    return slots.masked_fill(positions < 0, -1)


def _expect_slots(solution, positions, table, page_size, cause, suspects=None):
    got = solution(positions, table, page_size)
    expect_shape(got, positions.shape, name="slots")
    whole_numbers = isinstance(got, np.ndarray) and got.dtype.kind in "iu"
    whole_numbers = whole_numbers or (isinstance(got, torch.Tensor) and not got.dtype.is_floating_point)
    expect(whole_numbers, f"slots: got {got.dtype}, expected whole numbers", "divide with //, not with /")
    expect_close(got, _slots(positions, table, page_size), 0.0, "b j", cause, suspects)


@slots_of.property("page and place")
def slots_of_page_and_place(solution):
    page_size = 64
    for seed, P, k, pages in ((1, 5, 11, 9), (2, 1, 37, 9), (3, 3, 1, 9), (4, 5, 11, 1 << 20)):
        table = _tables(seed, 1, P, pages)
        positions = _positions(seed, 1, k, [P * page_size])
        there = positions.long()
        page = table.long().gather(1, there // page_size)
        last = (there // page_size).clamp(max=P - 1)
        slots = page * page_size + there % page_size
        suspects = {
            "slots of a large pool do not fit fp32, which holds whole numbers up to 2^24: stay with int64": (
                page.float() * page_size + there % page_size
            ),
            "slots of a large pool do not fit 16 bits: stay with int64": slots.to(torch.int16),
            "the page table was not used: a slot is a place in the pool, not in the sequence": there,
            "the page's id was not multiplied by the page size": page + there % page_size,
            "the place in the page is missing": page * page_size,
            "the position was added, not its place within the page: position % page_size": page * page_size + there,
            "page and place are swapped: position // page_size is the page, position % page_size the place": (
                table.long()[0][(there % page_size).clamp(max=P - 1)] * page_size + last
            ),
        }
        cause = "slot = page_table[b, position // page_size] · page_size + position % page_size"
        _expect_slots(solution, positions, table, page_size, cause, suspects)


@slots_of.property("own table")
def slots_of_own_table(solution):
    for seed, B, P, page_size in ((4, 3, 4, 64), (5, 2, 3, 64)):
        table = _tables(seed, B, P, 20)
        positions = _positions(seed, B, 6, [P * page_size] * B)
        first = table[:1].repeat(B, 1)
        suspects = {"every sequence was looked up in the first one's table": _slots(positions, first, page_size)}
        cause = "row b of positions belongs to row b of the table"
        _expect_slots(solution, positions, table, page_size, cause, suspects)


@slots_of.property("any page size")
def slots_of_any_page_size(solution):
    for seed, page_size in ((6, 16), (7, 1), (8, 3)):
        table = _tables(seed, 2, 4, 9)
        positions = _positions(seed, 2, 4, [4 * page_size] * 2)
        cause = f"wrong for pages of {page_size}, right for others: page_size is an argument"
        _expect_slots(solution, positions, table, page_size, cause)


@slots_of.property("-1 stays -1")
def slots_of_minus_1_stays_minus_1(solution):
    for seed, used in ((9, [4, 4]), (10, [2, 3])):  # full tables, and tables whose last entry is -1
        page_size = 4
        table = _tables(seed, 2, 4, 12, used)
        positions = _positions(seed, 2, 9, [6, 7])
        positions[0, 2] = -1  # anywhere, not only at the end
        there = positions.long()
        wrapped = table.long().gather(1, (there // page_size) % 4) * page_size + there % page_size
        suspects = {
            "-1 // page_size is -1, which reads the table's last entry: right by luck where that is -1 itself": wrapped,
            "-1 was clamped to position 0, and left there": _slots(positions.clamp(min=0), table, page_size),
        }
        cause = "-1 means that nothing was selected: it stays -1, wherever it stands"
        _expect_slots(solution, positions, table, page_size, cause, suspects)


# ------------------------------------------------------------------------------------------------------ paged_scores


class _Sequence:
    """One sequence in a pool of pages that holds others' keys too: query, keys, pool, table, and the right scores."""

    def __init__(self, seed, length, page_size, P, Di=8, Hi=3):
        rng = np.random.default_rng(seed)
        self.length, self.page_size, self.P, self.Di = length, page_size, P, Di
        self.q_idx = whole(Hi, Di, seed=seed).to(torch.float8_e4m3fn)
        self.w = whole(Hi, seed=seed + 1) + 0.5
        pages = 2 * P + 1
        self.k_idx = whole(pages * page_size, Di, seed=seed + 2).to(torch.float8_e4m3fn)  # by slot
        scales = rng.choice([1.0, 0.75], pages * page_size) * 2.0 ** rng.integers(-3, 4, pages * page_size)
        self.k_scale = torch.from_numpy(scales).float()  # not all powers of two: any fp32 number is one
        self.used = -(-length // page_size)
        self.table = torch.full((P,), -1, dtype=torch.int32)
        self.table[: self.used] = torch.from_numpy(rng.permutation(pages - 1)[: self.used]).int()

    def at(self, positions):
        """The slots of these positions."""
        return self.table[positions // self.page_size].long() * self.page_size + positions % self.page_size

    def pool(self, pack=None):
        split = (x.unflatten(0, (-1, self.page_size)) for x in (self.k_idx.view(torch.uint8), self.k_scale))
        return torch.stack(
            [(pack or page_of)(k.view(torch.float8_e4m3fn), s, self.page_size) for k, s in zip(*split, strict=True)]
        )

    def of(self, slots):
        """The scores of the keys at these slots, in this order."""
        end = torch.tensor([len(slots)], dtype=torch.int32)
        return index_scores(
            self.q_idx[None], self.k_idx[slots], self.w[None], self.k_scale[slots], torch.zeros_like(end), end
        )[0]

    def right(self):
        scores = torch.full((self.P * self.page_size,), -torch.inf)
        scores[: self.length] = self.of(self.at(torch.arange(self.length)))
        return scores

    def ask(self, solution, index_pages=None):
        pool = self.pool() if index_pages is None else index_pages
        got = solution(self.q_idx, self.w, pool, self.table, self.length, self.page_size)
        expect_shape(got, [self.P * self.page_size], name="scores")
        return got


@paged_scores.property("one page")
def paged_scores_one_page(solution):
    for seed, page_size, Di, Hi in ((1, 8, 8, 3), (2, 5, 12, 1)):
        s = _Sequence(seed, page_size, page_size, 1, Di, Hi)
        first = int(s.table[0]) * page_size
        keys, scales = s.k_idx[first : first + page_size].float(), s.k_scale[first : first + page_size]
        dots = torch.einsum("hd,sd->hs", s.q_idx.float(), keys)
        read = s.pool()[s.table[0]].view(page_size, Di + 4)  # as if each token's bytes lay together
        codes, four = read[:, :Di].contiguous().view(torch.float8_e4m3fn), read[:, Di:].contiguous()
        apart = torch.einsum("hd,sd->hs", s.q_idx.float(), codes.float()).relu()
        suspects = {
            "the page was read token by token: it holds all values, then all scales": (s.w @ apart)
            * four.view(torch.float32)[:, 0],
            "the key's scale is missing": s.w @ dots.relu(),
            "no relu: each head's dot product is cut at 0": (s.w @ dots) * scales,
            "the relu came after the sum over heads": (s.w @ dots).relu() * scales,
            "the weights are missing": dots.relu().sum(dim=0) * scales,
        }
        cause = "score = scale · sum over heads of w · relu(q · k), keys and scales as pack_page lays them"
        expect_close(s.ask(solution), s.right(), 1e-6, "s", cause, suspects)


@paged_scores.property("the sequence's order")
def paged_scores_the_sequences_order(solution):
    for seed, page_size, P in ((3, 4, 5), (4, 7, 3)):
        s = _Sequence(seed, page_size * P, page_size, P)
        ordered = s.table.sort().values.long()
        slots = (ordered[:, None] * page_size + torch.arange(page_size)).flatten()
        suspects = {
            "the pool's first pages were read, not those that the table names": s.of(torch.arange(P * page_size)),
            "the pages came in the pool's order: the table has the sequence's": s.of(slots),
        }
        cause = "place s of the scores belongs to position s of the sequence: page table[s // page_size]"
        expect_close(s.ask(solution), s.right(), 1e-6, "s", cause, suspects)


@paged_scores.property("last page")
def paged_scores_last_page(solution):
    for seed, length, page_size, P in ((5, 10, 4, 3), (6, 1, 8, 1), (7, 15, 7, 3)):
        s = _Sequence(seed, length, page_size, P)
        full = torch.arange(s.used * page_size)
        garbage = s.right()
        garbage[full] = s.of(s.at(full))
        got = s.ask(solution)
        cause = f"length {length} in pages of {page_size}: what lies behind the last token is -inf"
        suspects = {
            "the last page's garbage was scored: only positions below length are the sequence's": garbage,
            "a 0 stands where nothing is: it would beat every negative score": s.right().nan_to_num(neginf=0.0),
        }
        expect_close(got, s.right(), 1e-6, "s", cause, suspects)
        s.k_idx.view(torch.uint8)[s.at(full[length:])] = 0x7F  # NaN
        s.k_scale[s.at(full[length:])] = torch.nan
        cause = "the last page's garbage is NaN here, and it got into the scores: replace it by -inf, do not add"
        expect_close(s.ask(solution), s.right(), 1e-6, "s", cause)


@paged_scores.property("end of the table")
def paged_scores_end_of_the_table(solution):
    for seed, length, page_size, P in ((8, 7, 4, 5), (9, 8, 8, 2)):
        s = _Sequence(seed, length, page_size, P)
        slots = (s.table.long() % (2 * P + 1))[:, None] * page_size + torch.arange(page_size)
        past = s.of(slots.flatten())
        past[length : s.used * page_size] = -torch.inf
        suspects = {"the table was read past its end: -1 led to the pool's last page, another sequence's keys": past}
        cause = f"the sequence has {s.used} pages, the table {P} entries: the other entries are -1 and name no page"
        expect_close(s.ask(solution), s.right(), 1e-6, "s", cause, suspects)


@functools.cache
def _real():
    """A step of the trained model on real text: layer 3, the first bytes of contextlib.py."""
    from dsa_ref.nn import load_small_model  # here: loading it takes longer than all other checks

    text, steps = pathlib.Path(contextlib.__file__).read_bytes()[:201], []
    with torch.no_grad():
        load_small_model()(torch.tensor(list(text)), record=steps)
    return steps[3]


@paged_scores.property("decode equals prefill (trained model)")
def paged_scores_decode_equals_prefill(solution):
    """Pages hold what a rejected draft left behind the sequence: real keys, finite and plausible."""
    step = _real()
    prefill = index_scores(step["q_idx"], step["k_idx"], step["w"], step["k_scale"])
    for t, page_size in ((150, 16), (99, 64)):
        P = -(-201 // page_size)
        order = np.random.default_rng(page_size).permutation(P)
        padded = (torch.nn.functional.pad(step["k_idx"].view(torch.uint8), (0, 0, 0, P * page_size - 201)),)
        padded += (torch.nn.functional.pad(step["k_scale"], (0, P * page_size - 201)),)
        k_idx, k_scale = (x.unflatten(0, (P, page_size)) for x in padded)
        pool = torch.empty(P, page_size * (k_idx.shape[2] + 4), dtype=torch.uint8)
        for page, place in enumerate(order):
            pool[int(place)] = page_of(k_idx[page].view(torch.float8_e4m3fn), k_scale[page], page_size)
        table = torch.from_numpy(order.astype(np.int32))
        got = solution(step["q_idx"][t], step["w"][t], pool, table, t + 1, page_size)
        expect_shape(got, [P * page_size], name="scores")
        expected = torch.full((P * page_size,), -torch.inf)
        expected[: t + 1] = prefill[t, : t + 1]
        cause = (
            f"byte {t} of contextlib.py, layer 3: prefill scores bytes 0 to {t}. Behind them lie the keys of a draft "
            "that was rejected: finite, and not the sequence's"
        )
        expect_close(got, expected, 1e-5, "s", cause)


# ------------------------------------------------------------------------------------------------------ merge_splits

EXACT = 1e-9
BASE_2 = "this is right but for the base: exp2 and log2 where exp and log are asked for"
# seed, H, V, keys in each part
MERGES = ((1, 3, 4, (5, 9, 2)), (2, 1, 3, (1, 30)), (3, 2, 5, (4, 4, 4, 4, 4)), (4, 2, 3, (7,)))


def _parts(seed, H, V, sizes, shift=0.0, empty=()):
    """(outs [n, H, V], lses [n, H]) of the parts, and (out, lse) of all keys. empty: (part, head) pairs without keys.

    shift: of the logits, a number, [H, 1], or a tuple of these, which the parts take from its beginning.
    The out of a part without keys is NaN: nobody wrote it.
    """
    f64 = {"dtype": torch.float64}
    shifts = shift if isinstance(shift, tuple) else [shift] * len(sizes)
    logits = [normal(H, n, seed=seed + i, **f64) + shifts[i] for i, n in enumerate(sizes)]
    values = [normal(n, V, seed=seed + 10 + i, **f64) for i, n in enumerate(sizes)]
    for part, head in empty:
        logits[part][head] = -torch.inf

    def attend(logits, values):
        weights, lse = masked_softmax(logits, logits > -torch.inf)
        return weights @ values, lse

    outs, lses = (torch.stack(x) for x in zip(*(attend(*p) for p in zip(logits, values, strict=True)), strict=True))
    outs[lses == -torch.inf] = torch.nan
    return outs, lses, *attend(torch.cat(logits, dim=1), torch.cat(values))


def _expect_merged(solution, parts, cause, only=None):
    outs, lses, whole_out, whole_lse = parts
    out, lse = _pair(solution(outs, lses), "out, lse")
    expect_shape(out, whole_out.shape, name="out")
    expect_shape(lse, whole_lse.shape, name="lse")
    base_2 = torch.log2(torch.exp2(lses).sum(dim=0))
    first_two = torch.logaddexp(lses[0], lses[min(1, len(lses) - 1)])
    pairs = (lses[:2] - first_two).exp()[..., None] * outs[:2]
    wrong_lse = {
        BASE_2: base_2,
        "the log-sum-exps were added: it is their exp that adds up": lses.sum(dim=0),
        "the largest lse was taken for the sum": lses.amax(dim=0),
        "the mean of the lse: denominators add, they are not averaged": lses.mean(dim=0),
        "only the first two parts were merged": first_two,
    }
    wrong_out = {
        "the plain mean of the parts: each counts by exp(lse), its share of the sum": outs.mean(dim=0),
        "the plain sum of the parts: their weights must add up to 1": outs.sum(dim=0),
        "weighted by lse itself, not by exp(lse)": (lses[..., None] * outs).sum(dim=0) / lses.sum(dim=0)[:, None],
        BASE_2: (torch.exp2(lses - base_2)[..., None] * outs).sum(dim=0),
        "only the part with the largest lse was kept": outs.gather(
            0, lses.argmax(dim=0)[None, :, None].expand(1, -1, outs.shape[2])
        )[0],
        "only the first two parts were merged": pairs.sum(dim=0),
    }
    if only != "out":
        expect_close(lse, whole_lse, EXACT, "h", cause, wrong_lse)
    if only != "lse":
        expect_close(out, whole_out, EXACT, "h v", cause, wrong_out)


@merge_splits.property("lse")
def merge_splits_lse(solution):
    for case in MERGES:
        cause = "the merged lse is the log of the sum of exp(lse) over the parts"
        _expect_merged(solution, _parts(*case), cause, only="lse")


@merge_splits.property("weights")
def merge_splits_weights(solution):
    for case in MERGES:
        cause = "a part's weight is exp(lse_part - lse), each head its own"
        _expect_merged(solution, _parts(*case), cause, only="out")


@merge_splits.property("large lse")
def merge_splits_large_lse(solution):
    heads = torch.tensor([[1000.0], [0.0], [-1000.0]], dtype=torch.float64)
    for shift in (1000.0, -1000.0, heads, (heads, 0.0, -heads)):  # the last one: another shift in each part
        for seed, sizes in ((6, (5, 9, 2)), (7, (1, 30))):
            cause = "exp(lse) overflows or vanishes: subtract each head's largest lse first"
            _expect_merged(solution, _parts(seed, 3, 4, sizes, shift), cause)


@merge_splits.property("empty part")
def merge_splits_empty_part(solution):
    for empty in ([(0, 0)], [(2, 1), (1, 1)], [(1, head) for head in range(3)]):
        cause = "a part without keys has lse -inf and nobody wrote its out (NaN here): 0 · NaN is NaN, so replace it"
        _expect_merged(solution, _parts(8, 3, 4, (5, 9, 2), empty=empty), cause)


@merge_splits.property("all empty")
def merge_splits_all_empty(solution):
    for heads, sizes in (((1,), (5, 9, 2)), ((0, 1, 2), (5, 9, 2)), ((0, 2), (7,))):
        empty = [(part, head) for part in range(len(sizes)) for head in heads]
        cause = "where no part saw a key the result is 0 and -inf: -inf minus -inf is NaN, so subtract 0 there"
        _expect_merged(solution, _parts(9, 3, 4, sizes, empty=empty), cause)
