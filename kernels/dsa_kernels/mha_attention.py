"""MHA mode, for rows that see few keys and for dense training: cuDNN's attention or flash attention, through torch.

Schedule: theirs. Every pair is computed, at 81,920 FLOPs each in V3.2's sizes against 278,528 for a selected one in
MQA mode; so a row that selects all of its few keys is cheaper so, and needs no scores. A key and a value for every
head are 82 KB a token, which is why a long context is not attended to like this without gradients.

Runs of rows that begin at their own start and see up to themselves, as packed sequences do, need no mask of T · S
numbers: runs of one length are a batch for cuDNN, others go to flash attention in one call. That wants one width for
keys and values, so values are padded; its backward pass can give the same bits each time, cuDNN's does not. Where the
rows are a part of the tokens, as one rank's are, a run's keys begin before its rows: flash attention gets a copy of
each run's keys, and the gradients of copies are added up in fp32.
What neither serves (a CPU, fp32, an older card; a mask where a gradient is wanted) is computed by torch, a block of
rows at a time, in fp64, which neither autocast nor TF32 shortens.
"""

import functools
from typing import NamedTuple

import torch
from torch.nn import functional as F

from dsa_ref.contracts import check_mha_attention, row_ranges, unchecked_values, values_readable

from .runtime import FLOATS, check_runnable, dispatched, wants_gradient

LOGITS_AT_ONCE = 1 << 24
COPIES = 4  # of a key, at most, for runs that see it; ranges that need more are no shares of a few sequences


class Run(NamedTuple):
    """Rows [first, last) that see from key `start` on, each one key more than the row before, the last up to `end`."""

    first: int
    last: int
    start: int
    end: int


