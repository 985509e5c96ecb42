"""Attention layers in DeepSeek-V3.2's own files: the Hugging Face names, shards with an index, and FP8 by blocks.

A layer's tensors are named `model.layers.{i}.self_attn.` + the parameter names of `DSALayer`. An FP8 matrix `name` has
a partner `name_scale_inv`: one fp32 for each block of 128×128. In spite of its name it is a multiplier:

    W[r, c] = e4m3[r, c] · scale_inv[r // 128, c // 128]      the last block row and column may be short

Source: SPEC section 7; the layout of the V3.2-Exp checkpoint on Hugging Face.
"""

import collections
import json
import os
import pathlib
from collections.abc import Mapping

import torch
from torch import Tensor

import dsa_ref

from ..config import DSAConfig
from ..contracts import E4M3, FLOATS, check_count, check_dtype, check_shapes
from ..quantize import E4M3_MAX
from ..rope import rope_frequencies
from .layer import DSALayer, Ops

BLOCK = 128
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SCALE = "_scale_inv"


def load_layer(
    path_or_state_dict: str | os.PathLike | Mapping[str, Tensor],
    layer_index: int,
    config: DSAConfig,
    ops: Ops = dsa_ref,
    dtype: torch.dtype = torch.bfloat16,
) -> DSALayer:
    """The attention layer `layer_index` of a checkpoint, as a `DSALayer(config, ops)`.

    path_or_state_dict: a mapping of full tensor names to tensors, a .safetensors file, or a directory that holds
    `model.safetensors` or `model.safetensors.index.json` with its shards. Only this layer's tensors are read, and only
    the shards that hold one are opened. FP8 matrices are dequantised in fp32 and rounded to `dtype` once.
    dtype: of all parameters but the indexer's k_norm, which is never narrower than fp32. The tensors are copies.

    Raises: ValueError for a tensor that is missing, of another shape than config's, FP8 without its scale, or under
    this layer's prefix but unknown to the layer, and for a damaged file or index; TypeError for wrong dtypes;
    FileNotFoundError for a missing file or shard.
    """
    _check_layer_index(layer_index)
    prefix = f"model.layers.{layer_index}.self_attn."
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype}")
    source = path_or_state_dict
    if isinstance(source, Mapping):
        tensors, place = {name: source[name] for name in source if name.startswith(prefix)}, "the state dict"
    elif isinstance(source, (str, os.PathLike)):
        tensors, place = _read(pathlib.Path(source), prefix), source
    else:
        raise TypeError(f"path_or_state_dict must be a path or a mapping, got {type(source).__name__}")

    with torch.device("meta"):  # shapes only: random weights of this size would cost seconds and a gigabyte
        layer = DSALayer(config, ops)
    wanted = {prefix + name: list(tensor.shape) for name, tensor in layer.state_dict().items()}
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise ValueError(f"{place} must hold every tensor of layer {layer_index}, got none named {', '.join(missing)}")
    parameters = {}
    for name, shape in wanted.items():
        parameter, own = _take(tensors, name, shape), name.removeprefix(prefix)
        parameters[own] = parameter.detach().to(_parameter_dtype(own, dtype), copy=True).contiguous()
    if tensors:
        raise ValueError(f"layer {layer_index} must use every tensor, got unknown ones: {', '.join(sorted(tensors))}")
    layer.load_state_dict(parameters, assign=True)
    layer.freqs = rope_frequencies(config).to(layer.o_proj.weight.device)  # a buffer that no checkpoint holds
    return layer


