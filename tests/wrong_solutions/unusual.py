"""Notebooks 05 to 07: right numbers on usual inputs, but too much is read or held, or unusual inputs go wrong."""

import numpy as np
import torch
from right_solutions.online_softmax import padding_dropped_inside_the_loop as attention

import dsa_ref

from . import wrong


@wrong("block_attention", "gather")
def adds_all_rows_up_for_nothing(q, kv, indices, scale, v_dim, block):
    kv.sum()
    return attention(q, kv, indices, scale, v_dim, block)


@wrong("block_attention", "gather")
def looks_for_the_largest_of_all_rows(q, kv, indices, scale, v_dim, block):
    np.asarray(kv).max()
    return attention(q, kv, indices, scale, v_dim, block)


@wrong("block_attention", "gather")
def looks_for_nan_in_a_column(q, kv, indices, scale, v_dim, block):
    assert not np.isnan(kv[:, 0]).all()
    return attention(q, kv, indices, scale, v_dim, block)


@wrong("block_attention", "gather")
def computes_with_the_last_row(q, kv, indices, scale, v_dim, block):
    kv[-1] * 0.0
    return attention(q, kv, indices, scale, v_dim, block)


@wrong("block_attention", "memory")
def two_blocks_at_a_time(q, kv, indices, scale, v_dim, block):
    return attention(q, kv, indices, scale, v_dim, 2 * block)


@wrong("block_attention", "memory")
def blocks_of_16_at_least(q, kv, indices, scale, v_dim, block):
    return attention(q, kv, indices, scale, v_dim, max(16, block))


@wrong("block_attention", "one block")
def indices_of_16_bits(q, kv, indices, scale, v_dim, block):
    return attention(q, kv, indices.astype(np.int16), scale, v_dim, block)


@wrong("block_attention", "one block")
def indices_of_8_bits(q, kv, indices, scale, v_dim, block):
    return attention(q, kv, indices.astype(np.int8), scale, v_dim, block)


def merged(out_a, lse_a, out_b, lse_b):
    lse = np.logaddexp(lse_a, lse_b)
    a, b = (np.exp(x - np.where(lse == -np.inf, 0.0, lse))[:, None] for x in (lse_a, lse_b))
    return a * out_a + b * out_b, lse


@wrong("merge_parts", "large lse")
def measured_against_the_first_part(out_a, lse_a, out_b, lse_b):
    m = np.where(lse_a > -np.inf, lse_a, np.where(lse_b > -np.inf, lse_b, 0.0))
    with np.errstate(all="ignore"):
        a, b = np.exp(lse_a - m), np.exp(lse_b - m)
        out = (a[:, None] * out_a + b[:, None] * out_b) / np.where(a + b > 0, a + b, 1.0)[:, None]
        return out, m + np.log(a + b)


@wrong("merge_parts", "empty part")
def an_empty_part_weighs_as_much_as_a_key_of_logit_0(out_a, lse_a, out_b, lse_b):
    return merged(out_a, np.where(lse_a == -np.inf, 0.0, lse_a), out_b, np.where(lse_b == -np.inf, 0.0, lse_b))


@wrong("merge_parts", "lse")
def the_lse_of_the_call_before(out_a, lse_a, out_b, lse_b, seen=[]):  # noqa: B006 (the fault)
    seen.append(lse_a.copy())
    alike = len(seen) > 1 and len(lse_a) == 1 and seen[-2].shape == lse_a.shape
    return merged(out_a, seen[-2] if alike else lse_a, out_b, lse_b)


# --------------------------------------------------------------------------------------------------------------- 06


@wrong("cache_bytes", "mha")
def answers_for_the_first_of_so_many_heads(config, known={}):  # noqa: B006 (the fault)
    c = config
    head = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
    row = c.kv_lora_rank + 2 * c.qk_rope_head_dim
    answer = {
        "mha": 2 * c.n_heads * head,
        "mla": row + c.kv_lora_rank,
        "fp8": row + 4 * len(range(0, c.kv_lora_rank, 128)),
    }
    return known.setdefault((c.n_heads, c.kv_lora_rank), answer)


# --------------------------------------------------------------------------------------------------------------- 07


@wrong("quantize", "runs")
def joins_the_leading_axes_by_view(x):
    x8, scale = dsa_ref.quantize(x.view(-1, x.shape[-1]))
    return x8.view(x.shape), scale.view(x.shape[:-1])


@wrong("hadamard", "shape")
def rotates_in_fp64(x):
    return dsa_ref.hadamard(x).double()


def flips_of(selected, reference):
    rows = [
        (set(got) - {-1}, set(wanted) - {-1}) for got, wanted in zip(selected.tolist(), reference.tolist(), strict=True)
    ]
    return sum(len(wanted - got) / len(wanted) if wanted else 0.0 for got, wanted in rows) / len(rows)


@wrong("flips", "mean over rows")
def a_bit_mask_of_64_keys(selected, reference):
    return flips_of(*(torch.where(side >= 0, side % 64, -1) for side in (selected, reference)))


@wrong("flips", "mean over rows")
def keys_of_16_bits(selected, reference):
    return flips_of(selected.to(torch.int16), reference.to(torch.int16))


@wrong("flips", "mean over rows")
def keys_through_fp32(selected, reference):
    return flips_of(selected.float(), reference.float())
