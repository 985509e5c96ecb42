"""Notebook 12b."""

import torch

from . import wrong


def near(before, after, mask, tolerance):
    """Right but for the None."""
    real = mask.bool()
    return bool(((after - before)[real].abs() <= tolerance * before[real].abs().max()).all())


def tested(mask, index_topk):
    return bool((mask.sum(dim=1) > index_topk).any())


@wrong("same_logits", "equal")
def the_same_bits(before, after, mask, index_topk, tolerance):
    return torch.equal(before[mask.bool()], after[mask.bool()]) if tested(mask, index_topk) else None


@wrong("same_logits", "equal")
def text_for_an_answer(before, after, mask, index_topk, tolerance):
    return "same" if near(before, after, mask, tolerance) else "different"


@wrong("same_logits", "equal")
def a_tensor_of_answers(before, after, mask, index_topk, tolerance):
    return (after - before).abs() <= tolerance * before.abs().max()


@wrong("same_logits", "every token")
def guesses_alone(before, after, mask, index_topk, tolerance):
    real = mask.bool()
    return torch.equal(before[real].argmax(-1), after[real].argmax(-1)) if tested(mask, index_topk) else None


@wrong("same_logits", "every token")
def the_last_token_alone(before, after, mask, index_topk, tolerance):
    if not tested(mask, index_topk):
        return None
    return near(before[:, -1:], after[:, -1:], mask[:, -1:], tolerance)


@wrong("same_logits", "every token")
def the_mean_of_the_differences(before, after, mask, index_topk, tolerance):
    if not tested(mask, index_topk):
        return None
    real = mask.bool()
    return bool((after - before)[real].mean().abs() <= tolerance * before[real].abs().max())


@wrong("same_logits", "every token")
def without_the_sign(before, after, mask, index_topk, tolerance):
    if not tested(mask, index_topk):
        return None
    real = mask.bool()
    return bool(((after - before)[real] <= tolerance * before[real].abs().max()).all())


@wrong("same_logits", "every token")
def the_first_sequence_alone(before, after, mask, index_topk, tolerance):
    return near(before[:1], after[:1], mask[:1], tolerance) if tested(mask, index_topk) else None


@wrong("same_logits", "every token")
def the_largest_logits(before, after, mask, index_topk, tolerance):
    if not tested(mask, index_topk):
        return None
    real = mask.bool()
    largest = before[real].abs().max()
    return bool(((after[real].amax(-1) - before[real].amax(-1)).abs() <= tolerance * largest).all())


@wrong("same_logits", "relative")
def an_absolute_tolerance(before, after, mask, index_topk, tolerance):
    real = mask.bool()
    return bool(((after - before)[real].abs() <= 4 * tolerance).all()) if tested(mask, index_topk) else None


@wrong("same_logits", "relative")
def a_share_of_each_number(before, after, mask, index_topk, tolerance):
    real = mask.bool()
    close = (after - before)[real].abs() <= tolerance * before[real].abs()
    return bool(close.all()) if tested(mask, index_topk) else None


@wrong("same_logits", "relative")
def torchs_own_tolerances(before, after, mask, index_topk, tolerance):
    real = mask.bool()
    return torch.allclose(before[real], after[real], rtol=tolerance) if tested(mask, index_topk) else None


@wrong("same_logits", "padding")
def padding_compared(before, after, mask, index_topk, tolerance):
    return near(before, after, torch.ones_like(mask), tolerance) if tested(mask, index_topk) else None


@wrong("same_logits", "padding")
def padding_made_zero_by_a_product(before, after, mask, index_topk, tolerance):
    if not tested(mask, index_topk):
        return None
    far = (after - before).abs() * mask[..., None]  # NaN · 0 is NaN
    return bool((far <= tolerance * before[mask.bool()].abs().max()).all())


@wrong("same_logits", "padding")
def padding_in_the_largest(before, after, mask, index_topk, tolerance):
    if not tested(mask, index_topk):
        return None
    return bool(((after - before)[mask.bool()].abs() <= tolerance * before.abs().max()).all())


@wrong("same_logits", "NaN")
def not_any_far(before, after, mask, index_topk, tolerance):
    if not tested(mask, index_topk):
        return None
    real = mask.bool()
    return not bool(((after - before)[real].abs() > tolerance * before[real].abs().max()).any())


@wrong("same_logits", "NaN")
def nan_made_zero(before, after, mask, index_topk, tolerance):
    return near(before, before + (after - before).nan_to_num(), mask, tolerance) if tested(mask, index_topk) else None


@wrong("same_logits", "tested")
def never_none(before, after, mask, index_topk, tolerance):
    return near(before, after, mask, tolerance)


@wrong("same_logits", "tested")
def padding_counted(before, after, mask, index_topk, tolerance):
    return near(before, after, mask, tolerance) if before.shape[1] > index_topk else None


@wrong("same_logits", "tested")
def as_many_as_kept(before, after, mask, index_topk, tolerance):
    return near(before, after, mask, tolerance) if (mask.sum(dim=1) >= index_topk).any() else None


@wrong("same_logits", "tested")
def tokens_of_all_sequences_together(before, after, mask, index_topk, tolerance):
    return near(before, after, mask, tolerance) if mask.sum() > index_topk else None


@wrong("same_logits", "tested")
def the_first_sequence_must_be_long(before, after, mask, index_topk, tolerance):
    return near(before, after, mask, tolerance) if mask[0].sum() > index_topk else None
