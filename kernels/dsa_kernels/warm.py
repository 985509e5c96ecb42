"""Compile what a layer can launch before the work begins, so that no chunk of a long prefill waits for a compiler.

Triton compiles a kernel for each combination of types, tile sizes, and integers that are 1, a multiple of 16, or
neither. Which of them a call needs follows from its shapes. So `warm` calls the public steps on random tensors of
shapes that stand for all others: contexts up to every power of two, calls of a whole chunk and of what a last, shorter
one may be, multiples of 16 and others. The kernels that redo flagged rows are launched each time. cuDNN plans its
attention for each shape, and cuBLAS loads its kernels, so both are called as well.

On a GPU some threads do it at once, each one kind of calls, so that no kernel is compiled twice; the compiler is not
Python, and leaves the others their turn. What is compiled stays in Triton's cache on disk: in the next process the same
call takes seconds.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn import functional as F

from dsa_ref.config import DSAConfig
from dsa_ref.contracts import check_count, unchecked_values

from .append import append_index, append_latents, index_queries, place_tokens, rms_norm, turn_into
from .head_weights import head_weights
from .lightning_select import lightning_select
from .mha_attention import mha_attention
from .paged_select import paged_select
from .paged_sparse_attention import paged_sparse_attention
from .rotate_quantize import rope
from .runtime import FEWEST_FOR_HOPPER, FLOATS
from .sparse_attention import sparse_attention

SHORTEST = 16  # keys
LAST = (
    1008,
    1021,
    496,
    509,
    240,
    253,
    16,
    13,
    2,
    1,
)  # tokens of a last chunk, for each way in which steps choose kernels


@torch.no_grad()
def warm(
    config: DSAConfig,
    context: int | None = None,
    chunk: int = 4096,
    batches: Iterable[tuple[int, int]] = ((1, 1),),
    page_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    fp8: bool = True,
    device: torch.device | str = "cuda",
) -> None:
    """Compile all that a layer of these sizes launches in inference, and load what cuBLAS and cuDNN need.

    context: keys, at most; None for config.max_seq_len. chunk: tokens of a call of the layer; calls with fewer, as the
    last one's, are compiled too. batches: (B, N) of decode steps on pages of `page_size` tokens; none for no decode.
    dtype: of weights and inputs; fp8: whether pages hold FP8 rows. Memory: index keys and latent rows of the context,
    some chunks' tensors, and twice at most 512 MB of scores. Positions are int64.

    Raises: ValueError for sizes below 1 and as the steps do, TypeError for a dtype that kernels do not take, for
    a config that is no DSAConfig and an fp8 that is no bool.
    """
    if not isinstance(config, DSAConfig):
        raise TypeError(f"config must be a DSAConfig, got {type(config).__name__}")
    if not isinstance(fp8, bool):
        raise TypeError(f"fp8 must be a bool, got {fp8!r}")
    context = config.max_seq_len if context is None else context
    for name, value in (("context", context), ("chunk", chunk), ("page_size", page_size)):
        check_count(name, value)
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype}")
    device, chunk, batches = torch.device(device), min(chunk, context), list(batches)
    like = {"dtype": dtype, "device": device}
    keys = _cached(config, context, like)
    sizes = sizes_of_calls(chunk)

    def pairs(fewest, most):
        return [(T, S) for T in sizes if fewest <= T <= most for S in contexts(T, chunk, context)]

    def calls(function, arguments) -> Callable[[], None]:
        @torch.no_grad()
        def run():
            with unchecked_values():  # as a layer calls them; flagged rows are redone whether there are some or not
                for these in arguments:
                    function(config, *these, like)

        return run

    kinds = [
        calls(_select, [(*pair, keys) for pair in pairs(FEWEST_FOR_HOPPER, chunk)]),
        calls(_select, [(*pair, keys) for pair in pairs(1, FEWEST_FOR_HOPPER - 1)]),
        calls(_attend, [(*pair, keys) for pair in pairs(1, chunk)]),
        calls(_small_steps, [(T,) for T in sizes]),
        calls(_index_steps, [(T,) for T in sizes]),
        calls(_decode, [(B, N, context, page_size, fp8) for B, N in batches]),
        calls(_products, [(chunk,)]),
        calls(_mha, list(mha_calls(config, chunk, context))),
    ]
    if device.type != "cuda":
        for kind in kinds:
            kind()
        return

    def on_device(kind):
        with torch.cuda.device(device):
            kind()

    with ThreadPoolExecutor(len(kinds)) as pool:
        for _ in pool.map(on_device, kinds):
            pass  # an error in a thread is raised here
    torch.cuda.synchronize(device)


def sizes_of_calls(chunk: int) -> list[int]:
    """How many tokens the calls have that stand for all of at most `chunk`."""
    sizes = (chunk, chunk - 3, *(last for last in LAST if last < chunk))
    return sorted({size for size in sizes if size > 0}, reverse=True)


def contexts(T: int, chunk: int, context: int) -> Iterator[int]:
    """How many keys calls of T tokens see, up to each power of two, since all up to there take the same tiles.

    With whole chunks before them, of a multiple of 16 tokens, keys are a multiple of 16 where T is, and only there. A
    single token may come after any number of others. The last whole chunk ends where the chunks do.
    """
    S, lengths = SHORTEST, []
    while S < context:
        lengths.append(S)
        S *= 2
    for length in (*lengths, context // chunk * chunk if T == chunk else context):
        for seen in (length // 16 * 16, length if length % 16 else length - 3):
            if T <= seen and (T == 1 or chunk % 16 or (seen % 16 == 0) == (T % 16 == 0)):
                yield seen


def mha_calls(config: DSAConfig, chunk: int, context: int) -> Iterator[tuple[int, int, bool]]:
    """(rows, keys, whether lists are a mask) of the calls in MHA mode, of a context read in whole chunks."""
    for before in range(0, min(context, config.most_mha_keys), chunk):
        whole, few = (
            min(chunk, max(0, min(keys, context) - before))
            for keys in (min(config.index_topk, config.most_mha_keys), config.most_mha_keys)
        )
        if whole:
            yield whole, before + whole, False
        if few > whole:
            yield few - whole, before + few, True


def _random(*shape, dtype, device):
    return torch.randn(*shape, dtype=torch.float32 if dtype == torch.float8_e4m3fn else dtype, device=device).to(dtype)


def _cached(c, context, like):
    """(kv, k_idx, k_scale) of a context, random: rows with equal scores would be flagged, all of them."""
    kv = torch.zeros(context, c.latent_dim, **like)
    if not c.index_fp8:
        return kv, _random(context, c.index_head_dim, **like), None
    k_idx = torch.empty(context, c.index_head_dim, dtype=torch.float8_e4m3fn, device=like["device"])
    for first in range(0, context, 1 << 16):
        part = k_idx[first : first + (1 << 16)]
        part.copy_(torch.randn(part.shape, device=part.device))
    return kv, k_idx, torch.ones(context, device=like["device"])


def _products(c, T, like):
    """A chunk's products with weights, as a layer makes them."""
    head, both = c.qk_nope_head_dim + c.qk_rope_head_dim, c.qk_nope_head_dim + c.v_head_dim
    for rows, columns in (
        (c.q_lora_rank, c.dim),
        (c.latent_dim, c.dim),
        (c.index_head_dim, c.dim),
        (c.n_heads * head, c.q_lora_rank),
        (c.index_n_heads * c.index_head_dim, c.q_lora_rank),
        (c.dim, c.n_heads * c.v_head_dim),
    ):
        F.linear(torch.zeros(T, columns, **like), torch.zeros(rows, columns, **like))
    W = torch.zeros(c.n_heads, both, c.kv_lora_rank, **like)
    q, out = torch.zeros(T, c.n_heads, head, **like), torch.zeros(T, c.n_heads, c.latent_dim, **like)
    nope, latent = q[..., : c.qk_nope_head_dim], out[..., : c.kv_lora_rank]
    torch.bmm(nope.transpose(0, 1), W[:, : c.qk_nope_head_dim], out=latent.transpose(0, 1))
    values = torch.zeros(T, c.n_heads, c.v_head_dim, **like)
    W_UV, u = W[:, c.qk_nope_head_dim :], torch.zeros(T, c.n_heads, c.kv_lora_rank, **like)
    torch.bmm(u.transpose(0, 1), W_UV.transpose(1, 2), out=values.transpose(0, 1))


