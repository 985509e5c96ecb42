"""How many bytes a long context needs, before it is begun, and how many are free."""

import pathlib
import sys

import torch

from ..contracts import fp8_row_bytes
from .subject import Sizes

PAGE_SIZE = 64  # tokens
PIECE = 1 << 16  # tokens that are copied into pages at once
KERNEL_SCORES = 1 << 29  # bytes of scores that the kernels' selection keeps at once
REFERENCE_BLOCKS = 4  # the reference's temporaries of a block of pairs that live at once
GIB = 1 << 30
KEPT, PHASES = ("weights", "cache", "pages"), ("warm", "chunks", "checks", "decode")


def bytes_needed(
    sizes: Sizes, tokens: int, chunk: int, decode: int, check: int, reference: bool, cuda: bool
) -> dict[str, int]:
    """Bytes, estimated from above: what is kept, what each phase takes with it, and "total", the most of the phases.

    Kept are "weights"; "cache" of all layers, contiguous, while the context is read; "pages" of all layers for decode.
    Phases are "warm" (kernels on a GPU alone), "chunks", "checks" and "decode"; checks copy one layer's cache, and
    look through it. reference: whether the steps are dsa_ref's; check: 0 for no checks.
    """
    c, item = sizes.config, sizes.dtype.itemsize
    key = c.index_head_dim + 4  # FP8 and a scale
    fp8 = in_fp8(sizes)
    row = fp8_row_bytes(c.latent_dim, c.kv_lora_rank) if fp8 else c.latent_dim * item
    layer_cache = tokens * (c.latent_dim * item + key)
    weights, cache = sizes.weights * item, layer_cache * sizes.layers
    pages = -(-(tokens + decode) // PAGE_SIZE) * PAGE_SIZE * (row + key) * sizes.layers if decode else 0

    heads = c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.latent_dim + c.kv_lora_rank + c.v_head_dim)
    call = chunk * (heads + c.index_n_heads * c.index_head_dim + 4 * c.dim) * item
    blocks = REFERENCE_BLOCKS * (1 << 30 if cuda else 1 << 26) if reference else KERNEL_SCORES
    scored = 2 * tokens * (c.index_n_heads + c.index_head_dim) * 4  # a row's products, and keys in fp32
    checking = layer_cache + max(tokens * c.latent_dim * (item + 2), scored)  # the copy, and whether it is finite
    unpacked = tokens * ((row + 12 * c.latent_dim if fp8 else 2 * row) + 2 * key)  # from pages, FP8 through fp32

    phases = {"chunks": weights + cache + call + blocks}
    if cuda and not reference:
        phases = {"warm": weights + cache + 2 * (call + blocks)} | phases
    if check:
        phases["checks"] = weights + cache + call + checking
    if decode:
        copying = cache + 4 * min(PIECE, tokens) * c.latent_dim * 4
        looking = max(unpacked, layer_cache + checking) if check else 0
        phases["decode"] = weights + pages + max(copying, looking)
    return {"weights": weights, "cache": cache, "pages": pages} | phases | {"total": max(phases.values())}


def in_fp8(sizes: Sizes) -> bool:
    """Whether pages keep latents as FP8 rows: where weights have bf16, as when it is served."""
    return sizes.dtype == torch.bfloat16


def check_memory(needed: dict[str, int], free: int | None, device: torch.device) -> None:
    """Raise ValueError where `needed`, as `bytes_needed` gives it, is more than is free. None: nobody knows."""
    if free is not None and needed["total"] > free:
        raise ValueError(
            f"tokens and chunk must fit the memory of {device}: they need {as_text(needed)}, "
            f"got {free / GIB:.2f} GiB free. Ask for fewer tokens or a smaller chunk"
        )


def as_text(needed: dict[str, int]) -> str:
    """`bytes_needed` in words."""
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in needed.items() if name in KEPT)
    phases = ", ".join(f"{name} {size / GIB:.2f}" for name, size in needed.items() if name in PHASES)
    return f"{needed['total'] / GIB:.2f} GiB (kept: {parts}; at most in each phase: {phases})"


def bytes_free(device: torch.device, root: str = "/") -> int | None:
    """Bytes that can still be had on the device: a GPU's free memory, a CPU's available one; None where nobody says.

    root: where Linux says so; a container's limit counts too.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        lines = pathlib.Path(root, "proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return None
    try:
        group = pathlib.Path(root, "sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        return min(free, max(0, limit - used))
    except (OSError, ValueError):  # no limit is the word "max"
        return free


def take_peak(device: torch.device) -> int | None:
    """The most bytes that torch has held on a GPU since the last call, or this process on a CPU since it began; None
    where nobody says."""
    if device.type == "cuda":
        largest = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return largest
    try:
        import resource
    except ImportError:  # Windows
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
