"""Notebook 07."""

import torch

import dsa_ref
from dsa_ref.quantize import power_of_two_at_least

from . import wrong

E4M3 = torch.float8_e4m3fn


def parts(x, largest=448.0, floor=1e-4):
    """x as fp32, and amax / largest of each vector."""
    x = x.float()
    return x, x.abs().amax(dim=-1).clamp(min=floor) / largest


def cast(x, scale):
    return (x / scale[..., None]).clamp(-448, 448).to(E4M3), scale


def scaled(x):
    """x / scale, not yet cast, and the right scale."""
    x, ratio = parts(x)
    scale = power_of_two_at_least(ratio)
    return x / scale[..., None], scale


@wrong("quantize", "shapes and types")
def scale_keeps_its_axis(x):
    x8, scale = dsa_ref.quantize(x)
    return x8, scale[..., None]


@wrong("quantize", "shapes and types")
def values_stay_wide(x):
    x8, scale = dsa_ref.quantize(x)
    return x8.float(), scale


@wrong("quantize", "shapes and types")
def a_single_number_as_the_scale(x):
    scale = power_of_two_at_least(x.float().abs().max() / 448)
    return (x / scale).to(E4M3), scale


@wrong("quantize", "zero row")
def no_floor(x):
    x, ratio = parts(x, floor=0.0)
    return cast(x, torch.exp2(ratio.log2().ceil()))


@wrong("quantize", "power of two")
def the_plain_quotient(x):
    return cast(*parts(x))


@wrong("quantize", "one scale a vector")
def one_scale_for_the_whole_tensor(x):
    x = x.float()
    scale = power_of_two_at_least(x.abs().max().clamp(min=1e-4) / 448)
    return cast(x, scale.expand(x.shape[:-1]).clone())


@wrong("quantize", "scale")
def exponent_rounded_down(x):
    x, ratio = parts(x)
    return cast(x, torch.exp2(ratio.log2().floor()))


@wrong("quantize", "scale")
def computed_in_the_type_of_x(x):
    ratio = x.abs().amax(dim=-1).clamp(min=1e-4) / 448
    return cast(x.float(), torch.exp2(ratio.log2().ceil()).float())


@wrong("quantize", "scale")
def exponent_field_plus_one(x):
    """Right but where amax / 448 is a power of two."""
    x, ratio = parts(x)
    return cast(x, torch.exp2(ratio.log2().floor() + 1))


@wrong("quantize", "scale")
def scale_returned_upside_down(x):
    x8, scale = dsa_ref.quantize(x)
    return x8, 1 / scale


@wrong("quantize", "scale")
def largest_instead_of_largest_magnitude(x):
    x = x.float()
    return cast(x, power_of_two_at_least(x.amax(dim=-1).clamp(min=1e-4) / 448))


@wrong("quantize", "scale")
def power_of_two_for_127(x):
    x, ratio = parts(x, largest=127.0)
    return cast(x, power_of_two_at_least(ratio))


@wrong("quantize", "amax floor")
def only_zeros_get_the_floor(x):
    x = x.float()
    amax = x.abs().amax(dim=-1)
    return cast(x, power_of_two_at_least(torch.where(amax == 0, 1e-4, amax) / 448))


@wrong("quantize", "nearest value")
def wraps_as_an_8_bit_integer(x):
    y, scale = scaled(x)
    return y.round().to(torch.int32).to(torch.int8).float().to(E4M3), scale


@wrong("quantize", "nearest value")
def whole_numbers_only(x):
    y, scale = scaled(x)
    return y.round().to(E4M3), scale


@wrong("quantize", "nearest value")
def digits_cut_off(x):
    y, scale = scaled(x)
    step = torch.exp2((torch.frexp(y)[1] - 4).clamp(min=-9).float())
    return ((y / step).trunc() * step).to(E4M3), scale


@wrong("quantize", "nearest value")
def rounded_to_bf16_first(x):
    y, scale = scaled(x)
    return y.bfloat16().to(E4M3), scale


@wrong("quantize", "nearest value")
def multiplied_by_the_scale(x):
    _, scale = scaled(x)
    return (x.float() * scale[..., None]).clamp(-448, 448).to(E4M3), scale


@wrong("quantize", "nearest value")
def clamped_to_240(x):
    """The largest value of another e4m3, without the `fn`."""
    y, scale = scaled(x)
    return y.clamp(-240, 240).to(E4M3), scale


@wrong("quantize", "small values")
def subnormals_flushed(x):
    x8, scale = dsa_ref.quantize(x)
    values = x8.float()
    return torch.where(values.abs() < 2.0**-6, 0.0, values).to(E4M3), scale


