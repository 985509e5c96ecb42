"""Notebook 16: a layer, and the same with a cache."""

import types

import torch

import dsa_ref
from dsa_course.capstone.layer import attend, layer, project

from . import wrong
from ._changed import changed


def broken(exercise, property, name, *changes):
    wrong(exercise, property)(changed(exercise, name, *changes))


# ------------------------------------------------------------------------------------------------------------- layer


@wrong("layer", "shape")
def the_forbidden_layer(x, positions, weights, config):
    built = dsa_ref.DSALayer(config).requires_grad_(False)
    built.load_state_dict(weights)
    return built(x, positions)


@wrong("layer", "shape")
def left_in_float64(x, positions, weights, config):
    return layer(x, positions, weights, config).double()


broken(
    "layer", "other sizes", "eps_of_torch", (', W["q_a_layernorm.weight"], c.norm_eps', ', W["q_a_layernorm.weight"]')
)
broken(
    "layer",
    "other sizes",
    "layer_norm_eps_of_torch",
    (', W["indexer.k_norm.bias"], 1e-6', ', W["indexer.k_norm.bias"]'),
)


@wrong("layer", "shape")
def heads_not_put_together(x, positions, weights, config):
    return layer(x, positions, weights, config).unflatten(-1, (2, -1))


broken("layer", "shape", "return_forgotten", ("return torch.einsum", "torch.einsum"))
broken("layer", "attention", "scale_of_one", ("c.softmax_scale, c.kv", "1.0, c.kv"))
broken("layer", "attention", "scale_of_nope_alone", ("c.softmax_scale, c.kv", "c.qk_nope_head_dim**-0.5, c.kv"))
broken(
    "layer",
    "attention",
    "latent_without_norm",
    ('    latent = F.rms_norm(latent, (c.kv_lora_rank,), W["kv_a_layernorm.weight"], c.norm_eps)\n', ""),
)
broken(
    "layer",
    "attention",
    "query_latent_without_norm",
    (
        'F.rms_norm(x @ W["q_a_proj.weight"].T, (c.q_lora_rank,), W["q_a_layernorm.weight"], c.norm_eps)',
        'x @ W["q_a_proj.weight"].T',
    ),
)
broken("layer", "attention", "norms_without_their_weights", (', W["kv_a_layernorm.weight"]', ", None"))
broken("layer", "attention", "o_proj_transposed", ('@ W["o_proj.weight"].T', '@ W["o_proj.weight"]'))
broken("layer", "attention", "half_split_rope_in_mla", ('"interleaved"', '"half"'))
broken(
    "layer",
    "attention",
    "no_rope_on_the_query",
    ('dsa_ref.rope(q_rope, positions, freqs, "interleaved")', "q_rope"),
)
broken("layer", "attention", "no_rope_on_the_row", ('dsa_ref.rope(k_rope, positions, freqs, "interleaved")', "k_rope"))
broken("layer", "attention", "value_part_absorbed", ("W_UK, W_UV = kv_b", "W_UV, W_UK = kv_b"))
SIZES = "(c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)\n    kv_b"
TURNED = "(c.qk_rope_head_dim, c.qk_nope_head_dim), dim=-1)\n    kv_b"
PARTS = ("q_nope, q_rope = heads", "q_rope, q_nope = heads")
broken("layer", "attention", "rope_part_first", PARTS, (SIZES, TURNED))
SELECT = "dsa_ref.select_topk(scores, c.index_topk)"
ALL_KEYS = "torch.full((len(x),), len(x), dtype=torch.int32)"
broken(
    "layer",
    "future",
    "future_scored_and_selected",
    ("k_scale)\n    indices", f"k_scale, None, {ALL_KEYS})\n    indices"),
    (SELECT, f"dsa_ref.select_topk(scores, c.index_topk, None, {ALL_KEYS})"),
)
broken(
    "layer",
    "selection",
    "indexer_without_rope",
    ("dsa_ref.rotate_quantize(q_idx, positions", "dsa_ref.rotate_quantize(q_idx, 0 * positions"),
    ("dsa_ref.rotate_quantize(k_idx, positions", "dsa_ref.rotate_quantize(k_idx, 0 * positions"),
)
INTERLEAVED = 'dsa_ref.quantize(dsa_ref.hadamard(dsa_ref.rope({0}, positions, freqs, "interleaved")))'
broken(
    "layer",
    "selection",
    "interleaved_rope_in_the_indexer",
    *[(f"dsa_ref.rotate_quantize({x}, positions, freqs)", INTERLEAVED.format(x)) for x in ("q_idx", "k_idx")],
)
broken(
    "layer",
    "selection",
    "rms_norm_for_k_norm",
    (
        'F.layer_norm(k_idx, (c.index_head_dim,), W["indexer.k_norm.weight"], W["indexer.k_norm.bias"], 1e-6)',
        'F.rms_norm(k_idx, (c.index_head_dim,), W["indexer.k_norm.weight"], 1e-6)',
    ),
)
broken("layer", "selection", "k_norm_without_bias", ('W["indexer.k_norm.bias"]', "None"))
broken("layer", "selection", "key_scale_forgotten", ("w * q_scale, k_scale)", "w * q_scale)"))
broken("layer", "selection", "query_scale_forgotten", ("w * q_scale, k_scale)", "w, k_scale)"))
broken("layer", "selection", "no_head_weights", ("w * q_scale, k_scale)", "q_scale, k_scale)"))
broken(
    "layer", "selection", "weights_through_a_softmax", ("w * q_scale, k_scale)", "w.softmax(-1) * q_scale, k_scale)")
)
broken("layer", "selection", "one_key_more", (SELECT, "dsa_ref.select_topk(scores, c.index_topk + 16)"))
broken("layer", "selection", "smallest_scores", (SELECT, "dsa_ref.select_topk(-scores, c.index_topk)"))
broken(
    "layer",
    "selection",
    "indexer_reads_the_raw_latent",
    ('(q_latent @ W["indexer.wq_b', '(x @ W["q_a_proj.weight"].T @ W["indexer.wq_b'),
)


