"""The faults of `table`, each a short variant of one function of the reference. What is wrong carries a ✗.

A variant calls the right functions by the names imported here, which planting leaves alone.
"""

import math

import torch
from torch.nn import functional as F

from dsa_ref.blocks import visible
from dsa_ref.contracts import row_ranges
from dsa_ref.hadamard import hadamard
from dsa_ref.index_scores import index_scores
from dsa_ref.lightning_select import lightning_select
from dsa_ref.nn.layer import DSALayer, Indexer
from dsa_ref.quantize import AMAX_FLOOR, E4M3_MAX, quantize
from dsa_ref.rope import rope
from dsa_ref.rotate_quantize import rotate_quantize
from dsa_ref.select_topk import select_topk
from dsa_ref.sparse_attention import sparse_attention

right_indexer, right_index = Indexer.forward, DSALayer._index

# ------------------------------------------------------------------------------- projections: x -> q, k, w


def unnormalised_latent(self, x, q_latent, positions):
    return right_index(self, x, self.q_a_proj(x), positions)  # ✗ without q_a_layernorm


def rms_norm_on_k(self, x, q_latent):
    q, _, w = right_indexer(self, x, q_latent)
    norm, k = self.k_norm, self.wk(x.detach()).float()
    k = F.rms_norm(k, norm.normalized_shape, norm.weight.float(), norm.eps)  # ✗ LayerNorm: no mean, no bias here
    return q, k.to(x.dtype), w


def softmaxed_weights(self, x, q_latent):
    q, k, _ = right_indexer(self, x, q_latent)
    w = F.linear(x.detach().float(), self.weights_proj.weight.float())
    return q, k, w.softmax(dim=-1)  # ✗ now positive, and they sum to 1


def bf16_head_weights(self, x, q_latent):
    q, k, _ = right_indexer(self, x, q_latent)
    w = F.linear(x.detach().bfloat16(), self.weights_proj.weight.bfloat16()).float()  # ✗ not in fp32
    return q, k, w * self.config.index_n_heads**-0.5 * self.config.index_head_dim**-0.5


def weights_without_constant(self, x, q_latent):
    q, k, _ = right_indexer(self, x, q_latent)
    return q, k, F.linear(x.detach().float(), self.weights_proj.weight.float())  # ✗ without Hi^-0.5 · Di^-0.5


# --------------------------------------------------------------------- positions, rotation and eight bits


def interleaved_index_rope(x, positions, freqs):
    return quantize(hadamard(rope(x, positions, freqs, "interleaved")))  # ✗ MLA's layout; the indexer's is "half"


def rope_on_the_wrong_end(x, positions, freqs):
    R = 2 * len(freqs)
    turned = rope(x.roll(R, dims=-1), positions, freqs, "half").roll(-R, dims=-1)  # ✗ the last R dims, not the first
    return quantize(hadamard(turned))


def positions_restart(x, positions, freqs):
    return rotate_quantize(x, positions - positions[:1], freqs)  # ✗ every chunk counts from 0


def one_side_rotated(x, positions, freqs):
    turned = rope(x, positions, freqs, "half")
    return quantize(hadamard(turned) if x.dim() == 3 else turned)  # ✗ q [T, Hi, Di] is rotated, k [S, Di] is not


def half_split_mla_rope(x, positions, freqs, layout):
    return rope(x, positions, freqs, "half")  # ✗ whatever the layout asked for; MLA's is "interleaved"