def sylvester(D):
    return torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(D)] for i in range(D)])


def rotated_by(matrix, x):
    return x @ matrix.T / x.shape[-1] ** 0.5


@wrong("hadamard", "shape")
def leading_axes_flattened(x):
    return dsa_ref.hadamard(x).reshape(-1, x.shape[-1])


@wrong("hadamard", "last axis")
def first_axis(x):
    return dsa_ref.hadamard(x.transpose(0, -1)).transpose(0, -1) if x.shape[0] == x.shape[-1] else dsa_ref.hadamard(x)


@wrong("hadamard", "length kept")
def not_normalised(x):
    return dsa_ref.hadamard(x) * x.shape[-1] ** 0.5


@wrong("hadamard", "length kept")
def slices_overwritten(x):
    y, D, width = x.clone(), x.shape[-1], 1
    while width < D:
        for i in range(0, D, 2 * width):
            a, b = y[..., i : i + width], y[..., i + width : i + 2 * width]
            y[..., i : i + width] = a + b
            y[..., i + width : i + 2 * width] = a - b  # a is a + b by now
        width *= 2
    return y / D**0.5


@wrong("hadamard", "Sylvester order")
def or_instead_of_and(x):
    D = x.shape[-1]
    return rotated_by(torch.tensor([[(-1.0) ** bin(i | j).count("1") for j in range(D)] for i in range(D)]), x)


def even_and_odd(x):
    if x.shape[-1] == 1:
        return x
    a, b = x[..., ::2], x[..., 1::2]
    return torch.cat((even_and_odd(a + b), even_and_odd(a - b)), dim=-1)


@wrong("hadamard", "Sylvester order")
def even_and_odd_instead_of_halves(x):
    return even_and_odd(x) / x.shape[-1] ** 0.5


@wrong("hadamard", "Sylvester order")
def ordered_by_sign_changes(x):
    H = sylvester(x.shape[-1])
    return rotated_by(H[(H.diff(dim=1) != 0).sum(dim=1).argsort()], x)


@wrong("hadamard", "Sylvester order")
def difference_the_wrong_way_round(x):
    """b - a in every round: a minus for every one in i, as for i & i."""
    return dsa_ref.hadamard(x) * sylvester(x.shape[-1]).diagonal()


@wrong("hadamard", "runs")
def two_halves_and_a_last_round(x):
    """Right from D = 2 on: D = 1 has no halves."""
    a, b = (dsa_ref.hadamard(half) for half in x.chunk(2, dim=-1))
    return torch.cat((a + b, a - b), dim=-1) / 2**0.5


@wrong("hadamard", "any power of two")
def seven_rounds_at_most(x):
    width = min(x.shape[-1], 128)
    return dsa_ref.hadamard(x.unflatten(-1, (-1, width))).flatten(-2) * (width / x.shape[-1]) ** 0.5


@wrong("hadamard", "inputs")
def in_place(x):
    x *= x.shape[-1] ** -0.5
    return x @ sylvester(x.shape[-1])


def dots(q8, k8):
    return torch.einsum("thd,sd->ths", q8.float(), k8.float())


def weighted(rectified, w, k_scale):
    return torch.einsum("ths,th->ts", rectified, w) * k_scale


@wrong("scores_from_fp8", "relu per head")
def one_matrix_a_head(q8, q_scale, k8, k_scale, w):
    return dots(q8, k8).relu() * (w * q_scale)[..., None] * k_scale


@wrong("scores_from_fp8", "runs")
def sums_in_float8(q8, q_scale, k8, k_scale, w):
    return weighted(torch.einsum("thd,sd->ths", q8, k8).relu(), w * q_scale, k_scale)


@wrong("scores_from_fp8", "relu per head")
def no_relu(q8, q_scale, k8, k_scale, w):
    return weighted(dots(q8, k8), w * q_scale, k_scale)


@wrong("scores_from_fp8", "relu per head")
def relu_after_the_sum(q8, q_scale, k8, k_scale, w):
    return weighted(dots(q8, k8), w * q_scale, k_scale).relu()


@wrong("scores_from_fp8", "relu per head")
def future_hidden(q8, q_scale, k8, k_scale, w):
    scores = weighted(dots(q8, k8).relu(), w * q_scale, k_scale)
    return scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf)


@wrong("scores_from_fp8", "weights keep their sign")
def everything_inside_the_relu(q8, q_scale, k8, k_scale, w):
    """Allowed for the scales, which are positive; not for w."""
    return (dots(q8, k8) * (w * q_scale)[..., None] * k_scale).relu().sum(dim=1)


@wrong("scores_from_fp8", "weights keep their sign")
def softmaxed_signs(q8, q_scale, k8, k_scale, w):
    return weighted(dots(q8, k8).relu(), w.abs() * q_scale, k_scale)


