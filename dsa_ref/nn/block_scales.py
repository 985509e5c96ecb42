"""FP8 matrices with their scales, as checkpoints keep them: V3.2's blocks of 128×128, or what the file's config says.

A scale multiplies, whatever its name says: W[r, c] = e4m3[r, c] · scale[r // rows, c // columns], blocks of rows ×
columns, of which the last row and the last column may be short.

Source: SPEC sections 7 and 9.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..contracts import E4M3, FLOATS, check_dtype, check_shapes
from ..quantize import E4M3_MAX

BLOCK = 128
SCALE_INV, SCALE = "_scale_inv", "_scale"
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)


def dequantize_blocks(
    weight: Tensor, scale_inv: Tensor, name: str = "weight", block: tuple[int, int] = (BLOCK, BLOCK), suffix=SCALE_INV
) -> Tensor:
    """weight e4m3 [R, C] times scale_inv [ceil(R / rows), ceil(C / columns)], block by block, in fp32 -> fp32 [R, C].

    scale_inv: fp32, bf16 or E8M0 (powers of two). name, name + suffix: what errors call them. block: (rows, columns).
    Raises: ValueError for wrong shapes and for a scale that is negative, infinite or NaN, TypeError for wrong dtypes.
    """
    check_shapes(**{name: (weight, "R C"), name + suffix: (scale_inv, "Rb Cb")})
    check_dtype(name, weight, (E4M3,))
    check_dtype(name + suffix, scale_inv, SCALE_DTYPES)
    (R, C), (rows, columns) = weight.shape, block
    blocks = [-(-R // rows), -(-C // columns)]
    if list(scale_inv.shape) != blocks:
        raise ValueError(
            f"{name}{suffix} must have shape {blocks}, one scale for each {rows}×{columns} block of [{R}, {C}], "
            f"got {list(scale_inv.shape)}"
        )
    scale_inv = scale_inv.to(torch.float32)
    if not (torch.isfinite(scale_inv) & (scale_inv >= 0)).all():
        raise ValueError(f"{name}{suffix} must be finite and not negative, got {scale_inv.min()} to {scale_inv.max()}")
    out = weight.to(torch.float32)
    by_row = scale_inv.repeat_interleave(rows, dim=0)[:R]
    for values, scale in zip(out.split(columns, dim=1), by_row.split(1, dim=1), strict=True):
        values *= scale
    return out


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [R, C] -> (e4m3 [R, C], scale_inv fp32 [ceil(R / 128), ceil(C / 128)]), scale_inv = max |block| / 448.

    A block of zeros gets the smallest normal fp32 as its scale, and stays zero.
    Raises: ValueError for a wrong rank, NaN or infinity, TypeError for a non-float dtype.
    """
    check_shapes(weight=(weight, "R C"))
    check_dtype("weight", weight, FLOATS)
    weight = weight.detach().to(torch.float32)
    if not torch.isfinite(weight).all():
        raise ValueError("weight must be finite, got NaN or infinity")
    w8, scales = torch.empty_like(weight, dtype=E4M3), []
    for rows, rows8 in zip(weight.split(BLOCK), w8.split(BLOCK), strict=True):
        amax = torch.stack([block.abs().amax() for block in rows.split(BLOCK, dim=1)])
        scale = (amax / E4M3_MAX).clamp(min=torch.finfo(torch.float32).tiny)
        scaled = rows / scale.repeat_interleave(BLOCK)[: weight.shape[1]]
        rows8.copy_(scaled.clamp(-E4M3_MAX, E4M3_MAX))  # the division may round to just above 448
        scales.append(scale)
    return w8, torch.stack(scales)


def take_dequantized(tensors: dict[str, Tensor], name: str, quantization: Mapping | None) -> Tensor:
    """Remove an FP8 matrix and its scale from tensors: their product, fp32.

    quantization: `quantization_config` of config.json, or None where there is none: then V3.2's blocks are meant.
    Raises: ValueError for a scale that is missing, and for one whose meaning neither its name nor quantization tells.
    """
    weight = tensors.pop(name)
    check_shapes(**{name: (weight, "R C")})
    suffix, block = _layout(quantization, name, weight.shape)
    if name + suffix not in tensors:
        other = name + (SCALE if suffix == SCALE_INV else SCALE_INV)
        told = "without a quantization_config" if quantization is None else f"by {quantization['quant_method']}"
        got = f"{other}, whose meaning is not known {told}" if other in tensors else "no such tensor"
        raise ValueError(f"{name} is FP8 and must come with {name}{suffix}, got {got}")
    scale = tensors.pop(name + suffix)
    if isinstance(scale, Tensor) and quantization is not None and scale.dim() < 2:
        if block == tuple(weight.shape) and scale.numel() == 1:
            scale = scale.reshape(1, 1)  # one number for the whole matrix
        elif block == (1, weight.shape[1]) and scale.dim() == 1:
            scale = scale[:, None]  # one for each row
    return dequantize_blocks(weight, scale, name, block, suffix)


def _layout(quantization, name, shape):
    """(what the scale's name ends in, the block that shares one)."""
    if quantization is None:
        return SCALE_INV, (BLOCK, BLOCK)
    if not isinstance(quantization, Mapping):
        raise TypeError(f"quantization_config must be an object, got {quantization!r}")
    method = quantization.get("quant_method")
    if method == "fp8":  # transformers' FP8 for DeepSeek's models
        if quantization.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
            raise ValueError(f"quantization_config.fmt must be e4m3, got {quantization['fmt']!r}")
        size = quantization.get("weight_block_size", (BLOCK, BLOCK))
        return SCALE_INV, tuple(shape) if size is None else _block("weight_block_size", size)
    if method == "compressed-tensors":
        if quantization.get("format") not in ("float-quantized", "naive-quantized"):
            got = quantization.get("format")
            raise ValueError(f"quantization_config.format must be float-quantized or naive-quantized, got {got!r}")
        return SCALE, _compressed_block(quantization, shape)
    raise ValueError(f"quantization_config.quant_method must be fp8 or compressed-tensors for {name}, got {method!r}")


def _compressed_block(quantization, shape):
    """The block of compressed-tensors' one scheme for weights. Several schemes would have to be told apart by layer."""
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"quantization_config.config_groups must describe the weights, got {groups!r}")
    schemes = [group.get("weights") if isinstance(group, Mapping) else None for group in groups.values()]
    scheme = schemes[0]
    if not isinstance(scheme, Mapping) or any(other != scheme for other in schemes):
        raise ValueError(f"quantization_config.config_groups must hold one scheme for weights, got {schemes}")
    for field, wanted in (("type", "float"), ("num_bits", 8), ("symmetric", True)):
        if scheme.get(field, wanted) != wanted:
            raise ValueError(f"quantization_config's weights.{field} must be {wanted}, got {scheme[field]!r}")
    strategy = scheme.get("strategy")
    if strategy == "block":
        return _block("block_structure", scheme.get("block_structure"))
    if strategy not in ("tensor", "channel"):
        raise ValueError(f"quantization_config's weights.strategy must be tensor, channel or block, got {strategy!r}")
    return tuple(shape) if strategy == "tensor" else (1, shape[1])


def _block(field, size):
    if not isinstance(size, (list, tuple)) or [type(n) for n in size] != [int, int] or min(size) < 1:
        raise ValueError(f"quantization_config's {field} must be two sizes, got {size!r}")
    return tuple(size)
