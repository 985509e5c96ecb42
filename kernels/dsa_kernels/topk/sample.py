"""A sample of the keys for a fused selection: one of every stretch, and which of them a row sees. One launch.

Schedule: programs of the first kind copy BLOCK sampled keys with their scales, so that they lie side by side; those of
the second kind count, for BLOCK rows, the samples before the row's first key and before its end. A count needs no
search: the stretch in which a key lies follows from a division, and one comparison says on which side of its sample.

Where in its stretch a sample lies is a hash of the stretch's number, see `topk.bound.sampled_place`: the places have no
period that data could share.
"""

import torch
import triton
import triton.language as tl

from ..runtime import cdiv, next_power_of_2

BLOCK = 64


@triton.jit
def place_of(j, S, M: tl.constexpr):
    """Where sample j of M lies among S keys, int64; M at most S."""
    edge, following = j * S // M, (j + 1) * S // M
    return edge + (j * 2654435761 % 65536) * (following - edge) // 65536


@triton.jit
def _before(key, S, M: tl.constexpr):
    """How many samples lie before a key, int64."""
    stretch = tl.minimum(((key + 1) * M - 1) // S, M)
    return stretch + ((stretch < M) & (place_of(stretch, S, M) < key)).to(tl.int64)


@triton.jit(do_not_specialize=["T", "S"])
def _sample(
    k_ptr, scale_ptr, start_ptr, end_ptr, out_ptr, out_scale_ptr, first_ptr, last_ptr, T, S,
    M: tl.constexpr, D: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) < M // BLOCK:
        j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        s, d = place_of(j, S, M), tl.arange(0, D)[None, :]
        tl.store(out_ptr + j[:, None] * D + d, tl.load(k_ptr + s[:, None] * D + d))
        if SCALED:
            tl.store(out_scale_ptr + j, tl.load(scale_ptr + s).to(tl.float32))
    else:
        t = (tl.program_id(0) - M // BLOCK) * BLOCK + tl.arange(0, BLOCK)
        for i in tl.static_range(2):
            keys, counts = (start_ptr, first_ptr) if i == 0 else (end_ptr, last_ptr)
            before = _before(tl.load(keys + t, t < T, 0).to(tl.int64), S, M)
            tl.store(counts + t, before.to(tl.int32), t < T)


def size_of(S):
    """How many of S keys are sampled."""
    return max(2048, min(32768, next_power_of_2(S // 64)))


def sampled_keys(k_idx, k_scale, start, end):
    """(keys [M, Di], scales fp32 [M] or None, first, last): the sampled keys in ascending order, and of each row those
    that it sees, from `first` to before `last`, int32 [T].

    k_idx: contiguous e4m3 [S, Di], Di a power of two and S at least 2048; k_scale: contiguous [S] or None; start, end:
    contiguous int32 [T] between 0 and S.
    """
    (S, D), T, M, device = k_idx.shape, len(start), size_of(len(k_idx)), k_idx.device
    keys = torch.empty(M, D, dtype=k_idx.dtype, device=device)
    scales = None if k_scale is None else torch.empty(M, dtype=torch.float32, device=device)
    first, last = torch.empty_like(start), torch.empty_like(end)
    _sample[(M // BLOCK + cdiv(T, BLOCK),)](
        k_idx.view(torch.uint8), start if k_scale is None else k_scale, start, end,
        keys.view(torch.uint8), first if k_scale is None else scales, first, last, T, S,
        M=M, D=D, SCALED=k_scale is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return keys, scales, first, last
