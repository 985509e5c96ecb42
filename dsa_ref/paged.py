"""Pages of a cache, byte by byte: the index cache's and the FP8 rows of the KV cache. Numbers are little-endian.

    a page of the index cache    | Di values of token 0 | ... | of the last token | its fp32 scales, one a token |
    a row of the KV cache        | v_dim e4m3 values | an fp32 scale for each 128 of them | D - v_dim bf16 values |

So the values of a page lie together, and then its scales; 132 bytes a token and 656 a row in V3.2. A token's physical
slot is page · (tokens a page) + its place in the page.

Source: SPEC section 6; DeepGEMM's and FlashMLA's documentation of their caches.
"""

import math
import struct

import numpy as np
import torch
from torch import Tensor

from .contracts import (
    E4M3,
    FLOATS,
    FP8_TILE,
    Array,
    check_count,
    check_dtype,
    check_fp8_v_dim,
    check_index_pages,
    check_own_places,
    check_row_width,
    check_shapes,
    check_slots,
    fp8_row_bytes,
    page_tokens,
    values_readable,
)
from .quantize import MAGNITUDES, quantize, quantize_loops


def e4m3_byte(value: float) -> int:
    """The byte of a number that e4m3 holds exactly: sign, four exponent bits, three mantissa bits."""
    sign = 0x80 if math.copysign(1.0, value) < 0 else 0
    return sign | (0x7F if math.isnan(value) else MAGNITUDES[:0x7F].index(abs(value)))


def e4m3_value(byte: int) -> float:
    """What a byte stands for; 0x7f and 0xff are NaN."""
    magnitude = math.nan if byte & 0x7F == 0x7F else MAGNITUDES[byte & 0x7F]
    return -magnitude if byte & 0x80 else magnitude


def fp32_bytes(value: float) -> list[int]:
    """The four bytes of an fp32 number."""
    return list(struct.pack("<f", value))


def fp32_value(four: Array) -> float:
    """The number in four bytes."""
    return struct.unpack("<f", bytes(four.tolist()))[0]