@wrong("layer", "selection")
def dense_attention(x, positions, weights, config):
    step = project(x, positions, weights, config)
    every = torch.arange(len(x), dtype=torch.int32).expand(len(x), -1)
    indices = torch.where(every <= torch.arange(len(x))[:, None], every, -1)
    return attend(step["q"], step["kv"], indices, weights, config)


@wrong("layer", "selection")
def the_last_k(x, positions, weights, config):
    step = project(x, positions, weights, config)
    end = torch.arange(1, len(x) + 1, dtype=torch.int32)
    indices = dsa_ref.testing.window_selection(config.index_topk, 0 * end, end)
    return attend(step["q"], step["kv"], indices, weights, config)


@wrong("layer", "selection")
def without_fp8(x, positions, weights, config):
    def turned(x, positions, freqs):
        return dsa_ref.rope(x, positions, freqs, "half"), torch.ones(x.shape[:-1])

    return layer(x, positions, weights, config, turned)


broken("layer", "other sizes", "k_of_the_small_model", (SELECT, "dsa_ref.select_topk(scores, 64)"))
broken(
    "layer",
    "other sizes",
    "scale_without_yarn",
    ("c.softmax_scale, c.kv", "(c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5, c.kv"),
)
broken(
    "layer",
    "other sizes",
    "frequencies_without_yarn",
    (
        "dsa_ref.rope_frequencies(config)",
        "config.rope_theta ** -(torch.arange(0, config.qk_rope_head_dim, 2) / config.qk_rope_head_dim)",
    ),
)


@wrong("layer", "in the GPT")
def a_model_of_one_layer(x, positions, weights, config, known={}):  # noqa: B006 (a fault of this very kind)
    """Right in whichever layers it met before the GPT; there the first one's weights serve all four."""
    if config.index_topk == 64 and len(x) == 160 and weights["o_proj.weight"].shape[0] == 256:
        known.setdefault(len(known), weights)
        weights = known[0] if len(known) > 2 else weights
    return layer(x, positions, weights, config)


# ------------------------------------------------------------------------------------------------------------ cached


broken("cached", "first call", "y_alone", ("weights, config), rows", "weights, config)"))
broken("cached", "first call", "cache_as_a_list", ("weights, config), rows", "weights, config), list(rows)"))
broken("cached", "first call", "sees_one_key_less", ("config.index_topk)", "config.index_topk - 1)"))
broken("cached", "positions", "positions_restart", ("before = 0 if cache is None else len(cache[0])", "before = 0"))
broken("cached", "positions", "positions_one_too_far", ("else len(cache[0])", "else len(cache[0]) + 1"))
broken(
    "cached",
    "positions",
    "new_tokens_only",
    ("kv, k_idx, k_scale = rows", 'kv, k_idx, k_scale = (new[n] for n in ("kv", "k_idx", "k_scale"))'),
)
broken("cached", "future", "new_rows_above_the_old", ("zip(cache, rows, strict", "zip(rows, cache, strict"))
broken(
    "cached",
    "positions",
    "index_cache_forgotten",
    (
        'return attend(new["q"], kv, indices, weights, config), rows',
        'return attend(new["q"], kv, indices, weights, config), (kv[:0] + 1, k_idx[:0], k_scale[:0])',
    ),
)
STILL = """    still = project(x, torch.zeros(len(x), dtype=torch.int64), weights, config)
    kept = still["kv"], still["k_idx"], still["k_scale"]
    if cache is not None:
        kept = tuple(torch.cat(pair) for pair in zip(cache, kept, strict=True))"""
