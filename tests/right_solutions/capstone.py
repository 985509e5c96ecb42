"""Notebook 16."""

import math
import statistics

import numpy as np
import torch

import dsa_ref
from dsa_course.capstone.ablate import paired as three_numbers
from dsa_course.capstone.layer import attend, project
from dsa_course.capstone.layer import layer as in_two_halves

from . import right

right("layer")(in_two_halves)


@right("layer")
def decompressed_in_float64(x, positions, weights, config):
    """Keys and values for every head, a mask in place of gathered rows, NumPy for the norms."""
    c, W = config, {name: weight.double().numpy() for name, weight in weights.items()}
    freqs, x64 = dsa_ref.rope_frequencies(c), x.double().numpy()

    def rms(y, weight):
        return y / np.sqrt(np.mean(y * y, axis=-1, keepdims=True) + c.norm_eps) * weight

    def turned(y, layout):
        return dsa_ref.rope(torch.from_numpy(y), positions, freqs, layout)

    latent_q = rms(x64 @ W["q_a_proj.weight"].T, W["q_a_layernorm.weight"])
    row = x64 @ W["kv_a_proj_with_mqa.weight"].T
    latent = rms(row[:, : c.kv_lora_rank], W["kv_a_layernorm.weight"])
    k_rope = turned(row[:, c.kv_lora_rank :], "interleaved")
    q = (latent_q @ W["q_b_proj.weight"].T).reshape(len(x), c.n_heads, -1)
    q_rope = turned(q[..., c.qk_nope_head_dim :].copy(), "interleaved")
    both = (latent @ W["kv_b_proj.weight"].T).reshape(len(x), c.n_heads, -1)
    k_nope, v = both[..., : c.qk_nope_head_dim], both[..., c.qk_nope_head_dim :]

    k_idx = x64 @ W["indexer.wk.weight"].T
    k_idx = (k_idx - k_idx.mean(-1, keepdims=True)) / np.sqrt(k_idx.var(-1, keepdims=True) + 1e-6)
    k_idx = k_idx * W["indexer.k_norm.weight"] + W["indexer.k_norm.bias"]
    q_idx = (latent_q @ W["indexer.wq_b.weight"].T).reshape(len(x), c.index_n_heads, -1)
    w = torch.from_numpy(x64 @ W["indexer.weights_proj.weight"].T).float() / math.sqrt(q_idx[0].size)
    q8, q_scale = dsa_ref.rotate_quantize(torch.from_numpy(q_idx).float(), positions, freqs)
    k8, k_scale = dsa_ref.rotate_quantize(torch.from_numpy(k_idx).float(), positions, freqs)
    chosen = dsa_ref.lightning_select(q8, k8, w * q_scale, min(c.index_topk, len(x)), k_scale=k_scale)

    kept = np.zeros((len(x), len(x) + 1), dtype=bool)
    np.put_along_axis(kept, np.where(chosen.numpy() < 0, len(x), chosen.numpy()), True, axis=1)
    logits = np.einsum("thn,shn->ths", q[..., : c.qk_nope_head_dim], k_nope)
    logits = (logits + np.einsum("thr,sr->ths", q_rope.numpy(), k_rope.numpy())) * c.softmax_scale
    logits = np.where(kept[:, None, :-1], logits, -np.inf)
    weights_of = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights_of /= weights_of.sum(axis=-1, keepdims=True)
    y = np.einsum("ths,shv->thv", weights_of, v).reshape(len(x), -1) @ W["o_proj.weight"].T
    return y.astype(np.float32)


@right("cached")
def a_tuple_of_calls(x, cache, weights, config):
    """The rows of each call stay apart, and the rows that each new token sees are said."""
    old = () if cache is None else cache
    before = sum(len(part["kv"]) for part in old)
    new = project(x, torch.arange(before, before + len(x)), weights, config)
    parts = (*old, {name: new[name] for name in ("kv", "k_idx", "k_scale")})
    kv, k_idx, k_scale = (torch.cat([part[name] for part in parts]) for name in ("kv", "k_idx", "k_scale"))
    end = torch.arange(before + 1, before + len(x) + 1, dtype=torch.int32)
    indices = dsa_ref.lightning_select(
        new["q_idx"], k_idx, new["w"], min(config.index_topk, len(kv)), k_scale=k_scale, start=0 * end, end=end
    )
    return attend(new["q"], kv, indices, weights, config), parts


@right("cached")
def all_inputs_again(x, cache, weights, config):
    """No cache of rows at all: the inputs themselves are kept. Slow, and right."""
    seen = x if cache is None else torch.cat((cache[0], x))
    return in_two_halves(seen, torch.arange(len(seen)), weights, config)[-len(x) :].numpy(), (seen,)


@right("ablate")
def in_loops(losses, corpus, methods, ks, count, length):
    text = corpus["held out"].numpy()
    step = (len(text) - length - 1) // (count - 1)
    table = {}
    for start in range(0, count * step, step):
        window = torch.from_numpy(text[start : start + length + 1].copy())
        for k in ks:
            for method in methods:
                loss = losses(window, method, k).tolist()[max(ks) :]
                table.setdefault((method, k), []).append(math.fsum(loss) / len(loss))
    return table


@right("ablate")
def drawn_with_a_seed(losses, corpus, methods, ks, count, length):
    text = corpus["held out"]
    starts = np.random.default_rng(3).choice(len(text) - length, count, replace=False)
    starts[:2] = 0, len(text) - length - 1
    windows = [text[start : start + length + 1] for start in starts.tolist()]
    return {
        (method, k): np.array([losses(window, method, k).numpy()[max(ks) :].mean() for window in windows])
        for method in methods
        for k in ks
    }


right("paired")(three_numbers)


@right("paired")
def by_covariance(a, b):
    """var(a - b) in its other form, as 0-d tensors."""
    deviation = (a.var() + b.var() - 2 * torch.cov(torch.stack((a, b)))[0, 1]).sqrt()
    middle = a.mean() - b.mean()
    return middle, middle - 2 * deviation / a.numel() ** 0.5, middle + 2 * deviation / a.numel() ** 0.5


@right("paired")
def by_statistics(a, b):
    gap = [float(x - y) for x, y in zip(a, b, strict=True)]
    wide = 2 * statistics.stdev(gap) / math.sqrt(len(gap))
    middle = statistics.fmean(gap)
    return [middle, middle - wide, middle + wide]


@right("paired")
def one_array_of_three(a, b):
    gap = (a - b).numpy()
    return gap.mean() + np.array([0, -2, 2]) * gap.std(ddof=1) / np.sqrt(gap.size)


@right("claim")
def at_the_largest_k_rounded(table):
    k = max(k for _, k in table)
    control = min(("random", "window"), key=lambda name: table[name, k].mean())
    difference, low, high = three_numbers(table[control, k], table["indexer", k])
    verdict = "undecided" if low <= 0 <= high else "better" if difference > 0 else "worse"
    how = {"better": "lost {} nats a byte more", "worse": "lost {} nats a byte less", "undecided": "was {} nats away"}
    return {
        "k": k,
        "control": control,
        "losses": {name: round(float(table[name, k].mean()), 2) for name in ("dense", "indexer", control)},
        "difference": round(difference, 3),
        "interval": [round(low, 3), round(high, 3)],
        "verdict": verdict,
        "claim": f"At k={k} the {control} {how[verdict].format(f'{abs(round(difference, 3)):.2f}')} than the indexer.",
        "condition": f"{len(table[control, k])} windows of Python files that training never saw, and one model.",
        "not shown": "Whether this always holds: any text of another kind and any other model may differ.",
    }
