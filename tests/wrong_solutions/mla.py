"""Notebook 06."""

import math

import torch

from . import wrong

# ------------------------------------------------------------------------------------------------------- cache_bytes


def sizes(config, mha=None, mla=None, fp8=None):
    """The right answer with one entry replaced."""
    c = config
    right = {
        "mha": 2 * c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim),
        "mla": 2 * (c.kv_lora_rank + c.qk_rope_head_dim),
        "fp8": c.kv_lora_rank + 4 * math.ceil(c.kv_lora_rank / 128) + 2 * c.qk_rope_head_dim,
    }
    return right | {key: value for key, value in {"mha": mha, "mla": mla, "fp8": fp8}.items() if value is not None}


@wrong("cache_bytes", "mha")
def keys_without_values(config):
    return sizes(config, mha=2 * config.n_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim))


@wrong("cache_bytes", "mha")
def nope_for_the_value_since_both_are_128(config):
    return sizes(config, mha=2 * config.n_heads * (2 * config.qk_nope_head_dim + config.qk_rope_head_dim))


@wrong("cache_bytes", "mha")
def three_numbers_without_names(config):
    return tuple(sizes(config).values())


@wrong("cache_bytes", "mla")
def a_row_for_each_head(config):
    return sizes(config, mla=2 * config.n_heads * (config.kv_lora_rank + config.qk_rope_head_dim))


@wrong("cache_bytes", "mla")
def a_rope_key_for_each_head(config):
    return sizes(config, mla=2 * (config.kv_lora_rank + config.n_heads * config.qk_rope_head_dim))


@wrong("cache_bytes", "mla")
def latent_once_as_key_and_once_as_value(config):
    return sizes(config, mla=2 * (2 * config.kv_lora_rank + config.qk_rope_head_dim))


@wrong("cache_bytes", "fp8")
def scales_forgotten(config):
    return sizes(config, fp8=config.kv_lora_rank + 2 * config.qk_rope_head_dim)


@wrong("cache_bytes", "fp8")
def rope_in_eight_bits_too(config):
    return sizes(config, fp8=sizes(config)["fp8"] - config.qk_rope_head_dim)


@wrong("cache_bytes", "fp8")
def one_scale_a_token(config):
    return sizes(config, fp8=config.kv_lora_rank + 4 + 2 * config.qk_rope_head_dim)


