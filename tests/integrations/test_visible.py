"""Ranges in place of masks: the same keys as transformers' own mask functions let through, and an error for others."""

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    find_packed_sequence_indices,
    or_masks,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from dsa_ref.integrations.transformers import visible as module
from dsa_ref.integrations.transformers.visible import everything, from_mask, visible

T = 37


def given(seed, kind):
    """Arguments of a mask function, as `create_causal_mask` passes them."""
    draw = torch.Generator().manual_seed(seed)
    B = 3
    S = int(torch.randint(1, T + 1, (), generator=draw)) if seed % 2 else T
    arguments = {"batch_size": B, "q_length": S, "kv_length": T, "q_offset": T - S}
    if kind == "static":  # the rest of the buffer is empty
        arguments["q_offset"] = torch.tensor((T - S) // 2)
    lengths = torch.randint(0, T + 1, (B, 1), generator=draw)
    if kind == "left":
        arguments["attention_mask"] = torch.arange(T) >= lengths
    elif kind in ("right", "static"):
        arguments["attention_mask"] = torch.arange(T) < lengths
        arguments["attention_mask"] = arguments["attention_mask"][:, : T - 5]  # transformers pads it
    elif kind == "holes":
        arguments["attention_mask"] = torch.rand(B, T, generator=draw) < 0.6
    elif kind == "packed":
        S = arguments["q_length"] = T
        positions = torch.cat([torch.arange(n) for n in (4, 1, 20, 12)])[None].expand(B, T)
        packed = packed_sequence_mask_function(find_packed_sequence_indices(positions))
        arguments |= {"q_offset": 0, "mask_function": and_masks(causal_mask_function, packed)}
    return arguments


@pytest.mark.parametrize("kind", ("plain", "left", "right", "static", "holes", "packed"))
@pytest.mark.parametrize("seed", range(6))
def test_the_same_keys_as_transformers(kind, seed):
    arguments = given(seed, kind)
    wanted = sdpa_mask(**arguments, allow_is_causal_skip=False)
    seen = visible(**arguments)
    assert torch.equal(seen.mask(T), wanted)
    assert torch.equal(seen.sees_any(), wanted[:, 0].any(-1))
    assert torch.equal(everything(seen, T) >= 0, wanted[:, 0])
    assert seen.start.dtype == seen.end.dtype == torch.int32
    assert (seen.start <= seen.end).all() and (seen.end <= T).all() and (seen.start >= 0).all()
    if seen.seen is None:  # ranges themselves are the keys
        s = torch.arange(T)
        assert torch.equal((s >= seen.start[..., None]) & (s < seen.end[..., None]), wanted[:, 0])


@pytest.mark.parametrize("kind", ("plain", "left", "right", "holes", "packed"))
@pytest.mark.parametrize("at_once", (1, 200, 1 << 20))
def test_a_mask_of_rank_four(kind, at_once, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    mask = sdpa_mask(**given(1, kind), allow_is_causal_skip=False).contiguous()
    B, _, S, _ = mask.shape
    assert torch.equal(from_mask(mask, B, S, T).mask(T), mask)
    added = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, torch.finfo(torch.bfloat16).min)
    assert torch.equal(from_mask(added, B, S, T).mask(T), mask)


def test_only_plain_causal_masks_are_plain():
    assert all(visible(**given(seed, "plain")).plain for seed in range(4))
    assert visible(**given(0, "plain"), attention_mask=torch.ones(3, T)).plain
    for kind in ("left", "right", "holes", "packed"):
        assert not any(visible(**given(seed, kind)).plain for seed in range(4))


OTHERS = {
    "both directions": or_masks(causal_mask_function, lambda b, h, q, k: (q < 5) & (k == 9)),
    "gaps in a row": and_masks(causal_mask_function, lambda b, h, q, k: (q + k) % 3 > 0),
    "two windows": and_masks(causal_mask_function, lambda b, h, q, k: (k < 3) | (q - k < 4)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_masks_are_refused(other):
    function = OTHERS[other]
    with pytest.raises(ValueError, match="attention_mask must let each query see one run"):
        visible(batch_size=2, q_length=T, kv_length=T, mask_function=function)
    mask = sdpa_mask(batch_size=2, q_length=T, kv_length=T, mask_function=function, allow_is_causal_skip=False)
    with pytest.raises(ValueError, match="attention_mask must let each query see one run"):
        from_mask(mask, 2, T, T)


def test_a_window_is_one_run():
    arguments = {"batch_size": 1, "q_length": T, "kv_length": T}
    arguments["mask_function"] = sliding_window_causal_mask_function(5)
    assert torch.equal(visible(**arguments).mask(T), sdpa_mask(**arguments, allow_is_causal_skip=False))


@pytest.mark.parametrize(
    ("mask", "error", "said"),
    [
        (torch.ones(2, 1, 5, 6, dtype=torch.bool), ValueError, r"be \[2, 1, 5, 7\] or \[2, 7\], got \[2, 1, 5, 6\]"),
        (torch.ones(2, 4, 5, 7, dtype=torch.bool), ValueError, r"got \[2, 4, 5, 7\]"),
        (torch.ones(2, 1, 5, 7, dtype=torch.long), TypeError, "must be bool or float, got torch.int64"),
        (torch.full((2, 1, 5, 7), -1.0), ValueError, "must hold 0 and -3.40282e.38 or -inf"),
        (torch.full((2, 1, 5, 7), torch.nan), ValueError, "must hold 0 and"),
        (torch.full((1, 1, 5, 7), torch.finfo(torch.float16).min), ValueError, "must hold 0 and"),
    ],
)  # fmt: skip
def test_bad_masks(mask, error, said):
    with pytest.raises(error, match=said):
        from_mask(mask, 2, 5, 7)