def _small_steps(c, T, like):
    """Norms, RoPE and cache writes of T tokens."""
    R, device, positions = c.qk_rope_head_dim, like["device"], torch.arange(T, device=like["device"])
    freqs, ones = torch.ones(R // 2, device=device), torch.ones(max(c.q_lora_rank, c.kv_lora_rank), **like)
    rms_norm(torch.zeros(T, c.q_lora_rank, **like), ones[: c.q_lora_rank].clone(), c.norm_eps)
    latents = torch.zeros(T, c.latent_dim, **like)
    pages = torch.zeros(1, -(-T // 16) * 16, c.latent_dim, **like)
    append_latents(pages, positions, latents, ones[: c.kv_lora_rank].clone(), c.norm_eps, positions, freqs)
    q = torch.zeros(T, c.n_heads, c.latent_dim, **like)
    heads = torch.zeros(T, c.n_heads, c.qk_nope_head_dim + R, **like)
    turning = heads[..., c.qk_nope_head_dim :]
    turn_into(q[..., c.kv_lora_rank :], turning, positions, freqs, "interleaved")
    turn_into(turning, turning, positions, freqs, "interleaved")


def _index_steps(c, T, like):
    """The indexer's keys and queries of T tokens."""
    Hi, Di, device = c.index_n_heads, c.index_head_dim, like["device"]
    positions, freqs = torch.arange(T, device=device), torch.ones(c.qk_rope_head_dim // 2, device=device)
    x, layout = torch.zeros(T, c.dim, **like), c.index_rope
    if not c.index_fp8:
        rope(torch.zeros(T, Di, **like), positions, freqs, layout)
        rope(torch.zeros(T, Hi, Di, **like), positions, freqs, layout)
        return
    index_pages = torch.zeros(1, -(-T // 16) * 16 * (Di + 4), dtype=torch.uint8, device=device)
    norm = torch.ones(Di, **like), torch.zeros(Di, **like)
    append_index(index_pages, positions, torch.zeros(T, Di, **like), *norm, 1e-6, positions, freqs, layout)
    w = head_weights(x, torch.zeros(Hi, c.dim, **like))
    index_queries(torch.zeros(T, Hi, Di, **like), w, positions, freqs, layout)


def _select(c, T, S, keys, like):
    """The T last queries of a context of S keys select."""
    _, k_idx, k_scale = (None if part is None else part[:S] for part in keys)
    q_idx = _random(T, c.index_n_heads, c.index_head_dim, dtype=k_idx.dtype, device=k_idx.device)
    w, start = torch.ones(q_idx.shape[:2], device=q_idx.device), torch.zeros(T, dtype=torch.int32, device=q_idx.device)
    lightning_select(q_idx, k_idx, w, min(c.index_topk, S), k_scale=k_scale, start=start)


def _attend(c, T, S, keys, like):
    """The T last queries of a context of S keys attend to the first ones."""
    q = torch.zeros(T, c.n_heads, c.latent_dim, **like)
    indices = torch.arange(min(c.index_topk, S), dtype=torch.int32, device=q.device).repeat(T, 1)
    sparse_attention(q, keys[0][:S], indices, c.softmax_scale, c.kv_lora_rank)


def _mha(c, T, S, selected, like):
    """The T last queries of S keys in MHA mode."""
    q, k = (torch.zeros(n, c.n_heads, c.qk_nope_head_dim + c.qk_rope_head_dim, **like) for n in (T, S))
    v, indices = torch.zeros(S, c.n_heads, c.v_head_dim, **like), None
    if selected:
        indices = torch.arange(min(c.index_topk, S), dtype=torch.int32, device=q.device).repeat(T, 1)
    mha_attention(q, k, v, c.softmax_scale, indices)


def _decode(c, B, N, context, page, fp8, like):
    """A decode step of N tokens of B sequences, on a table with room for the context."""
    device, P, T = like["device"], -(-context // page), B * N
    R, Hi, Di, D, v_dim = c.qk_rope_head_dim, c.index_n_heads, c.index_head_dim, c.latent_dim, c.kv_lora_rank
    table = torch.zeros(B, P, dtype=torch.int32, device=device)
    lengths, sequences = torch.zeros(B, dtype=torch.int32, device=device), torch.arange(B, device=device)
    page_table, totals, positions, slots = place_tokens(table, lengths, sequences, N, page)
    positions = positions.flatten()
    row, kind = (v_dim + 4 * -(-v_dim // 128) + 2 * R, torch.uint8) if fp8 else (D, like["dtype"])
    kv_pages = torch.zeros(1, page, row, dtype=kind, device=device)
    index_pages = torch.zeros(1, page * (Di + 4), dtype=torch.uint8, device=device)
    freqs = torch.ones(R // 2, device=device)
    rms_norm(torch.zeros(T, c.q_lora_rank, **like), torch.ones(c.q_lora_rank, **like), c.norm_eps)
    rows, weight = torch.zeros(T, D, **like), torch.ones(v_dim, **like)
    append_latents(kv_pages, slots, rows, weight, c.norm_eps, positions, freqs)
    norm = torch.ones(Di, **like), torch.zeros(Di, **like)
    append_index(index_pages, slots, torch.zeros(T, Di, **like), *norm, 1e-6, positions, freqs, c.index_rope)
    w = head_weights(torch.zeros(T, c.dim, **like), torch.zeros(Hi, c.dim, **like))
    q_idx, w = index_queries(_random(T, Hi, Di, **like), w, positions, freqs, c.index_rope)
    scored = q_idx.unflatten(0, (B, N)), index_pages, w.unflatten(0, (B, N))
    _, chosen = paged_select(*scored, c.index_topk, page_table, totals)
    q = torch.zeros(T, c.n_heads, D, **like)
    turning = torch.zeros(T, c.n_heads, c.qk_nope_head_dim + R, **like)[..., c.qk_nope_head_dim :]
    turn_into(q[..., v_dim:], turning, positions, freqs, "interleaved")
    paged_sparse_attention(q.unflatten(0, (B, N)), kv_pages, chosen, c.softmax_scale, v_dim)
