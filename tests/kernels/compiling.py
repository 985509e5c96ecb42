"""Compile what `dsa_kernels` would launch on a card, without having it. A program of its own.

`TRITON_INTERPRET=0 python compiling.py out.json 2 80 90`: two processes, for compute capabilities 8.0 and 9.0.

The public steps are called on CPU tensors and told that these lie on the card. So they choose kernels, tiles, types and
options as they would there. Triton is told the same, compiles each launch, and leaves it at that. What it and ptxas say
of each launch is written to out.json. Of the cards in SAME_CODE a launch is compiled once.
"""

import concurrent.futures
import contextlib
import io
import itertools
import json
import pathlib
import re
import sys
import time

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import dsa_kernels
from dsa_kernels import cards, runtime

E4M3, BF16, FP16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32
V32, SMALL = "V3.2", "the small model"
INDEXER = {V32: (64, 128), SMALL: (16, 32)}  # Hi, Di
ATTENTION = {V32: (128, 576, 512), SMALL: (8, 80, 64)}  # H, D, v_dim


def index_scores(size, dtype, variant, T=64):
    (heads, dim), S = INDEXER[size], 256
    q, k, w = torch.zeros(T, heads, dim).to(dtype), torch.zeros(S, dim).to(dtype), torch.zeros(T, heads)
    dsa_kernels.index_scores(q, k, w, torch.ones(S) if dtype == E4M3 else None, variant=variant)


def score_and_select(variant, S=24_576, k=2048):
    q, keys, w = torch.zeros(8, 64, 128).to(E4M3), torch.zeros(S, 128).to(E4M3), torch.zeros(8, 64)
    dsa_kernels.lightning_select(q, keys, w, k, torch.ones(S), variant=variant)


def select_topk(variant, k, T=2, S=4096, dtype=FP32):
    dsa_kernels.select_topk(torch.zeros(T, S, dtype=dtype), k, variant=variant)


def sparse_attention(size, dtype, variant, T=2, heads=None, S=4096):
    H, D, v_dim = ATTENTION[size]
    q, kv = torch.zeros(T, heads or H, D, dtype=dtype), torch.zeros(S, D, dtype=dtype)
    indices = torch.arange(2048, dtype=torch.int32).repeat(T, 1)
    indices[indices >= S] = -1
    dsa_kernels.sparse_attention(q, kv, indices, 0.1, v_dim, variant=variant)


def sparse_attention_backward(size, dtype, variant, T=2, heads=None, sums="sorted", k=2048):
    H, D, v_dim = ATTENTION[size]
    q, kv = torch.zeros(T, heads or H, D, dtype=dtype), torch.zeros(4096, D, dtype=dtype)
    out, lse = torch.zeros(T, heads or H, v_dim, dtype=dtype), torch.zeros(T, heads or H)
    indices = torch.arange(k, dtype=torch.int32).repeat(T, 1)
    dsa_kernels.sparse_attention_backward(q, kv, indices, 0.1, v_dim, out, lse, out, lse, sums, variant)


def paged_index_scores(size, variant, N=1, page=64, first_byte=0, B=2):
    heads, dim = INDEXER[size]
    q, w = torch.zeros(B, N, heads, dim).to(E4M3), torch.zeros(B, N, heads)
    pool = torch.zeros(8 * page * (dim + 4) + first_byte, dtype=torch.uint8)
    pages, table = pool[first_byte:].view(8, -1), torch.arange(4 * B, dtype=torch.int32).view(B, 4)
    lengths = torch.full((B,), 4 * page, dtype=torch.int32)
    dsa_kernels.paged_index_scores(q, pages, w, table, lengths, variant=variant)


def paged_select(size, k, S, B=1):
    (heads, dim), P = INDEXER[size], S // 64
    q, w = torch.zeros(B, 1, heads, dim).to(E4M3), torch.zeros(B, 1, heads)
    pages, table = torch.zeros(4, 64 * (dim + 4), dtype=torch.uint8), torch.full((B, P), -1, dtype=torch.int32)
    dsa_kernels.paged_select(q, pages, w, k, table, torch.zeros(B, dtype=torch.int32))