@wrong("cache_bytes", "last scale")
def tiles_rounded_down(config):
    latent = config.kv_lora_rank
    return sizes(config, fp8=latent + 4 * (latent // 128) + 2 * config.qk_rope_head_dim)


@wrong("cache_bytes", "last scale")
def a_fraction_of_a_scale(config):
    latent = config.kv_lora_rank
    return sizes(config, fp8=latent + 4 * latent / 128 + 2 * config.qk_rope_head_dim)


@wrong("cache_bytes", "fp8")
def numbers_of_v32_by_heart(config):
    return sizes(config, fp8=656)


# ------------------------------------------------------------------------------------------------------------ absorb


@wrong("absorb", "transpose")
def the_wrong_transpose(q_nope, kv_b):
    return torch.einsum("thn,hcn->thc", q_nope, kv_b[:, : q_nope.shape[-1]])


@wrong("absorb", "transpose")
def matrix_on_the_left_of_a_column(q_nope, kv_b):
    W_UK = kv_b[:, : q_nope.shape[-1]]
    return (W_UK[None] @ q_nope[..., None])[..., 0]


@wrong("absorb", "transpose")
def scaled_already(q_nope, kv_b):
    nope = q_nope.shape[-1]
    return torch.einsum("thn,hnc->thc", q_nope, kv_b[:, :nope]) * nope**-0.5


@wrong("absorb", "shape")
def summed_over_heads(q_nope, kv_b):
    return torch.einsum("thn,hnc->tc", q_nope, kv_b[:, : q_nope.shape[-1]])


@wrong("absorb", "shape")
def nothing_returned(q_nope, kv_b):
    torch.einsum("thn,hnc->thc", q_nope, kv_b[:, : q_nope.shape[-1]])


@wrong("absorb", "shape")
def heads_first(q_nope, kv_b):
    return torch.einsum("thn,hnc->htc", q_nope, kv_b[:, : q_nope.shape[-1]])


@wrong("absorb", "own head")
def all_matrices_for_every_head(q_nope, kv_b):
    return torch.einsum("thn,gnc->thc", q_nope, kv_b[:, : q_nope.shape[-1]])


@wrong("absorb", "own head")
def first_head_for_all(q_nope, kv_b):
    return q_nope @ kv_b[0, : q_nope.shape[-1]]


@wrong("absorb", "key half")
def the_value_matrix(q_nope, kv_b):
    return torch.einsum("thn,hnc->thc", q_nope, kv_b[:, -q_nope.shape[-1] :])


@wrong("absorb", "own head")
def all_keys_before_all_values(q_nope, kv_b):
    H, nope, latent = q_nope.shape[1], q_nope.shape[2], kv_b.shape[2]
    W_UK = kv_b.reshape(-1, latent)[: H * nope].view(H, nope, latent)
    return torch.einsum("thn,hnc->thc", q_nope, W_UK)


@wrong("absorb", "runs")
def halves_of_equal_size(q_nope, kv_b):
    return torch.einsum("thn,hnc->thc", q_nope, kv_b.chunk(2, dim=1)[0])


@wrong("absorb", "same score")
def rounded_to_bf16(q_nope, kv_b):
    W_UK = kv_b[:, : q_nope.shape[-1]]
    return torch.einsum("thn,hnc->thc", q_nope.bfloat16().float(), W_UK.bfloat16().float())


# -------------------------------------------------------------------------------------------------------------- rope


def turn(x, angles, layout, R):
    """Right, given angles [T, R/2]; wrong answers pass wrong angles."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    if layout == "interleaved":
        a, b = x[..., 0:R:2], x[..., 1:R:2]
    else:
        a, b = x[..., : R // 2], x[..., R // 2 : R]
    a, b = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack((a, b), dim=-1).flatten(-2) if layout == "interleaved" else torch.cat((a, b), dim=-1)
    return torch.cat((turned, x[..., R:]), dim=-1)


def angles(positions, freqs):
    return positions[:, None].float() * freqs


@wrong("rope", "layouts")
def layouts_swapped(x, positions, freqs, layout):
    other = "half" if layout == "interleaved" else "interleaved"
    return turn(x, angles(positions, freqs), other, 2 * len(freqs))


@wrong("rope", "layouts")
def layout_ignored(x, positions, freqs, layout):
    return turn(x, angles(positions, freqs), "interleaved", 2 * len(freqs))


@wrong("rope", "layouts")
def result_left_in_the_other_order(x, positions, freqs, layout):
    R = 2 * len(freqs)
    if layout == "interleaved":  # as Hugging Face's DeepSeek code does, which is fine only if q and k both do it
        x = torch.cat((x[..., 0:R:2], x[..., 1:R:2], x[..., R:]), dim=-1)
    return turn(x, angles(positions, freqs), "half", R)


@wrong("rope", "rest unchanged")
def the_last_dims(x, positions, freqs, layout):
    R = 2 * len(freqs)
    rest = x.shape[-1] - R
    return torch.cat((x[..., :rest], turn(x[..., rest:], angles(positions, freqs), layout, R)), dim=-1)


@wrong("rope", "rest unchanged")
def the_rest_cut_off(x, positions, freqs, layout):
    R = 2 * len(freqs)
    return turn(x[..., :R], angles(positions, freqs), layout, R)


@wrong("rope", "one pair")
def the_wrong_way_round(x, positions, freqs, layout):
    return turn(x, -angles(positions, freqs), layout, 2 * len(freqs))


@wrong("rope", "one pair")
def in_degrees(x, positions, freqs, layout):
    return turn(x, torch.deg2rad(angles(positions, freqs)), layout, 2 * len(freqs))


@wrong("rope", "one pair")
def rows_counted_instead_of_positions(x, positions, freqs, layout):
    return turn(x, angles(torch.arange(len(x)), freqs), layout, 2 * len(freqs))


@wrong("rope", "one pair")
def frequency_not_applied(x, positions, freqs, layout):
    return turn(x, angles(positions, torch.ones_like(freqs)), layout, 2 * len(freqs))


@wrong("rope", "frequencies")
def first_frequency_for_all(x, positions, freqs, layout):
    return turn(x, angles(positions, freqs[:1].expand(len(freqs))), layout, 2 * len(freqs))


@wrong("rope", "frequencies")
def frequencies_in_reverse(x, positions, freqs, layout):
    return turn(x, angles(positions, freqs.flip(0)), layout, 2 * len(freqs))


@wrong("rope", "norm")
def both_signs_minus(x, positions, freqs, layout):
    R = 2 * len(freqs)
    cos, sin = (f(angles(positions, freqs))[:, None] for f in (torch.cos, torch.sin))
    first, second = (slice(0, R, 2), slice(1, R, 2)) if layout == "interleaved" else (slice(R // 2), slice(R // 2, R))
    out = x.clone()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos - x[..., first] * sin
    return out


@wrong("rope", "norm")
def overwritten_before_it_is_used(x, positions, freqs, layout):
    R = 2 * len(freqs)
    cos, sin = (f(angles(positions, freqs))[:, None] for f in (torch.cos, torch.sin))
    first, second = (slice(0, R, 2), slice(1, R, 2)) if layout == "interleaved" else (slice(R // 2), slice(R // 2, R))
    out = x.clone()
    out[..., first] = out[..., first] * cos - out[..., second] * sin
    out[..., second] = out[..., second] * cos + out[..., first] * sin
    return out


@wrong("rope", "relative position")
def angles_in_one_layout_and_partners_in_the_other(x, positions, freqs, layout):
    R = 2 * len(freqs)
    all_angles = angles(positions, freqs).repeat_interleave(2, dim=-1)  # for interleaved pairs, always
    turning, order = x[..., :R], torch.arange(R)
    partner = order ^ 1 if layout == "interleaved" else (order + R // 2) % R
    sign = (2 * (order % 2) - 1) if layout == "interleaved" else torch.where(order < R // 2, -1, 1)
    turned = turning * all_angles.cos()[:, None] + sign * turning[..., partner] * all_angles.sin()[:, None]
    return torch.cat((turned, x[..., R:]), dim=-1)


@wrong("rope", "angles in fp32")
def angles_in_the_dtype_of_x(x, positions, freqs, layout):
    return turn(x, positions[:, None].to(x.dtype) * freqs.to(x.dtype), layout, 2 * len(freqs))


# ----------------------------------------------------------------------------------------------------- softmax_scale


def m(config):
    return 0.1 * config.mscale * math.log(config.rope_factor) + 1.0


def width(config):
    return config.qk_nope_head_dim + config.qk_rope_head_dim


@wrong("softmax_scale", "m squared")
def m_once(config):
    return width(config) ** -0.5 * (m(config) if config.yarn else 1.0)


@wrong("softmax_scale", "m squared")
def m_under_the_root(config):
    return (width(config) * (m(config) ** 2 if config.yarn else 1.0)) ** -0.5


@wrong("softmax_scale", "m squared")
def logarithm_to_base_ten(config):
    m10 = 0.1 * config.mscale * math.log10(config.rope_factor) + 1.0
    return width(config) ** -0.5 * (m10**2 if config.yarn else 1.0)


@wrong("softmax_scale", "m squared")
def no_yarn_at_all(config):
    return width(config) ** -0.5


@wrong("softmax_scale", "key width")
def width_of_the_cached_row(config):
    return config.latent_dim**-0.5 * (m(config) ** 2 if config.yarn else 1.0)


@wrong("softmax_scale", "key width")
def width_of_nope_alone(config):
    return config.qk_nope_head_dim**-0.5 * (m(config) ** 2 if config.yarn else 1.0)


@wrong("softmax_scale", "yarn condition")
def always_m(config):
    return width(config) ** -0.5 * m(config) ** 2


@wrong("softmax_scale", "yarn condition")
def on_at_equality_too(config):
    on = config.max_seq_len >= config.original_seq_len
    return width(config) ** -0.5 * (m(config) ** 2 if on else 1.0)


@wrong("softmax_scale", "yarn condition")
def on_where_the_factor_is_not_one(config):
    return width(config) ** -0.5 * (m(config) ** 2 if config.rope_factor > 1 else 1.0)


@wrong("softmax_scale", "yarn condition")
def v32_length_by_heart(config):
    return width(config) ** -0.5 * (m(config) ** 2 if config.max_seq_len > 4096 else 1.0)


@wrong("softmax_scale", "key width")
def no_return(config):
    width(config) ** -0.5


@wrong("softmax_scale", "mscale")
def mscale_ignored(config):
    factor = (0.1 * math.log(config.rope_factor) + 1.0) ** 2 if config.yarn else 1.0
    return width(config) ** -0.5 * factor


@wrong("softmax_scale", "mscale")
def mscale_outside_the_sum(config):
    factor = (config.mscale * (0.1 * math.log(config.rope_factor) + 1.0)) ** 2 if config.yarn else 1.0
    return width(config) ** -0.5 * factor