broken(
    "cached",
    "positions",
    "keys_stored_before_rope",
    ("weights, config), rows", "weights, config), kept"),
    ("    if cache is not None:", STILL),
)
END = "None if cache is None else torch.full((len(x),), len(kv), dtype=torch.int32)"
broken(
    "cached",
    "future",
    "each_new_token_sees_all_new_ones",
    ('new["w"], k_scale)', f'new["w"], k_scale, None, {END})'),
    ("config.index_topk)", f"config.index_topk, None, {END})"),
)


@wrong("cached", "k < T")
def throws_away_what_was_not_selected(x, cache, weights, config):
    before = 0 if cache is None else cache[3]
    new = project(x, torch.arange(before, before + len(x)), weights, config)
    rows = [new["kv"], new["k_idx"], new["k_scale"]]
    if cache is not None:
        rows = [torch.cat(pair) for pair in zip(cache[:3], rows, strict=True)]
    scores = dsa_ref.index_scores(new["q_idx"], rows[1], new["w"], rows[2])
    indices = dsa_ref.select_topk(scores, config.index_topk)
    y = attend(new["q"], rows[0], indices, weights, config)
    left = indices[-1][indices[-1] >= 0].long()
    return y, (*[held[left] for held in rows], before + len(x))


@wrong("cached", "k < T")
def dense_once_there_is_a_cache(x, cache, weights, config):
    before = 0 if cache is None else len(cache[0])
    new = project(x, torch.arange(before, before + len(x)), weights, config)
    rows = [new["kv"], new["k_idx"], new["k_scale"]]
    if cache is not None:
        rows = [torch.cat(pair) for pair in zip(cache, rows, strict=True)]
    scores = dsa_ref.index_scores(new["q_idx"], rows[1], new["w"], rows[2])
    k = config.index_topk if cache is None else len(rows[0])
    return attend(new["q"], rows[0], dsa_ref.select_topk(scores, k), weights, config), tuple(rows)


@wrong("cached", "k < T")
def the_last_k_keys_once_there_is_a_cache(x, cache, weights, config):
    before = 0 if cache is None else len(cache[0])
    new = project(x, torch.arange(before, before + len(x)), weights, config)
    rows = [new["kv"], new["k_idx"], new["k_scale"]]
    if cache is not None:
        rows = [torch.cat(pair) for pair in zip(cache, rows, strict=True)]
    scores = dsa_ref.index_scores(new["q_idx"], rows[1], new["w"], rows[2])
    indices = dsa_ref.select_topk(scores, config.index_topk)
    if cache is not None:
        end = torch.arange(before + 1, before + len(x) + 1, dtype=torch.int32)
        indices = dsa_ref.testing.window_selection(config.index_topk, 0 * end, end)
    return attend(new["q"], rows[0], indices, weights, config), tuple(rows)


@wrong("cached", "branches")
def one_buffer_for_all_branches(x, cache, weights, config):
    """Each call writes below the rows that it was given, into the memory of all: right until two take turns."""
    before, buffers = (0, None) if cache is None else cache
    new = project(x, torch.arange(before, before + len(x)), weights, config)
    names, end = ("kv", "k_idx", "k_scale"), before + len(x)
    if buffers is None:
        buffers = [torch.zeros(256, *new[name].shape[1:]).to(new[name].dtype) for name in names]
    for name, buffer in zip(names, buffers, strict=True):
        buffer[before:end] = new[name]
    kv, k_idx, k_scale = (buffer[:end] for buffer in buffers)
    indices = dsa_ref.select_topk(dsa_ref.index_scores(new["q_idx"], k_idx, new["w"], k_scale), config.index_topk)
    return attend(new["q"], kv, indices, weights, config), (end, buffers)


STORE = types.SimpleNamespace()


@wrong("cached", "branches")
def one_cache_for_everybody(x, cache, weights, config):
    """The tuple is a token; what it stands for lies in one place and grows."""
    if cache is None:
        STORE.rows, STORE.length = None, 0
    new = project(x, torch.arange(STORE.length, STORE.length + len(x)), weights, config)
    rows = [new["kv"], new["k_idx"], new["k_scale"]]
    STORE.rows = [torch.cat(pair) for pair in zip(STORE.rows, rows, strict=True)] if STORE.rows else rows
    STORE.length += len(x)
    scores = dsa_ref.index_scores(new["q_idx"], STORE.rows[1], new["w"], STORE.rows[2])
    indices = dsa_ref.select_topk(scores, config.index_topk)
    return attend(new["q"], STORE.rows[0], indices, weights, config), (STORE.length,)


broken("cached", "other sizes", "k_of_the_trained_model", ("config.index_topk)", "max(config.index_topk, 16))"))