@wrong("scores_from_fp8", "k_scale")
def k_scale_forgotten(q8, q_scale, k8, k_scale, w):
    return weighted(dots(q8, k8).relu(), w * q_scale, 1.0)


@wrong("scores_from_fp8", "k_scale")
def k_scale_twice(q8, q_scale, k8, k_scale, w):
    return weighted((dots(q8, k8) * k_scale).relu(), w * q_scale, k_scale)


@wrong("scores_from_fp8", "k_scale")
def k_scale_by_query(q8, q_scale, k8, k_scale, w):
    """Runs where there are as many queries as keys."""
    return torch.einsum("ths,th->ts", dots(q8, k8).relu(), w * q_scale) * k_scale[:, None]


@wrong("scores_from_fp8", "q_scale")
def q_scale_forgotten(q8, q_scale, k8, k_scale, w):
    return weighted(dots(q8, k8).relu(), w, k_scale)


@wrong("scores_from_fp8", "q_scale")
def q_scale_inside_and_in_the_weight(q8, q_scale, k8, k_scale, w):
    return weighted((dots(q8, k8) * q_scale[..., None]).relu(), w * q_scale, k_scale)


@wrong("scores_from_fp8", "q_scale")
def one_q_scale_a_query(q8, q_scale, k8, k_scale, w):
    return weighted(dots(q8, k8).relu(), w, k_scale) * q_scale.mean(dim=1, keepdim=True)


@wrong("scores_from_fp8", "q_scale")
def scaled_back_into_eight_bits(q8, q_scale, k8, k_scale, w):
    return weighted(dots((q8.float() * q_scale[..., None]).to(E4M3), k8).relu(), w, k_scale)


@wrong("scores_from_fp8", "T is not S")
def as_many_keys_as_queries(q8, q_scale, k8, k_scale, w):
    scores = torch.zeros(len(w), len(w))
    for t in range(len(w)):
        for s in range(min(len(w), len(k_scale))):
            scores[t, s] = ((q8[t].float() @ k8[s].float()).relu() * w[t] * q_scale[t]).sum() * k_scale[s]
    return scores


def by_row(share, selected, reference, absent=(-1,)):
    """The mean over rows of share(set selected, set of the reference)."""
    pairs = zip(selected.tolist(), reference.tolist(), strict=True)
    shares = [share(set(a) - set(absent), set(b) - set(absent)) for a, b in pairs]
    return sum(shares) / len(shares)


@wrong("flips", "nothing changed")
def the_share_that_stayed(selected, reference):
    return by_row(lambda a, b: len(a & b) / len(b) if b else 1.0, selected, reference)


@wrong("flips", "order is free")
def place_by_place(selected, reference):
    return float(((selected != reference) & (reference >= 0)).sum() / (reference >= 0).sum())


@wrong("flips", "share of the keys")
def gone_and_come_counted(selected, reference):
    return by_row(lambda a, b: len(a ^ b) / len(b) if b else 0.0, selected, reference)


@wrong("flips", "share of the keys")
def number_of_keys(selected, reference):
    return by_row(lambda a, b: len(b - a), selected, reference)


@wrong("flips", "share of the keys")
def share_of_the_union(selected, reference):
    return by_row(lambda a, b: len(a ^ b) / len(a | b) if b else 0.0, selected, reference)


@wrong("flips", "share of the keys")
def rows_in_which_anything_changed(selected, reference):
    return by_row(lambda a, b: a != b, selected, reference)


@wrong("flips", "share of the keys")
def keys_of_all_rows_in_one_set(selected, reference):
    return float(1 - torch.isin(reference, selected).float().mean())


@wrong("flips", "-1 ignored")
def padding_is_a_key(selected, reference):
    return by_row(lambda a, b: len(b - a) / len(b), selected, reference, absent=())


@wrong("flips", "-1 ignored")
def divided_by_k(selected, reference):
    return by_row(lambda a, b: len(b - a) / reference.shape[1], selected, reference)


@wrong("flips", "mean over rows")
def all_rows_pooled(selected, reference):
    keys = max(1, int((reference >= 0).sum()))
    return by_row(lambda a, b: len(b - a), selected, reference) * len(reference) / keys


@wrong("flips", "empty row")
def empty_rows_count_as_changed(selected, reference):
    return by_row(lambda a, b: 1 - len(a & b) / max(1, len(b)), selected, reference)


@wrong("flips", "empty row")
def empty_rows_left_out(selected, reference):
    full = reference[:, 0] >= 0
    return by_row(lambda a, b: len(b - a) / len(b), selected[full], reference[full])