def bf16_bytes(value: float) -> list[int]:
    """The two upper bytes of the fp32 number, rounded to nearest, ties to even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    if not math.isnan(value):
        bits += 0x7FFF + (bits >> 16 & 1)
    return list(struct.pack("<I", bits))[2:]


def bf16_value(two: Array) -> float:
    """The number in two bytes."""
    return struct.unpack("<f", bytes([0, 0, *two.tolist()]))[0]


def pack_index_loops(k_idx: Array, k_scale: Array, page_size: int = 64) -> Array:
    """Index keys [S, Di], which e4m3 holds exactly, and scales [S] -> uint8 [ceil(S / page_size), bytes]."""
    S, Di = k_idx.shape
    pages = np.zeros((-(-S // page_size), page_size * (Di + 4)), dtype=np.uint8)
    for s in range(S):
        page, place = s // page_size, s % page_size
        for d in range(Di):
            pages[page, place * Di + d] = e4m3_byte(float(k_idx[s, d]))
        first = page_size * Di + 4 * place  # behind the values of all tokens
        pages[page, first : first + 4] = fp32_bytes(float(k_scale[s]))
    return pages


def unpack_index_loops(index_pages: Array, index_dim: int) -> tuple[Array, Array]:
    """uint8 pages -> (k_idx float64 [pages · page, Di], k_scale float64 [pages · page])."""
    pages, width = index_pages.shape
    page_size = width // (index_dim + 4)
    k_idx, k_scale = np.zeros((pages * page_size, index_dim)), np.zeros(pages * page_size)
    for s in range(pages * page_size):
        page, place = s // page_size, s % page_size
        for d in range(index_dim):
            k_idx[s, d] = e4m3_value(int(index_pages[page, place * index_dim + d]))
        first = page_size * index_dim + 4 * place
        k_scale[s] = fp32_value(index_pages[page, first : first + 4])
    return k_idx, k_scale


def pack_kv_loops(kv: Array, v_dim: int) -> Array:
    """Latent rows [S, D] -> FP8 rows uint8 [S, row]: each tile of the first v_dim columns quantised, the rest bf16."""
    rows = []
    for latent in kv:
        values, scales = [], []
        for first in range(0, v_dim, FP8_TILE):
            tile, scale = quantize_loops(latent[None, first : min(first + FP8_TILE, v_dim)])
            values += [e4m3_byte(value) for value in tile[0]]
            scales += fp32_bytes(scale[0])
        rest = [byte for value in latent[v_dim:] for byte in bf16_bytes(float(value))]
        rows.append(values + scales + rest)
    return np.array(rows, dtype=np.uint8)


def unpack_kv_loops(rows: Array, v_dim: int) -> Array:
    """FP8 rows uint8 [S, row] -> float64 [S, D]. Scales may be any fp32 numbers."""
    tiles = -(-v_dim // FP8_TILE)
    rest = v_dim + 4 * tiles  # where the bf16 values begin
    D = v_dim + (rows.shape[1] - rest) // 2
    kv = np.zeros((len(rows), D))
    for s, row in enumerate(rows):
        for d in range(v_dim):
            first = v_dim + 4 * (d // FP8_TILE)
            kv[s, d] = e4m3_value(int(row[d])) * fp32_value(row[first : first + 4])
        for d in range(v_dim, D):
            first = rest + 2 * (d - v_dim)
            kv[s, d] = bf16_value(row[first : first + 2])
    return kv


def pack_index(k_idx: Tensor, k_scale: Tensor, page_size: int = 64) -> Tensor:
    """The index pages of S tokens: uint8 [ceil(S / page_size), page_size · (Di + 4)]; unused places are 0.

    k_idx: float8_e4m3fn [S, Di]; k_scale: fp32 [S], as `rotate_quantize` gives them. S may be 0.

    Raises: ValueError for other shapes or devices, TypeError for other dtypes.
    """
    check_shapes(k_idx=(k_idx, "T Di"), k_scale=(k_scale, "T"))
    check_dtype("k_idx", k_idx, (E4M3,))
    check_dtype("k_scale", k_scale, (torch.float32,))
    check_count("page_size", page_size)
    S, Di = k_idx.shape
    pages = k_idx.new_zeros(-(-S // page_size), page_size * (Di + 4), dtype=torch.uint8)
    store_index(pages, torch.arange(S, device=k_idx.device), k_idx, k_scale)
    return pages


def unpack_index(index_pages: Tensor, index_dim: int) -> tuple[Tensor, Tensor]:
    """Index pages uint8 [pages, bytes] -> (k_idx float8_e4m3fn [pages · page, Di], k_scale fp32 [pages · page]).

    Raises: ValueError for pages that are not whole tokens, TypeError for another dtype.
    """
    check_shapes(index_pages=(index_pages, "T bytes"))
    check_count("index_dim", index_dim)
    check_index_pages(index_pages, index_dim)
    return read_index(index_pages, index_dim)


def read_index(index_pages: Tensor, index_dim: int) -> tuple[Tensor, Tensor]:
    """`unpack_index` on checked arguments."""
    split = page_tokens(index_pages, index_dim) * index_dim
    values, scales = index_pages[:, :split], index_pages[:, split:]
    return _as(values, E4M3).reshape(-1, index_dim), _as(scales, torch.float32).reshape(-1)


def pack_kv(kv: Tensor, v_dim: int) -> Tensor:
    """FP8 rows uint8 [S, row] of latent rows kv, float [S, D]; 656 bytes a row in V3.2. S may be 0.

    v_dim: the first v_dim columns are quantised as by `quantize`, each 128 of them with a scale of their own (all of
    them, where there are fewer); the others are rounded to bf16.

    Raises: ValueError for another shape, a v_dim above D or of 1.5 tiles, NaN or infinity among the first v_dim
    columns, which no scale can hold; TypeError for other types.
    """
    check_shapes(kv=(kv, "T D"))
    check_dtype("kv", kv, FLOATS)
    check_fp8_v_dim(v_dim)
    if v_dim > kv.shape[1]:
        raise ValueError(f"v_dim must be at most D = {kv.shape[1]}, got {v_dim}")
    latent, rest = kv.detach().tensor_split((v_dim,), dim=1)
    check_fp8_finite(latent)
    values, scales = quantize(latent.unflatten(1, (-1, min(v_dim, FP8_TILE))))
    parts = values.flatten(1), scales, rest.to(torch.float32).to(torch.bfloat16)
    return torch.cat([_bytes_of(part) for part in parts], dim=1)


def check_fp8_finite(latent) -> None:
    """What is to be quantised of kv's rows must be finite, as no scale holds NaN or infinity."""
    if values_readable(latent) and not latent.isfinite().all():
        raise ValueError("kv must be finite in its first v_dim columns, got NaN or infinity")


def unpack_kv(rows: Tensor, v_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """FP8 rows uint8 [..., row] -> [..., D] in dtype, each value times its scale, rounded once. Any fp32 scale counts.

    Raises: ValueError for rows that cannot have this v_dim, TypeError for other types.
    """
    check_shapes(rows=(rows, "*... row"))
    check_dtype("rows", rows, (torch.uint8,))
    check_fp8_v_dim(v_dim)
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype}")
    left = rows.shape[-1] - fp8_row_bytes(v_dim, v_dim)
    if left < 0 or left % 2:
        wanted = f"{fp8_row_bytes(v_dim, v_dim)} bytes (v_dim = {v_dim}) and two for each other dim"
        raise ValueError(f"rows must have {wanted}, got {rows.shape[-1]}")
    return read_kv(rows, v_dim, dtype)