def mha_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    indices: torch.Tensor | None,
    start: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dsa_ref.mha_attention` by torch's kernels: (out [T, H, Dv] in q.dtype, lse fp32 [T, H]). Differentiable once.

    q: bf16, fp16 or fp32 [T, H, Dq]; k: [S, H, Dq] and v: [S, H, Dv] of that dtype; indices: int32 [T, k], distinct
    within a row, or None for all visible keys; start, end: int32 [T], default causal with the queries last. As many
    queries as keys, with neither indices nor end, and a start that is None or where the row's own run begins, skip what
    lies above the diagonal and need no mask; nor do a start and end of which both grow as in shares of a few sequences.
    Others take one of T · S numbers, as all with a start do where values cannot be read (`unchecked_values`) and no
    gradient is wanted. A row that sees nothing gives 0 and -inf.
    NaN or infinity in a key or value reaches every row of the call, also those that may not see it. Gradients of bf16
    and fp16 are the same bits each time under torch.use_deterministic_algorithms(True) alone.

    Raises: as the reference does (fp64 is a TypeError here); ValueError as `runtime.check_runnable` does. Source: SPEC
    section 3.
    """
    if dispatched():
        return torch.ops.dsa_kernels.mha_attention(q, k, v, scale, indices, start, end)
    check_mha_attention(q, k, v, scale, indices, start, end, FLOATS)
    check_runnable(True, q=q, k=k, v=v)
    if wants_gradient(q, k, v):
        with unchecked_values():  # they are checked
            return torch.ops.dsa_kernels.mha_attention(q, k, v, scale, indices, start, end)
    return attend(q, k, v, scale, indices, start, end, start is not None and values_readable(start))


@torch.no_grad()
def attend(q, k, v, scale, indices, start, end, readable):
    """`mha_attention` of checked arguments. readable: whether the host may wait for the values of start."""
    T, S = len(q), len(k)
    if T == 0:
        return q.new_empty(0, q.shape[1], v.shape[2]), q.new_empty(0, q.shape[1], dtype=torch.float32)
    runs = None if indices is not None else runs_of(T, S, start, end, readable)
    if runs is not None:
        batch = batch_of(runs, S)
        if batch and served_by_cudnn(*heads_first(batch, q, k, v), None, True):
            return by_cudnn(batch, q, k, v, scale, None)
        if served_by_flash(q, v, runs, S):
            return by_flash(q, k, v, scale, runs)
    mask = visible(T, S, q.device, indices, start, end)
    bias = bias_of(mask, q.dtype)
    if not served_by_cudnn(*heads_first(1, q, k, v), bias, False):
        return in_fp64(q, k, v, scale, mask)
    out, lse = by_cudnn(1, q, k, v, scale, bias)
    blind = ~mask.any(dim=1, keepdim=True)
    return out.masked_fill_(blind[..., None], 0.0), lse.masked_fill_(blind, -torch.inf)


@torch.no_grad()
def gradients(q, k, v, scale, indices, start, end, readable, out, lse, dout, dlse):
    """(dq, dk, dv) in the inputs' dtype, from `attend`'s results and the gradients of both; dlse: None for zeros."""
    T, S = len(q), len(k)
    if T == 0:
        return tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    runs = None if indices is not None else runs_of(T, S, start, end, readable)
    if runs is not None:
        batch, repeatable = batch_of(runs, S), torch.are_deterministic_algorithms_enabled()
        if batch and dlse is None and not repeatable and served_by_cudnn(*heads_first(batch, q, k, v), None, True):
            return gradients_by_cudnn(batch, q, k, v, scale, out, lse, dout)
        if served_by_flash(q, v, runs, S):
            return gradients_by_flash(q, k, v, scale, runs, out, lse, dout, dlse)
    mask = visible(T, S, q.device, indices, start, end)
    return gradients_in_fp64(q, k, v, scale, mask, out, lse, dout, dlse)


def runs_of(T, S, start, end, readable):
    """The list of Runs that all rows are. None for any other ranges, for those that need many copies of keys, for a
    start or end that may not be read, and for fewer queries than keys without an end."""
    if end is None and T != S:
        return None
    if start is None and end is None:
        return [Run(0, T, 0, S)]
    if not readable:
        return None
    start, end = row_ranges(T, S, "cpu", *(None if bound is None else bound.cpu() for bound in (start, end)))
    begins = torch.ones(T, dtype=torch.bool, device="cpu")
    begins[1:] = (start[1:] != start[:-1]) | (end[1:] != end[:-1] + 1)
    firsts = begins.nonzero()[:, 0]
    lasts = torch.cat((firsts[1:], firsts.new_tensor([T])))
    runs = torch.stack((firsts, lasts, start[firsts], end[lasts - 1]), dim=1)
    if (end[firsts] <= start[firsts]).any() or int((runs[:, 3] - runs[:, 2]).sum()) > COPIES * S:
        return None
    return [Run(*numbers) for numbers in runs.tolist()]


def on_themselves(runs, S):
    """Whether the runs' keys are their rows, one run behind the other, and all S keys that there are."""
    return runs[-1].end == S and all((run.first, run.last) == (run.start, run.end) for run in runs)


def batch_of(runs, S):
    """How many runs these are if all are of one length, and attend to themselves, else 0."""
    lengths = {run.last - run.first for run in runs}
    return len(runs) if len(lengths) == 1 and on_themselves(runs, S) else 0


def heads_first(batch, *tensors):
    """Views [batch, H, T or S of one run, width] of tensors [T or S, H, width]."""
    return [x.unflatten(0, (batch, -1)).transpose(1, 2) for x in tensors]


def by_cudnn(batch, q, k, v, scale, bias):
    """Runs of one length, causal, or one run with a bias."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads_first(batch, q, k, v), bias, True, is_causal=bias is None, scale=scale
    )
    out, lse = out.transpose(1, 2).flatten(0, 1), lse.flatten(2).transpose(1, 2).flatten(0, 1)
    return out.contiguous(), lse.contiguous()


def gradients_by_cudnn(batch, q, k, v, scale, out, lse, dout):
    """Of `by_cudnn` without a bias. Its sums come in no fixed order."""
    length, unused = len(q) // batch, torch.zeros((), dtype=torch.int64, device=q.device)  # dropout's seed and offset
    of_out, *inputs, out = heads_first(batch, dout, q, k, v, out)
    lse = lse.unflatten(0, (batch, length)).transpose(1, 2)[..., None].contiguous()
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        of_out, *inputs, out, lse, unused, unused, None, None, None, length, length, 0.0, True, scale=scale
    )
    return tuple(x.transpose(1, 2).flatten(0, 1).contiguous() for x in grads)


def flash_width(q, v, more=0):
    """Columns of queries, keys and values as flash attention wants them, with `more` beside the value's own."""
    return -(-max(q.shape[2], v.shape[2] + more) // 8) * 8


def served_by_flash(q, v, runs, S):
    """Whether torch's flash attention takes them, by what torch knows of it; with a column to spare."""
    if not q.is_cuda:
        return False
    like = torch.empty(1, q.shape[1], 1, flash_width(q, v, 1), dtype=q.dtype, device=q.device)
    parameters = torch.backends.cuda.SDPAParams(like, like, like, None, 0.0, False, False)
    if not torch.backends.cuda.can_use_flash_attention(parameters):  # then it could not be asked, either
        return False
    return on_themselves(runs, S) or aligned_to_the_last_key(q.device)


def widened(x, width):
    """x [T, H, columns] with zeros in the columns up to `width`."""
    return F.pad(x, (0, width - x.shape[2])) if x.shape[2] < width else x


@functools.cache
def aligned_to_the_last_key(device):
    """Whether flash attention lets the last of a run's rows see its last key, as a Run says, where keys are more."""
    x = torch.zeros(2, 1, 8, dtype=torch.bfloat16, device=device)
    out, _ = by_flash(x[:1], x, torch.stack((x[0], x[0] + 1)), 1.0, [Run(0, 1, 0, 2)])
    return out[0, 0, 0].item() == 0.5


def bounds_of(runs, device):
    """Flash attention's (cum_seq_q, cum_seq_k, max_q, max_k) of runs, and of their keys behind each other."""
    lengths = torch.tensor([(0, 0), *((run.last - run.first, run.end - run.start) for run in runs)], dtype=torch.int32)
    bounds = lengths.cumsum(dim=0, dtype=torch.int32).T.contiguous().to(device, non_blocking=True)
    return *bounds, *lengths.amax(dim=0).tolist()


def stretches_of(runs):
    """The keys of all runs behind each other, as few ranges (start, end): many short sequences are one copy."""
    found = []
    for run in runs:
        start = found.pop()[0] if found and found[-1][1] == run.start else run.start
        found.append((start, run.end))
    return found


def keys_of(x, runs):
    """Rows [S, ...] of all keys: those of each run behind each other."""
    return x if on_themselves(runs, len(x)) else torch.cat([x[start:end] for start, end in stretches_of(runs)])


def added(dx, runs, like):
    """What `keys_of` did to gradients, undone: the sum of a key's copies, in like's shape and dtype."""
    if on_themselves(runs, len(like)):
        return dx
    total, first = torch.zeros(like.shape, dtype=torch.float32, device=like.device), 0
    for start, end in stretches_of(runs):
        total[start:end] += dx[first : first + end - start]
        first += end - start
    return total.to(like.dtype)


def by_flash(q, k, v, scale, runs):
    """Every run by itself, in one call."""
    wide = [widened(x, flash_width(q, v)) for x in (q, keys_of(k, runs), keys_of(v, runs))]
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *wide, *bounds_of(runs, q.device), 0.0, True, False, scale=scale
    )
    return out[..., : v.shape[2]].contiguous(), lse.T.contiguous()


def gradients_by_flash(q, k, v, scale, runs, out, lse, dout, dlse):
    """Of its backward pass, which knows nothing of a gradient of lse: dS = P · (dout · V + dlse - delta).

    So that goes with one more column, of dout, where V has 1 and out 0, as delta must not see it.
    """
    more = dlse is not None
    width, V = flash_width(q, v, more), v.shape[2]
    given = q, keys_of(k, runs), keys_of(v, runs), out, dout
    q_wide, k_wide, v_wide, out, dout = (widened(x, width) for x in given)
    if more:  # then both are copies: the width has room for it
        v_wide[..., V] = 1.0
        dout[..., V] = dlse.to(dout.dtype)
    unused = torch.empty(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)  # dropout's
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        dout, q_wide, k_wide, v_wide, out, lse.T.contiguous(), *bounds_of(runs, q.device), 0.0, True, *unused,
        scale=scale,
    )  # fmt: skip
    dq, dk, dv = (x[..., :columns].contiguous() for x, columns in ((dq, q.shape[2]), (dk, q.shape[2]), (dv, V)))
    return dq, added(dk, runs, k), added(dv, runs, v)


def visible(T, S, device, indices, start, end):
    """The boolean mask [T, S] of the pairs that ranges and index lists allow."""
    start, end = row_ranges(T, S, device, start, end)
    s = torch.arange(S, device=device)
    mask = (s >= start[:, None]) & (s < end[:, None])
    if indices is not None:
        chosen = torch.zeros(T, S + 1, dtype=torch.bool, device=device)  # -1 goes to the last column
        mask &= chosen.scatter_(1, torch.where(indices < 0, S, indices).long(), True)[:, :S]
    return mask


def bias_of(mask, dtype):
    """What is added to logits, [1, 1, T, S]: finite, since a tile of -inf alone has a softmax of NaN."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min / 2)[None, None]


def served_by_cudnn(q, k, v, bias, causal):
    """Whether cuDNN takes these [1, H, T or S, width], by what torch knows of it."""
    if not (q.is_cuda and torch.backends.cudnn.is_available()):
        return False
    parameters = torch.backends.cuda.SDPAParams(q, k, v, bias, 0.0, causal, False)
    return torch.backends.cuda.can_use_cudnn_attention(parameters)


def in_fp64(q, k, v, scale, mask):
    """Equation 2 over the pairs of mask [T, S], a block of rows at a time."""
    T, H, S = len(q), q.shape[1], len(k)
    out, lse = q.new_empty(T, H, v.shape[2]), q.new_empty(T, H, dtype=torch.float32)
    keys, values, rows = k.double(), v.double(), max(1, LOGITS_AT_ONCE // (H * S))
    for first in range(0, T, rows):
        part = slice(first, first + rows)
        logits = torch.einsum("thd,shd->hts", q[part].double(), keys) * scale
        logits.masked_fill_(~mask[part], -torch.inf)
        total = logits.logsumexp(dim=2, keepdim=True)
        weights = (logits - total.masked_fill(total == -torch.inf, 0.0)).exp()
        out[part] = torch.einsum("hts,shd->thd", weights, values).to(q.dtype)
        lse[part] = total[..., 0].T.float()
    return out, lse


def gradients_in_fp64(q, k, v, scale, mask, out, lse, dout, dlse):
    """The gradients of `in_fp64`, likewise."""
    (T, H, _), S = q.shape, len(k)
    keys, values, rows = k.double(), v.double(), max(1, LOGITS_AT_ONCE // (H * S))
    delta = (out.double() * dout).sum(dim=2)
    delta = delta if dlse is None else delta - dlse
    nothing = lse == -torch.inf
    dq, dk, dv = q.new_empty(q.shape), keys.new_zeros(keys.shape), values.new_zeros(values.shape)
    for first in range(0, T, rows):
        part = slice(first, first + rows)
        some, of_out, of_head = q[part].double(), dout[part].double(), (slice(None), part, None)
        hidden = ~mask[part] | nothing.T[of_head]
        logits = torch.einsum("thd,shd->hts", some, keys) * scale
        weights = (logits - lse.T[of_head]).masked_fill_(hidden, -torch.inf).exp()
        dv += torch.einsum("hts,thd->shd", weights, of_out)
        of_weights = torch.einsum("thd,shd->hts", of_out, values) - delta.T[of_head]
        of_logits = (weights * of_weights).masked_fill_(hidden, 0.0) * scale
        dq[part] = torch.einsum("hts,shd->thd", of_logits, keys).to(q.dtype)
        dk += torch.einsum("hts,thd->shd", of_logits, some)
    return dq, dk.to(k.dtype), dv.to(v.dtype)