def save_checkpoint(
    directory: str | os.PathLike, layers: dict[int, DSALayer], fp8: bool = True, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write layers {index: DSALayer} as shards `model-0000n-of-0000N.safetensors` and their index, in `directory`.

    fp8: True writes V3.2's dtypes: FP8 with scales for every projection, wq_b and wk, bf16 for weights_proj and the
    RMSNorms, fp32 for k_norm. False rounds nothing: each parameter in its own dtype, k_norm in fp32 or wider.
    max_shard_bytes: bound on the tensors of one shard; a larger tensor gets a shard to itself. At most two shards are
    held in memory. The index is written last.

    Raises: TypeError or ValueError for other layers or sizes, ValueError for weights that FP8 cannot hold (NaN,
    infinity), FileExistsError where the directory already holds a checkpoint.
    """
    from safetensors.torch import save_file

    check_count("max_shard_bytes", max_shard_bytes)
    if not isinstance(layers, dict):
        raise TypeError(f"layers must be a dict {{index: DSALayer}}, got {type(layers).__name__}")
    if not layers:
        raise ValueError("layers must have at least one entry, got {}")
    for index, layer in layers.items():
        _check_layer_index(index)
        if not isinstance(layer, DSALayer):
            raise TypeError(f"layers[{index}] must be a DSALayer, got {type(layer).__name__}")
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if old := sorted(file.name for file in directory.glob("model*.safetensors*")):
        raise FileExistsError(f"directory must not hold a checkpoint already, got {directory} with {old[0]}")

    shards, total_bytes = [], 0  # shards: the tensor names of each one
    for n, shard in enumerate(_shards(_stored_tensors(layers, fp8), max_shard_bytes), start=1):
        save_file(shard, directory / _partial(n), metadata={"format": "pt"})
        shards.append(list(shard))
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
    weight_map = {}
    for n, names in enumerate(shards, start=1):  # only now is the N of "-of-N" known
        file = f"model-{n:05d}-of-{len(shards):05d}.safetensors"
        (directory / _partial(n)).rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def dequantize_blocks(weight: Tensor, scale_inv: Tensor, name: str = "weight") -> Tensor:
    """weight e4m3 [R, C] times scale_inv fp32 [ceil(R / 128), ceil(C / 128)], block by block -> fp32 [R, C].

    name: what errors call the weight. Raises: ValueError for wrong shapes, TypeError for wrong dtypes.
    """
    check_shapes(**{name: (weight, "R C"), name + SCALE: (scale_inv, "Rb Cb")})
    check_dtype(name, weight, (E4M3,))
    check_dtype(name + SCALE, scale_inv, (torch.float32,))
    R, C = weight.shape
    blocks = [-(-R // BLOCK), -(-C // BLOCK)]
    if list(scale_inv.shape) != blocks:
        raise ValueError(
            f"{name}{SCALE} must have shape {blocks}, one scale for each {BLOCK}×{BLOCK} block of [{R}, {C}], "
            f"got {list(scale_inv.shape)}"
        )
    out = weight.to(torch.float32)
    for rows, scales in zip(out.split(BLOCK), scale_inv, strict=True):
        rows *= scales.repeat_interleave(BLOCK)[:C]
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


def _read(path, prefix):
    """The tensors of a file or directory whose names start with prefix, in the file's own dtypes."""
    shards = collections.defaultdict(list)
    for name, file in _locate(path).items():
        if name.startswith(prefix):
            shards[file].append(name)
    tensors = {}
    for file, names in shards.items():
        with _open(file) as shard:
            if absent := sorted(set(names) - set(shard.keys())):
                raise ValueError(f"{file} must hold what the index places there, got none named {', '.join(absent)}")
            tensors |= {name: shard.get_tensor(name) for name in names}
    return tensors


def _locate(path):
    """{tensor name: the file that holds it}, without reading a tensor."""
    index = path / INDEX
    if path.is_dir() and index.is_file():
        if (path / SINGLE).is_file():
            raise ValueError(f"{path} must hold {SINGLE} or {INDEX}, got both: pass one file, or remove one")
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: path / shard for name, shard in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} must be JSON with a weight_map of tensor names to files: {error!r}") from error
    file = path / SINGLE if path.is_dir() else path
    with _open(file) as single:
        return dict.fromkeys(single.keys(), file)


def _open(file):
    """A safetensors file, from which tensors are read one by one."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        also = f" (nor {INDEX})" if file.name == SINGLE else ""
        raise FileNotFoundError(f"checkpoint file {file} does not exist{also}")
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} must be a safetensors file: {error}") from error


def _take(tensors, name, shape):
    """Remove one parameter, and its scale if it is FP8, from tensors; check it and return it as floats."""
    tensor = tensors.pop(name)
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if list(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} (from config), got {list(tensor.shape)}")
    check_dtype(name, tensor, (*FLOATS, E4M3))
    if tensor.dtype != E4M3:
        return tensor  # a scale beside it stays behind, and is refused as unknown
    if name + SCALE not in tensors:
        raise ValueError(f"{name} is FP8 and must come with {name}{SCALE}, got no such tensor")
    return dequantize_blocks(tensor, tensors.pop(name + SCALE), name)


def _stored_tensors(layers, fp8):
    """Every (full name, tensor) of a checkpoint, in the dtypes of the file and on the CPU, one at a time."""
    for index, layer in sorted(layers.items()):
        for own, parameter in layer.state_dict().items():
            name, parameter = f"model.layers.{index}.self_attn.{own}", parameter.cpu()
            if fp8 and parameter.dim() == 2 and own != "indexer.weights_proj.weight":
                w8, scale_inv = quantize_blocks(parameter)
                yield name, w8
                yield name + SCALE, scale_inv
            else:
                dtype = _parameter_dtype(own, torch.bfloat16 if fp8 else parameter.dtype)
                yield name, parameter.to(dtype, copy=True).contiguous()


def _shards(named_tensors, max_bytes):
    """Gather consecutive (name, tensor) pairs into dicts of at most max_bytes, or of one larger tensor."""
    shard, size = {}, 0
    for name, tensor in named_tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _parameter_dtype(name, dtype):
    """dtype, but fp32 or wider for the indexer's k_norm, which V3.2 keeps in fp32 in the file and at run time."""
    return torch.promote_types(dtype, torch.float32) if name.startswith("indexer.k_norm.") else dtype


def _partial(n):
    """The name of a shard while the number of shards is not known."""
    return f"model-{n:05d}.partial"


def _check_layer_index(index) -> None:
    if isinstance(index, bool) or not isinstance(index, int):
        raise TypeError(f"layer_index must be an int, got {index!r}")
    if index < 0:
        raise ValueError(f"layer_index must be at least 0, got {index}")