def read_kv(rows: Tensor, v_dim: int, dtype: torch.dtype) -> Tensor:
    """`unpack_kv` on checked arguments."""
    scales = 4 * -(-v_dim // FP8_TILE)
    values, scales, rest = rows.split((v_dim, scales, rows.shape[-1] - v_dim - scales), dim=-1)
    wide = torch.promote_types(dtype, torch.float32)
    tiles = _as(values, E4M3).to(wide).unflatten(-1, (-1, min(v_dim, FP8_TILE)))
    latent = (tiles * _as(scales, torch.float32).to(wide)[..., None]).flatten(-2)
    return torch.cat((latent.to(dtype), _as(rest, torch.bfloat16).to(dtype)), dim=-1)


def write_index(index_pages: Tensor, slots: Tensor, k_idx: Tensor, k_scale: Tensor) -> None:
    """Store T tokens' index keys in place: token t at the physical slot slots[t].

    index_pages: uint8 [pages, page · (Di + 4)]; slots: int32 or int64 [T], distinct; k_idx: float8_e4m3fn [T, Di];
    k_scale: fp32 [T].

    Raises: ValueError for other shapes or devices, slots outside of [0, pages · page) or twice, TypeError for other
    dtypes. Then nothing is stored.
    """
    check_write_index(index_pages, slots, k_idx, k_scale)
    store_index(index_pages, slots, k_idx, k_scale)


def check_write_index(index_pages, slots, k_idx, k_scale) -> None:
    """Arguments of `write_index`."""
    check_shapes(
        slots=(slots, "T"), k_idx=(k_idx, "T Di"), k_scale=(k_scale, "T"), index_pages=(index_pages, "P bytes")
    )
    check_dtype("k_idx", k_idx, (E4M3,))
    check_dtype("k_scale", k_scale, (torch.float32,))
    check_index_pages(index_pages, k_idx.shape[1])
    check_own_places("index_pages", index_pages)
    check_slots(slots, len(index_pages) * page_tokens(index_pages, k_idx.shape[1]))


def write_kv(kv_pages: Tensor, slots: Tensor, kv: Tensor, v_dim: int | None = None) -> None:
    """Store T tokens' latent rows in place: token t at the physical slot slots[t].

    kv_pages: uint8 [pages, page, row] for FP8 rows, which need v_dim, or [pages, page, D] in kv's dtype;
    slots: int32 or int64 [T], distinct; kv: float [T, D].

    Raises: ValueError for other shapes or devices, slots outside of [0, pages · page) or twice, NaN or infinity that an
    FP8 row cannot hold; TypeError for other dtypes. Then nothing is stored.
    """
    check_write_kv(kv_pages, slots, kv, v_dim)
    page_size, fp8 = kv_pages.shape[1], kv_pages.dtype == torch.uint8
    kv_pages[slots // page_size, slots % page_size] = pack_kv(kv, v_dim) if fp8 else kv.detach()


def check_write_kv(kv_pages, slots, kv, v_dim=None) -> None:
    """Arguments of `write_kv`."""
    check_shapes(slots=(slots, "T"), kv=(kv, "T D"), kv_pages=(kv_pages, "P page row"))
    check_dtype("kv", kv, FLOATS)
    check_dtype("kv_pages", kv_pages, (kv.dtype, torch.uint8))
    fp8 = kv_pages.dtype == torch.uint8
    check_row_width("kv_pages", kv_pages, kv.shape[1], v_dim if fp8 else 1)
    check_own_places("kv_pages", kv_pages)
    check_slots(slots, kv_pages.shape[0] * kv_pages.shape[1])


def store_index(index_pages: Tensor, slots: Tensor, k_idx: Tensor, k_scale: Tensor) -> None:
    """`write_index` on checked arguments."""
    Di = k_idx.shape[1]
    page_size = page_tokens(index_pages, Di)
    values = index_pages[:, : page_size * Di].unflatten(1, (page_size, Di))
    scales = index_pages[:, page_size * Di :].unflatten(1, (page_size, 4))
    page, place = slots // page_size, slots % page_size
    values[page, place] = _bytes_of(k_idx)
    scales[page, place] = _bytes_of(k_scale[:, None])


def _as(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes read as dtype along the last dim; a copy, since they may begin at any address."""
    if not part.numel():
        return part.new_empty(*part.shape[:-1], part.shape[-1] // dtype.itemsize, dtype=dtype)
    return part.clone(memory_format=torch.contiguous_format).view(dtype)


def _bytes_of(numbers: Tensor) -> Tensor:
    """The bytes of numbers [..., D] along the last dim; a copy, since those may lie apart."""
    return numbers.detach().clone(memory_format=torch.contiguous_format).view(torch.uint8)
