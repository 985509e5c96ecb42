"""What each query may see, as a range of keys instead of a mask [B, 1, S, T]: 8 bytes a query, whatever T is.

transformers asks a registered function for the mask of a whole forward pass, see `visible`. A causal mask with padding
leaves each query one run of keys, and so does packing. Keys that no query sees, between others, are passed over: then
ranges count the seen ones only. Any other mask is refused.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

NAME = "dsa"  # of the attention and of the mask function, among transformers'
NOT_SPARSE = f'attn_implementation "{NAME}" needs make_sparse(model) of dsa_ref.integrations.transformers on this model'
AT_ONCE = 1 << 26  # pairs of a mask that is looked at


class Visible(NamedTuple):
    """The keys that each of S queries may see, of B sequences with T keys each."""

    start: Tensor  # int32 [B, S]: the first key of each query's run
    end: Tensor  # int32 [B, S]: one past its last; equal to start where it sees nothing
    seen: Tensor | None  # bool [B, T]: the keys that start and end count; None: all
    plain: bool  # whether each query sees all keys up to its own: nothing is padded or packed
    keys: int  # T

    def mask(self, T: int) -> Tensor:
        """The same as a mask, bool [B, 1, S, T]."""
        s = torch.arange(T, device=self.start.device)[None]
        if self.seen is not None:
            s = torch.where(self.seen, self.seen.cumsum(-1) - 1, -1)
        s = s[:, None]
        return ((s >= self.start[..., None]) & (s < self.end[..., None]))[:, None]

    def __getitem__(self, place):
        """A field by its number. A layer that takes this for a mask [B, 1, S, T] is told what is missing."""
        if isinstance(place, tuple):
            raise ValueError(NOT_SPARSE)
        return tuple.__getitem__(self, place)

    def contiguous(self) -> "Visible":
        """Itself, contiguous: `generate` asks this of every mask that it makes for a static cache."""
        seen = None if self.seen is None else self.seen.contiguous()
        return Visible(self.start.contiguous(), self.end.contiguous(), seen, self.plain, self.keys)

    def sees_any(self) -> Tensor:
        """bool [B, S]: whether a query sees a key at all; one of left padding does not."""
        return self.end > self.start


def everything(seen: Visible, T: int) -> Tensor:
    """The selection where nothing is left out: int32 [B, S, T], each key in its own place, -1 for what is not seen."""
    s = torch.arange(T, dtype=torch.int32, device=seen.start.device)
    return torch.where(seen.mask(T)[:, 0], s, -1)


def visible(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **unused,
) -> Visible:
    """The mask function that `make_sparse` registers: arguments as transformers passes them to its own `sdpa_mask`.

    mask_function: of (batch, head, query, key) indices, True where the query may see the key; attention_mask: bool
    [B, keys so far], False for padding. Raises ValueError for another shape, and where what a query may see is not one
    run of keys.
    """
    B, S, T = batch_size, q_length, kv_length
    padding = None
    if attention_mask is not None:
        if attention_mask.dim() != 2 or len(attention_mask) != B:
            raise ValueError(
                f"attention_mask must be [{B}, tokens so far] or [{B}, 1, {S}, {T}], got {list(attention_mask.shape)}"
            )
        padding = attention_mask.to(device=device, dtype=torch.bool)
        padding = torch.nn.functional.pad(padding, (0, kv_offset + T))[:, kv_offset : kv_offset + T]  # longer, then cut
    if padding is not None and not torch.compiler.is_compiling() and bool(padding.all()):
        padding = None
    if mask_function is not causal_mask_function:
        pairs = _pairs(mask_function, padding, B, S, T, q_offset, kv_offset, device)
        return from_blocks(pairs, B, T)
    own = torch.arange(S, device=device) + (q_offset - kv_offset)
    end = (own + 1).clamp(max=T)[None].expand(B, S)
    start = torch.zeros(B, S, dtype=torch.int32, device=device)
    if padding is None:
        return Visible(start, end.int(), None, plain=True, keys=T)
    if torch.compiler.is_compiling() or _has_holes(padding):
        count = torch.nn.functional.pad(padding.cumsum(-1), (1, 0))
        return Visible(start, count.gather(1, end).int(), padding, plain=False, keys=T)
    there, first = padding.any(-1, keepdim=True), padding.int().argmax(-1, keepdim=True)
    last = T - padding.flip(-1).int().argmax(-1, keepdim=True)  # one past it
    start, end = torch.where(there, first, 0).expand(B, S), torch.where(there, last, 0).minimum(end)
    return Visible(start.int(), end.maximum(start).int(), None, plain=False, keys=T)


def from_mask(mask: Tensor, B: int, S: int, T: int) -> Visible:
    """A mask [B or 1, 1, S, T] that a user made: bool, True where a query may see a key, or added to the logits, 0 or
    at most the dtype's lowest number. Raises ValueError for other shapes and numbers, or where a row is not one run."""
    if mask.shape not in ((B, 1, S, T), (1, 1, S, T)):
        raise ValueError(f"attention_mask must be [{B}, 1, {S}, {T}] or [{B}, {T}], got {list(mask.shape)}")
    if mask.dtype == torch.bool:
        allowed = mask
    elif mask.is_floating_point():
        allowed = mask == 0
        must(
            (allowed | (mask <= torch.finfo(mask.dtype).min)).all(),
            f"attention_mask must hold 0 and {torch.finfo(mask.dtype).min:g} or -inf: sparse attention adds nothing "
            "else to its logits",
        )
    else:
        raise TypeError(f"attention_mask of rank 4 must be bool or float, got {mask.dtype}")
    allowed, rows = allowed[:, 0].expand(B, S, T), max(1, AT_ONCE // (B * T))
    return from_blocks(lambda: allowed.split(rows, dim=1), B, T)


def from_blocks(blocks: Callable[[], Iterator[Tensor]], B: int, T: int) -> Visible:
    """Ranges of a mask that comes as bool [B, some queries, T], all queries in turn, as often as `blocks` is called."""
    start, end, one_run = _runs(blocks(), None)
    if not torch.compiler.is_compiling() and one_run:
        return Visible(start, end, None, plain=False, keys=T)
    seen = torch.stack([block.any(1) for block in blocks()]).any(0)
    start, end, one_run = _runs(blocks(), torch.where(seen, seen.cumsum(-1) - 1, -1))
    must(
        one_run,
        "attention_mask must let each query see one run of the keys that any query sees (causal, with padding, or "
        "packed): sparse attention takes no other mask",
    )
    return Visible(start, end, seen, plain=False, keys=T)


def must(holds: Tensor, message: str) -> None:
    """ValueError unless it holds; a RuntimeError, when the graph runs, where torch.compile is tracing."""
    if torch.compiler.is_compiling():
        torch._assert_async(holds, message)
    elif not holds:
        raise ValueError(message)


def _runs(blocks: Iterator[Tensor], place: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(start, end, one run): int32 [B, S] of each query's keys, numbered by place [B, T] or in order, and whether no
    row has gaps, bool []."""
    starts, ends, whole = [], [], []
    for block in blocks:
        T = block.shape[-1]
        s = (torch.arange(T, device=block.device)[None] if place is None else place)[:, None]
        count = block.sum(-1)
        first = torch.where(block, s, T).amin(-1)
        last = torch.where(block, s, -1).amax(-1)
        whole.append(((count == 0) | (last - first + 1 == count)).all())
        starts.append(torch.where(count > 0, first, 0))
        ends.append(torch.where(count > 0, last + 1, 0))
    return torch.cat(starts, 1).int(), torch.cat(ends, 1).int(), torch.stack(whole).all()


def _pairs(mask_function, padding, B, S, T, q_offset, kv_offset, device) -> Callable[[], Iterator[Tensor]]:
    """What `from_blocks` reads: a mask function's values, some queries at a time, without padded keys."""

    def blocks():
        b = torch.arange(B, device=device)[:, None, None]
        s = torch.arange(T, device=device)[None, None] + kv_offset
        for t in torch.arange(S, device=device).split(max(1, AT_ONCE // (B * T))):
            block = mask_function(b, 0, t[None, :, None] + q_offset, s).expand(B, len(t), T)
            yield block if padding is None else block & padding[:, None]

    return blocks


def _has_holes(padding: Tensor) -> bool:
    """Whether padding [B, T] has False between True: a batch that was padded more than once."""
    return bool((padding[:, 1:] & ~padding[:, :-1]).sum(-1).add(padding[:, 0].int()).gt(1).any())