def e4m3_by(x, scale):
    return (x / scale[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def no_amax_floor(x):
    x = x.detach().float()
    return e4m3_by(x, torch.exp2(torch.ceil(torch.log2(x.abs().amax(dim=-1) / E4M3_MAX))))  # ✗ 0 for zeros: 0 / 0


def scale_rounded_down(x):
    x = x.detach().float()
    amax = x.abs().amax(dim=-1).clamp(min=AMAX_FLOOR)
    return e4m3_by(x, torch.exp2(torch.floor(torch.log2(amax / E4M3_MAX))))  # ✗ ceil: now the largest are cut off


# ------------------------------------------------------------------------------------------------- scores


def scores_of(q_idx, k_idx, w, k_scale, start, end, combine):
    """Equation 1 with `combine(dots [T, Hi, S], w [T, Hi, 1])` [T, S] in place of the weighted sum of relus."""
    dtype = torch.float64 if q_idx.dtype == torch.float64 else torch.float32
    dots = torch.einsum("thd,sd->ths", q_idx.to(dtype), k_idx.to(dtype))
    scores = combine(dots, w.to(dtype)[:, :, None])
    if k_scale is not None:
        scores = scores * k_scale.to(dtype)
    (T, S), (start, end) = scores.shape, row_ranges(*scores.shape, scores.device, start, end)
    return scores.masked_fill(~visible(start, end, slice(0, T), slice(0, S)), -torch.inf)


def no_relu(q_idx, k_idx, w, k_scale=None, start=None, end=None):
    return scores_of(q_idx, k_idx, w, k_scale, start, end, lambda dots, w: (w * dots).sum(dim=1))  # ✗ dots.relu()


def weight_inside_the_relu(q_idx, k_idx, w, k_scale=None, start=None, end=None):
    return scores_of(q_idx, k_idx, w, k_scale, start, end, lambda dots, w: (w * dots).relu().sum(dim=1))  # ✗ signs


def key_scale_left_out(q_idx, k_idx, w, k_scale=None, start=None, end=None):
    return index_scores(q_idx, k_idx, w, None, start, end)  # ✗ every key counts as if its FP8 scale were 1


# ---------------------------------------------------------------------------------------------- selection


def last_key_wins_ties(scores, k, start=None, end=None):
    T, S = scores.shape
    start, end = row_ranges(T, S, scores.device, start, end)
    mirrored = select_topk(scores.flip(1), k, S - end, S - start)  # ✗ the first in the mirror is the last
    return torch.where(mirrored < 0, -1, S - 1 - mirrored).to(torch.int32)


def threshold_with_ge(scores, k, start=None, end=None):
    T, S = scores.shape
    mask = visible(*row_ranges(T, S, scores.device, start, end), slice(0, T), slice(0, S))
    block = scores.masked_fill(~mask, -torch.inf)
    kept = (block >= block.topk(min(k, S)).values[:, -1:]) & mask  # ✗ all that tie, perhaps more than k
    place = kept.cumsum(dim=1) - 1
    row, column = (kept & (place < k)).nonzero(as_tuple=True)  # so the list is full before the last keys come
    indices = torch.full((T, k), -1, dtype=torch.int32, device=scores.device)
    indices[row, place[row, column]] = column.to(torch.int32)
    return indices


def zero_padding(scores, k, start=None, end=None):
    return select_topk(scores, k, start, end).clamp(min=0)  # ✗ -1 became 0, which is a real key


def own_key_hidden(q_idx, k_idx, w, k, k_scale=None, start=None, end=None):
    T, S = len(q_idx), len(k_idx)
    start, end = row_ranges(T, S, q_idx.device, start, end)
    return lightning_select(q_idx, k_idx, w, k, k_scale, start, end - 1 if S > T else end)  # ✗ S - T + t + 1


def future_key_visible(q_idx, k_idx, w, k, k_scale=None, start=None, end=None):
    T, S = len(q_idx), len(k_idx)
    start, end = row_ranges(T, S, q_idx.device, start, end)
    return lightning_select(q_idx, k_idx, w, k, k_scale, start, (end + 1).clamp(max=S))  # ✗ S - T + t + 1


# ---------------------------------------------------------------------------------------------- attention


def minus_one_as_the_last_row(q, kv, indices, scale, v_dim):
    return sparse_attention(q, kv, indices % len(kv), scale, v_dim)  # ✗ -1 is "nothing", here it is row S - 1


def base_2_lse(q, kv, indices, scale, v_dim):
    out, lse = sparse_attention(q, kv, indices, scale, v_dim)
    return out, lse / math.log(2)  # ✗ log2 of the sum; ours is the natural logarithm


@property
def scale_of_the_latent_row(self):
    return self.latent_dim**-0.5  # ✗ the width of q and kv in MQA mode; the model was trained with (nope + rope)^-0.5
