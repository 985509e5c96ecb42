"""Inputs at V3.2's sizes, from seeds, made where they are used. The same seed gives the same inputs on one device type.

Symbols: T queries at the end of S positions (query t stands at S - T + t and sees the keys up to there), H heads, Hi
index heads, Di index dim, k selected keys. In a decode step B sequences of S positions each, which lie in pages, have N
queries each, the newest N positions.
"""

import numpy as np
import torch

import dsa_kernels
import dsa_ref
from dsa_ref import V32

AT_ONCE = 1 << 26  # elements of a temporary
PAGE = 64  # tokens; what the peers' caches have
SPARE = 3  # pages that belong to no sequence


def _normal(shape, generator, dtype=torch.float32):
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32).to(dtype)


def _generator(seed, device):
    return torch.Generator(device).manual_seed(seed)


def _row_blocks(T, S):
    rows = max(1, AT_ONCE // S)
    return (slice(first, min(first + rows, T)) for first in range(0, T, rows))


def indexer_inputs(T, S, seed=0, device="cuda", config=V32):
    """(q_idx e4m3 [T, Hi, Di], k_idx e4m3 [S, Di], w fp32 [T, Hi], k_scale fp32 [S]).

    Normal bf16 vectors through `dsa_kernels.quantize` (a rotation would leave their distribution as it is). w is normal
    times Hi^-0.5, the query's scale and Di^-0.5.
    """
    generator = _generator(seed, device)
    Hi, Di = config.index_n_heads, config.index_head_dim
    q_idx, q_scale = dsa_kernels.quantize(_normal((T, Hi, Di), generator, torch.bfloat16))
    k_idx, k_scale = dsa_kernels.quantize(_normal((S, Di), generator, torch.bfloat16))
    w = _normal((T, Hi), generator) * Hi**-0.5 * q_scale * Di**-0.5
    return q_idx, k_idx, w, k_scale


def _independent(S, place, generator):
    """Normal."""
    return _normal((len(place), S), generator)


def _bursty(S, place, generator):
    """Normal, and in one of 64 stretches of 128 keys, its own for every query, 4 more."""
    stretches = torch.rand((len(place), -(-S // 128)), generator=generator, device=generator.device) < 1 / 64
    lift = stretches.repeat_interleave(128, dim=1)[:, :S]
    return _normal((len(place), S), generator).add_(lift, alpha=4.0)


def _recency(S, place, generator):
    """Normal, 6 more next to the query falling off over 2048 keys, and 8 more for the first four keys (the sinks)."""
    distance = place[:, None] - torch.arange(S, device=generator.device)
    scores = _normal((len(place), S), generator).add_(torch.exp(distance / -2048.0), alpha=6.0)
    scores[:, :4] += 8.0
    return scores


def _heavy_tailed(S, place, generator):
    """Normal over the cube root of a uniform number: a tail that falls with the third power."""
    uniform = torch.rand((len(place), S), generator=generator, device=generator.device).clamp_(min=1e-7)
    return _normal((len(place), S), generator).div_(uniform.pow_(1 / 3))


DISTRIBUTIONS = {
    "independent": _independent,
    "bursty": _bursty,
    "recency": _recency,
    "heavy-tailed": _heavy_tailed,
}


def score_matrix(distribution, T, S, seed=0, device="cuda"):
    """Scores fp32 [T, S] of one of DISTRIBUTIONS, -inf where the causal range ends, made some rows at a time."""
    generator = _generator(seed, device)
    scores = torch.empty(T, S, device=device)
    keys = torch.arange(S, device=device)
    for rows in _row_blocks(T, S):
        place = torch.arange(S - T + rows.start, S - T + rows.stop, device=device)
        made = DISTRIBUTIONS[distribution](S, place, generator)
        scores[rows] = made.masked_fill_(keys > place[:, None], -torch.inf)
    return scores


def attention_inputs(T, S, H, seed=0, device="cuda", config=V32):
    """(q bf16 [T, H, 576], kv bf16 [S, 576], softmax scale): independent normal numbers."""
    generator = _generator(seed, device)
    D = config.latent_dim
    q, kv = _normal((T, H, D), generator, torch.bfloat16), _normal((S, D), generator, torch.bfloat16)
    return q, kv, config.softmax_scale


def random_indices(T, S, k, seed=0, device="cuda"):
    """int32 [T, k]: distinct keys that query t sees, each set as likely as any other, ascending.

    Raises: ValueError where the first query sees fewer than k keys.
    """
    if S - T + 1 < k:
        raise ValueError(f"the first query must see k = {k} keys, it sees {S - T + 1}")
    generator = _generator(seed, device)
    indices = torch.empty(T, k, dtype=torch.int32, device=device)
    keys = torch.arange(S, device=device)
    for rows in _row_blocks(T, S):
        place = torch.arange(S - T + rows.start, S - T + rows.stop, device=device)
        lots = torch.rand((len(place), S), generator=generator, device=device)
        lots.masked_fill_(keys > place[:, None], -1.0)
        indices[rows] = lots.topk(k).indices.sort(dim=1).values.to(torch.int32)
    return indices


def correlated_indices(T, S, k, keep=0.95, seed=0, device="cuda"):
    """int32 [T, k] as `random_indices`, but neighbouring queries share most of their keys.

    The model: query t + 1 keeps each key of query t with probability `keep`, and fills up with random keys that it
    sees and has not. Made on the CPU, query by query. `mean_union` says how much four neighbours share.

    Raises: ValueError where the first query sees fewer than k keys.
    """
    if S - T + 1 < k:
        raise ValueError(f"the first query must see k = {k} keys, it sees {S - T + 1}")
    rng = np.random.default_rng(seed)
    selected = np.zeros(S, dtype=bool)
    indices = np.empty((T, k), dtype=np.int32)
    held = np.empty(0, dtype=np.int64)
    for t in range(T):
        dropped = held[rng.random(len(held)) >= keep]
        selected[dropped] = False
        missing = k - (len(held) - len(dropped))
        while missing:
            lots = np.unique(rng.integers(0, S - T + t + 1, 2 * missing + 16))
            new = rng.permutation(lots[~selected[lots]])[:missing]
            selected[new] = True
            missing -= len(new)
        held = np.flatnonzero(selected)
        indices[t] = held
    return torch.from_numpy(indices).to(device)


def shortened(indices, seed=0):
    """A copy of indices [T, k] whose rows end in -1 after a random length between k/2 and k, each as likely."""
    T, k = indices.shape
    generator = _generator(seed, indices.device)
    lengths = torch.randint(k // 2, k + 1, (T, 1), generator=generator, device=indices.device)
    return indices.masked_fill(torch.arange(k, device=indices.device) >= lengths, -1)


def mean_union(indices, group=4):
    """The mean number of different keys in the lists of `group` neighbouring queries, divided by k: 1 to `group`.

    Counted over up to 64 groups, evenly spread; -1 is no key.
    """
    T, k = indices.shape
    rows = indices.cpu()
    groups = T // group
    sizes = []
    for i in range(0, groups, max(1, groups // 64)):
        keys = rows[i * group : (i + 1) * group].unique()
        sizes.append(int((keys >= 0).sum()))
    return sum(sizes) / len(sizes) / k


def causal_ranges(T, S, device="cuda"):
    """(start, end), int32 [T]: what query t sees."""
    end = torch.arange(S - T + 1, S + 1, dtype=torch.int32, device=device)
    return torch.zeros_like(end), end


def page_table(B, S, seed=0, device="cuda", page=PAGE):
    """(page_table int32 [B, ceil(S / page)], lengths int32 [B], free int64 [SPARE]) in a random order of all pages.

    free: the pages that no sequence has. The same seed gives the same table, so that two caches can share it.
    """
    P = -(-S // page)
    order = torch.randperm(B * P + SPARE, device=device, generator=_generator(seed, device))
    lengths = torch.full((B,), S, dtype=torch.int32, device=device)
    return order[: B * P].to(torch.int32).view(B, P).contiguous(), lengths, order[B * P :]


def _page_blocks(pages, page, width):
    """Slices of at most AT_ONCE elements' pages."""
    count = max(1, AT_ONCE // (page * width))
    return (slice(first, min(first + count, pages)) for first in range(0, pages, count))


def index_pages(table, free, seed=0, config=V32, page=PAGE):
    """uint8 [pages, page · (Di + 4)]: normal vectors through `quantize`; NaN in the pages that are free."""
    generator, Di = _generator(seed, table.device), config.index_head_dim
    pages = torch.empty(table.numel() + len(free), page * (Di + 4), dtype=torch.uint8, device=table.device)
    for some in _page_blocks(len(pages), page, Di):
        tokens = (some.stop - some.start) * page
        pages[some] = dsa_ref.pack_index(*dsa_kernels.quantize(_normal((tokens, Di), generator, torch.bfloat16)), page)
    pages[free] = 0xFF  # NaN as e4m3 and as fp32
    return pages


def kv_pages(table, free, fp8, seed=0, config=V32, page=PAGE):
    """Normal latent rows: FP8 rows uint8 [pages, page, 656], else bf16 [pages, page, 576]; NaN where a page is free."""
    generator, D = _generator(seed, table.device), config.latent_dim
    made = []
    for some in _page_blocks(table.numel() + len(free), page, D):
        rows = _normal(((some.stop - some.start) * page, D), generator, torch.bfloat16)
        made.append((dsa_ref.pack_kv(rows, config.kv_lora_rank) if fp8 else rows).unflatten(0, (-1, page)))
    pages = torch.cat(made)
    pages[free] = 0xFF if fp8 else torch.nan
    return pages


def paged_queries(B, N, H, seed=0, device="cuda", config=V32):
    """(q_idx e4m3 [B, N, Hi, Di], w fp32 [B, N, Hi], q bf16 [B, N, H, 576]), as in prefill."""
    generator = _generator(seed + 1, device)
    Hi, Di = config.index_n_heads, config.index_head_dim
    q_idx, q_scale = dsa_kernels.quantize(_normal((B, N, Hi, Di), generator, torch.bfloat16))
    w = _normal((B, N, Hi), generator) * Hi**-0.5 * q_scale * Di**-0.5
    return q_idx, w, _normal((B, N, H, config.latent_dim), generator, torch.bfloat16)


def random_slots(B, N, k, table, seed=0, page=PAGE):
    """int32 [B, N, k]: distinct slots of the pages in `table` [1, P], which all sequences share, in a random order."""
    generator = _generator(seed + 2, table.device)
    slots = torch.empty(B * N, k, dtype=torch.int32, device=table.device)
    places = table.numel() * page
    for rows in _row_blocks(B * N, places):
        lots = torch.rand((rows.stop - rows.start, places), generator=generator, device=table.device)
        chosen = lots.topk(k).indices
        slots[rows] = table[0, chosen // page] * page + (chosen % page).to(torch.int32)
    return slots.unflatten(0, (B, N))


def decode_scores(T, S, seed=0, device="cuda"):
    """Normal scores fp32 [T, S] of T queries that see all S positions."""
    return _normal((T, S), _generator(seed, device))
