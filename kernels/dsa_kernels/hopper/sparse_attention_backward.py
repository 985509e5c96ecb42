"""The gradient of sparse attention on Hopper's tensor cores, V3.2's sizes, the same bits each time.

    query pass   `backward_query`: 64 heads of a query. S, P, dP, dS, dq; P and dS go to memory in bf16
    key pass     `backward_keys`: all heads of a query, half of the columns. The rows Pᵀ · dout + dSᵀ · q, in bf16
    sums         `key_sums`: the rows of each key, in the order of the queries, in fp32

P and dS are computed once and read twice, since neither pass could hold the other's sums: dq of 64 heads and the rows
of 64 keys have 36,864 numbers each, 288 a thread of a warpgroup, and a thread has 255 registers.

The passes take so many queries at a time as `runtime.GRADIENTS_AT_ONCE` allows, and of these a number that fills the
card's multiprocessors whole times: each program has a multiprocessor to itself, and takes as long as all others.

Of a pair, over 128 heads: 704,512 FLOPs; P and dS 512 bytes, written and read; its row 1152 bytes, written and read. At
the speed that tensor cores reach in practice both take about as long. `python -m dsa_bench.training`
measures it; the chapter kernels/book/sparse_attention_backward.md has the clocks, the bytes, and what did not help.

Read `backward_shared` first: what the warpgroups share, and how they wait for each other.
"""

import functools

import torch
from torch.nn.functional import pad

from .. import runtime
from ..cards import on_hopper
from ..key_sums import places_of_keys, sum_rows
from ..runtime import aligned, multiprocessors
from .backward_keys import key_pass
from .backward_query import query_pass

D, V = 576, 512
HEADS = (64, 128)  # what the kernels take; fewer heads are filled up with zeros


def cannot_serve(q, v_dim):
    """Why this variant cannot compute the gradients for these queries, or None."""
    if not on_hopper(q):
        return "needs a GPU of compute capability 9.0"
    if q.dtype != torch.bfloat16:
        return f"needs bfloat16, got {str(q.dtype).removeprefix('torch.')}"
    if (q.shape[-1], v_dim) != (D, V):
        return f"needs D = {D} and v_dim = {V}, got {q.shape[-1]} and {v_dim}"
    if q.shape[1] > HEADS[-1]:
        return f"needs at most {HEADS[-1]} heads, got {q.shape[1]}"
    return None


def queries_at_once(T, H, k, sorted_sums, multiprocessors):
    """How many queries go through the passes together."""
    bytes_of_one = k * (4 * H + 4 * H // 64 + (2 * D + 4 if sorted_sums else 0))  # P, dS; P's sums; row and place
    most = max(1, runtime.GRADIENTS_AT_ONCE // bytes_of_one)
    wave = max(1, multiprocessors // 2)  # both passes have two programs a query, or with 64 heads the key pass has
    return min(T, most - most % wave if most > wave else most)


@functools.cache
def _side_stream(device):
    return torch.cuda.Stream(device)


def _places_beside(lists, S):
    """`places_of_keys` on a stream of its own, for `_wait_for_places`."""
    if not lists.is_cuda:  # compiled without a GPU
        return places_of_keys(lists, S)
    side = _side_stream(lists.device)
    side.wait_stream(torch.cuda.current_stream(lists.device))
    with torch.cuda.stream(side):
        return places_of_keys(lists, S)


def _wait_for_places(places):
    for x in places:
        if x.is_cuda:
            here = torch.cuda.current_stream(x.device)
            here.wait_stream(_side_stream(x.device))
            x.record_stream(here)  # or its memory could be given away while it is read here


def sparse_attention_backward(q, kv, lists, scale, v_dim, lse, dout, delta, sorted_sums, dq, dkv, target):
    """Write dq, dkv and target. `dsa_kernels.sparse_attention_backward` has checked the arguments."""
    (T, heads, _), S, places = q.shape, len(kv), lists.shape[1]
    H = next(n for n in HEADS if n >= heads)
    lists = pad(lists, (0, -places % 64), value=-1)
    q, kv, dout, lists = (aligned(x) for x in (q, kv, dout, lists))
    k = lists.shape[1]
    n = queries_at_once(T, H, k, sorted_sums, multiprocessors(q))
    bf16, fp32 = ({"dtype": dtype, "device": q.device} for dtype in (torch.bfloat16, torch.float32))
    p, ds = (torch.empty(n * H * k // 64, 64, **bf16) for _ in range(2))
    sums = torch.empty(n, H // 64, k, **fp32)
    rows = torch.empty(n * k, D, **bf16) if sorted_sums else None
    kept = torch.zeros(S, D, **fp32) if n < T or not sorted_sums else dkv
    for start in range(0, T, n):
        some = slice(start, min(T, start + n))
        m = some.stop - start
        some_q, some_dout, some_lse, some_delta, some_dq = q[some], dout[some], lse[some], delta[some], dq[some]
        if heads < H:
            some_q, some_dout = (pad(x, (0, 0, 0, H - heads)) for x in (some_q, some_dout))
            some_lse, some_delta = pad(some_lse, (0, H - heads), value=-torch.inf), pad(some_delta, (0, H - heads))
            some_dq = torch.empty_like(some_q)
        some_lists = lists[some]
        order = _places_beside(some_lists, S) if sorted_sums else None  # beside the query pass, which hides most of it
        query_pass(some_q, some_dout, kv, some_lists, some_lse, some_delta, scale, some_dq, p, ds, sums)
        key_pass(some_q, some_dout, some_lists, p, ds, rows if sorted_sums else kept, not sorted_sums)
        if heads < H:
            dq[some] = some_dq[:, :heads]
        mean = sums[:m].sum(dim=1) / heads
        target[some] = mean.masked_fill_(some_lists < 0, 0.0)[:, :places]
        if sorted_sums:
            _wait_for_places(order)
            sum_rows(rows, *order, kept, dkv, start == 0, some.stop == T)
    if not sorted_sums:
        dkv.copy_(kept)