def paged_sparse_attention(size, kind, variant, N=1, k=2048, heads=None, splits=None, first_byte=0):
    H, D, v_dim = ATTENTION[size]
    row = v_dim + 4 * -(-v_dim // 128) + 2 * (D - v_dim)
    if kind == "FP8":
        pages = torch.zeros(40 * 64 * row + first_byte, dtype=torch.uint8)[first_byte:].view(40, 64, row)
    else:
        pages = torch.zeros(40, 64, D, dtype=kind)
    q = torch.zeros(1, N, heads or H, D, dtype=BF16 if kind == "FP8" else kind)
    slots = torch.arange(k, dtype=torch.int32).repeat(1, N, 1)
    dsa_kernels.paged_sparse_attention(q, pages, slots, 0.1, v_dim, splits, variant=variant)


def indexer_vectors(size, dtype):
    heads, dim = INDEXER[size]
    x, positions, freqs = torch.zeros(4, heads, dim, dtype=dtype), torch.arange(4), torch.ones(dim // 4)
    dsa_kernels.rotate_quantize(x, positions, freqs)
    dsa_kernels.rope(x, positions, freqs, "interleaved")
    dsa_kernels.hadamard(x)


def head_weights_of_many(size, dtype, narrow):
    heads, _ = INDEXER[size]
    dsa_kernels.head_weights(torch.zeros(1024, 64, dtype=dtype), torch.ones(heads, 64, dtype=narrow))


def small_steps(size, dtype, fp8, T=3, page=64):
    (heads, dim), (H, D, v_dim) = INDEXER[size], ATTENTION[size]
    R, slots, positions = D - v_dim, torch.arange(T), torch.arange(T)
    freqs, index_pages = torch.ones(R // 2), torch.zeros(2, page * (dim + 4), dtype=torch.uint8)
    row = v_dim + 4 * -(-v_dim // 128) + 2 * R
    kv_pages = torch.zeros(2, page, row if fp8 else D, dtype=torch.uint8 if fp8 else dtype)
    k, rows, q = (
        torch.zeros(T, dim, dtype=dtype),
        torch.zeros(T, D, dtype=dtype),
        torch.zeros(T, heads, dim, dtype=dtype),
    )
    weight, x = torch.ones(dim), torch.zeros(T, 14 * D, dtype=dtype)
    for layout in ("half", "interleaved"):
        dsa_kernels.append_index(index_pages, slots, k, weight, weight, 1e-6, positions, freqs, layout)
        dsa_kernels.index_queries(q, torch.ones(T, heads), positions, freqs, layout)
    dsa_kernels.append_latents(kv_pages, slots, rows, torch.ones(v_dim, dtype=dtype), 1e-6, positions, freqs)
    dsa_kernels.rms_norm(x[:, : 3 * v_dim], torch.ones(3 * v_dim, dtype=dtype), 1e-6)
    dsa_kernels.head_weights(x, torch.ones(heads, 14 * D, dtype=dtype))
    out = torch.zeros(T, H, D, dtype=dtype)
    dsa_kernels.turn_into(out[..., v_dim:], out[..., v_dim:], positions, freqs, "interleaved")
    dsa_kernels.place_tokens(
        torch.zeros(2, 5, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), slots[:2], 3, page
    )


def indexer_loss(size, dtype, kind, k=2048, T=256, S=4096):
    """kind: "warm-up", "sparse" with attention's side, or "target" with its target; forward and gradients."""
    (heads, dim), (H, D, _) = INDEXER[size], ATTENTION[size]
    indexer = [
        torch.zeros(*shape, dtype=dtype, requires_grad=True) for shape in ((T, heads, dim), (S, dim), (T, heads))
    ]
    attention = None, None, None
    if kind != "target":
        attention = torch.zeros(T, H, D, dtype=dtype), torch.zeros(S, D, dtype=dtype), 0.1
    indices = None if kind == "warm-up" else torch.arange(k, dtype=torch.int32).repeat(T, 1)
    target = torch.zeros(T, k) if kind == "target" else None
    dsa_kernels.indexer_loss(*indexer, *attention, indices, target=target)


MANY = 401  # rows: twice a card's multiprocessors and more
LONG = (1 << 18) + 16  # keys
# A launch with the same types, tiles and options as one for 8.0 is the same program on these cards: of what Triton asks
# of a capability, only e4m3 as a type tells them apart, and with that a kernel does not compile for 8.0.
SAME_CODE = {86: 80, 89: 80}
CASES = [  # those with "hopper" are for cards of compute capability 9.0
    (score_and_select, "hopper"),
    (index_scores, V32, E4M3, "hopper"),
    *((select_topk, "hopper", 2048, 2, S) for S in (4096, 1 << 18, LONG)),
    *((paged_index_scores, V32, "hopper", N, 64, 0, B) for N in (1, 2) for B in (1, 2)),
    (sparse_attention, V32, BF16, "hopper"),
    (sparse_attention, V32, BF16, "hopper", MANY, 16),
    *(
        (sparse_attention_backward, V32, BF16, "hopper", 2, heads, sums)
        for heads in (64, 128)
        for sums in ("sorted", "atomic")
    ),
    *((index_scores, size, dtype, "portable") for size in INDEXER for dtype in (E4M3, BF16, FP16, FP32)),
    *((index_scores, size, E4M3, "widened") for size in INDEXER),
    (index_scores, V32, E4M3, "portable", 1),
    *((sparse_attention, size, dtype, "portable") for size in ATTENTION for dtype in (BF16, FP16, FP32)),
    (sparse_attention, V32, BF16, "portable", 2, 16),
    *((sparse_attention_backward, size, dtype, "portable") for size in ATTENTION for dtype in (BF16, FP16, FP32)),
    (sparse_attention_backward, V32, BF16, "portable", 2, 16, "atomic"),
    (sparse_attention, SMALL, BF16, "portable", 2, 8, 100),  # fewer keys than places in a list
    *((indexer_vectors, size, dtype) for size in INDEXER for dtype in (BF16, FP32)),
    *((head_weights_of_many, size, *both) for size in INDEXER for both in ((BF16, BF16), (BF16, FP32), (FP32, FP32))),
    *((small_steps, size, dtype, fp8) for size in INDEXER for dtype in (BF16, FP32) for fp8 in (True, False)),
    *(
        (paged_index_scores, size, variant, N)
        for size in INDEXER
        for variant in ("portable", "widened")
        for N in (1, 4)
    ),
    (paged_index_scores, V32, "portable", 2),
    (paged_index_scores, V32, "portable", 1, 64, 0, 1),  # one sequence
    (paged_index_scores, SMALL, "portable", 3, 5),
    (paged_index_scores, SMALL, "portable", 1, 64, 1),  # scales put together of bytes
    *((paged_select, V32, 2048, S) for S in (4096, 8192, 1 << 17, 1 << 20)),
    *((paged_select, V32, 2048, 1 << 15, B) for B in (2, 32)),
    (paged_select, V32, 8192, 1 << 15),
    (paged_select, V32, 8193, 1 << 15),
    (paged_select, SMALL, 64, 1 << 15),
    *((paged_sparse_attention, size, kind, "portable") for size in ATTENTION for kind in ("FP8", BF16, FP16, FP32)),
    (paged_sparse_attention, V32, "FP8", "portable", 2, 2048, 16),
    (paged_sparse_attention, V32, "FP8", "widened"),
    (paged_sparse_attention, SMALL, "FP8", "portable", 1, 2048, 8, None, 1),
    (paged_sparse_attention, V32, BF16, "portable", 1, 2048, 16),
    (paged_sparse_attention, V32, BF16, "portable", 1, 2048, 128, 1),
    *(
        (paged_sparse_attention, V32, "FP8", "hopper", 1, 2048, heads, splits)
        for heads in (16, 128)
        for splits in (1, 2, 16)
    ),
    (paged_sparse_attention, V32, "FP8", "hopper", 1, 2048, 32, 16),
    (select_topk, "radix", 2048),
    (select_topk, "radix", 2048, 2, 4096, BF16),
    (select_topk, "listed", 2048),
    (select_topk, "listed", 2048, 2, LONG),
    (select_topk, "listed", 2048, MANY),
    (select_topk, "sampled", 2048),
    (select_topk, "sampled", 8192, 2, LONG),
    *(
        (indexer_loss, size, dtype, kind)
        for size in INDEXER
        for dtype in (BF16, FP16, FP32)
        for kind in ("warm-up", "sparse")
    ),
    (indexer_loss, SMALL, BF16, "target", 256),
    (indexer_loss, SMALL, BF16, "target", 64),  # places are fewer than marks would be
]


class Driver:
    """Triton's idea of which card is there. The number of a device is its compute capability, 90 for 9.0."""

    def __init__(self, number):
        self.number = number

    def get_current_device(self):
        return self.number

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.number, 32)


def name_of(case):
    return " ".join(str(getattr(part, "__name__", part)) for part in case)


def complaints(said):
    """The lines of ptxas that are more than numbers: warnings, and all with a code, as "info : (C7512) ..."."""
    return [line for line in said.splitlines() if re.search(r"warning|\(C\d+\)|Performance", line)]


def compile_case(number, case, compiled):
    """What the launches of a case compile to on that card: a list of dicts. compiled: {launch: its dict}, which holds
    earlier ones and is filled."""
    launches = []
    compile_only = JITFunction.run

    def run(self, *arguments, grid, warmup, **options):
        *_, binder = self.device_caches[number]
        _, *kinds = binder(*arguments, **options, debug=self.debug)
        launch = (self.fn.__module__, self.fn.__name__, str(kinds))
        if (number, *launch) in compiled:
            return
        known = compiled.get((SAME_CODE.get(number), *launch))
        if known is None:
            said, began = io.StringIO(), time.monotonic()
            with contextlib.redirect_stdout(said):
                made = compile_only(self, *arguments, grid=grid, warmup=True, **options)
            (spilled,) = re.findall(r"(\d+) bytes spill stores", said.getvalue())
            (registers,) = re.findall(r"Used (\d+) registers", said.getvalue())
            known = {
                "kernel": f"{self.fn.__module__}.{self.fn.__name__}",
                "shared": made.metadata.shared,
                "registers": int(registers),
                "spilled": int(spilled),
                "warps": made.metadata.num_warps,
                "seconds": time.monotonic() - began,
                "complaints": complaints(said.getvalue()),
            }
        if known["shared"] > cards.KNOWN[number].shared_memory:
            raise MemoryError(f"{self.fn.__name__} needs {known['shared']:,} bytes of shared memory")
        compiled[(number, *launch)] = known
        launches.append({"card": number, "case": name_of(case)} | known)

    step, *arguments = case
    with contextlib.ExitStack() as undo:
        for owner, name, value in (
            (JITFunction, "run", run),
            (cards, "card_of", lambda tensor: cards.KNOWN[number]),
            (torch, "empty", torch.zeros),  # no kernel runs, so that flags must not be what lay in memory
            (
                sys.modules["dsa_kernels.flagged"],
                "values_readable",
                lambda tensor: False,
            ),  # as in a graph: rows are redone in any case
            (triton.knobs.nvidia, "dump_ptxas_log", True),
            (triton.knobs.compilation, "always_compile", True),  # a kernel from the cache comes without ptxas's words
        ):
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        triton.runtime.driver.set_active(Driver(number))
        try:
            step(*arguments)
        except Exception as error:
            launches.append({"card": number, "case": name_of(case), "error": f"{type(error).__name__}: {error}"})
    return launches


COMPILED = {}  # by this process: Triton compiles a launch once, and ptxas says nothing of it the second time


def compile_step(numbers, step):
    """All cases of a step for these cards, in one process, where what two of them launch is compiled once."""
    return [
        launch
        for number in numbers
        for case in CASES
        if case[0] is step and (number == 90 or "hopper" not in case)
        for launch in compile_case(number, case, COMPILED)
    ]


def main(out, workers, *numbers):
    assert not runtime.INTERPRETED, "TRITON_INTERPRET=0 must be set"
    torch.set_num_threads(1)
    steps = list(dict.fromkeys(case[0] for case in CASES))
    with concurrent.futures.ProcessPoolExecutor(int(workers)) as pool:
        found = pool.map(compile_step, itertools.repeat([int(number) for number in numbers]), steps)
        launches = [one for some in found for one in some]
    pathlib.Path(out).write_text(json.dumps(launches))


if __name__ == "__main__":
    main(*sys.argv[1:])
