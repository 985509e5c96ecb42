"""Notebook 12: a page of the index cache, slots, scores read out of pages."""

import contextlib
import functools
import pathlib

import numpy as np
import torch

from dsa_ref.index_scores import index_scores

from ..checking import Check, expect, expect_close, expect_shape, spread, tensor, whole

pack_page = Check("pack_page")  # (k_idx e4m3 [n, Di], k_scale fp32 [n], page_size) -> uint8 [page_size · (Di + 4)]
slots_of = Check("slots_of")  # (positions int32 [B, k], page_table int32 [B, P], page_size) -> int [B, k]
paged_scores = Check("paged_scores")  # (q_idx [Hi, Di], w [Hi], index_pages, table [P], length, page_size) -> fp32

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
    wide = torch.nn.functional.pad(k_idx.view(torch.uint8), (0, 3), value=0x7F)
    k_idx = wide[:, :Di].view(torch.float8_e4m3fn)  # rows that lie further apart than they are long
    got = solution(k_idx, k_scale, page_size)
    got = tensor(got, "the page")
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
    every, scales = torch.arange(256, dtype=torch.uint8).view(2, 128).view(torch.float8_e4m3fn), torch.tensor([0.3, 7])
    expected, first = page_of(every, scales, 3), solution(every, scales, 3)
    expect_close(first, expected, 0.0, "byte", "a page holds a key's bytes as they are, NaN's and -0.0's too")
    cause = "wrong where the scales do not lie side by side, as in a view of a larger tensor: .contiguous() first"
    expect_close(solution(every, spread(scales), 3), expected, 0.0, "byte", cause)
    solution(every, 2 * scales, 3)
    expect_close(first, expected, 0.0, "byte", "the page of the call before was changed by this one: make a new one")


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
    got = solution(spread(positions), spread(table), page_size)
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


def _scores(solution, q_idx, w, index_pages, table, length, page_size):
    got = solution(q_idx, w, index_pages, table, length, page_size)
    expect_shape(got, [len(table) * page_size], torch.float32, "scores")
    return got


class _Sequence:
    """One sequence in a pool of pages that holds others' keys too: query, keys, pool, table, and the right scores."""

    def __init__(self, seed, length, page_size, P, Di=8, Hi=3):
        rng = np.random.default_rng(seed)
        self.length, self.page_size, self.P, self.Di = length, page_size, P, Di
        self.q_idx = whole(Hi, Di, seed=seed).to(torch.float8_e4m3fn)
        self.w = whole(Hi, seed=seed + 1) + 0.5
        pages = 2 * P + 1
        self.k_idx = whole(pages * page_size, Di, seed=seed + 2).to(torch.float8_e4m3fn)  # by slot
        scales = rng.uniform(0.5, 1.0, pages * page_size) * 2.0 ** rng.integers(-3, 4, pages * page_size)
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

    def ask(self, solution):
        wide = torch.nn.functional.pad(self.pool(), (0, 12), value=0x7F)  # pages further apart than they are long
        pool = wide[:, : self.page_size * (self.Di + 4)]
        return _scores(solution, self.q_idx, self.w, pool, self.table, self.length, self.page_size)


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
        if length > 1:  # a key of zeros is a key
            s.k_idx.view(torch.uint8)[s.at(torch.tensor([length // 2]))] = 0
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
        got = _scores(solution, step["q_idx"][t], step["w"][t], pool, table, t + 1, page_size)
        expected = torch.full((P * page_size,), -torch.inf)
        expected[: t + 1] = prefill[t, : t + 1]
        cause = (
            f"byte {t} of contextlib.py, layer 3: prefill scores bytes 0 to {t}. Behind them lie the keys of a draft "
            "that was rejected: finite, and not the sequence's"
        )
        expect_close(got, expected, 1e-5, "s", cause)
