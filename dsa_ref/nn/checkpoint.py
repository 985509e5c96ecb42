"""Attention layers in the files of DeepSeek-V3.2 and GLM-5: Hugging Face names, shards with an index, FP8 by blocks.

A layer's tensors are named `model.layers.{i}.self_attn.` + the parameter names of `DSALayer`. An FP8 matrix `name` has
a partner `name_scale_inv` (`block_scales.py`). Names and shapes do not tell the two models apart: config.json does.

Source: SPEC sections 7 and 9; the layout of the V3.2-Exp checkpoint on Hugging Face.
"""

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping

import torch
from torch import Tensor

import dsa_ref

from ..config import DSAConfig
from ..contracts import E4M3, FLOATS, check_count, check_dtype
from ..hf_config import CONFIG, read_config
from .block_scales import SCALE_INV, quantize_blocks, take_dequantized
from .layer import DSALayer, Ops

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PREFIXES = ("model.", "")  # of a model with a language head, and of one without
YARN = ("rope_factor", "beta_fast", "beta_slow", "original_seq_len", "mscale")
NOT_IN_THE_FILE = ("index_fp8", "max_seq_len", "mha_keys")  # ours to choose, and without effect of its own


def load_layer(
    path_or_state_dict: str | os.PathLike | Mapping[str, Tensor],
    layer_index: int,
    config: DSAConfig | None = None,
    ops: Ops = dsa_ref,
    dtype: torch.dtype = torch.bfloat16,
) -> DSALayer:
    """The attention layer `layer_index` of a checkpoint, as a `DSALayer(config, ops)`.

    path_or_state_dict: a mapping of full tensor names to tensors, a .safetensors file, or a directory that holds
    `model.safetensors` or `model.safetensors.index.json` with its shards. Only this layer's tensors are read, and only
    the shards that hold one are opened. FP8 matrices are dequantised in fp32 and rounded to `dtype` once.
    config: None takes `DSAConfig.from_hf` of the `config.json` beside the tensors. Where there is such a file, a config
    must agree with it, but for `index_fp8` and lengths that change nothing. A layer that shares a selection
    (`DSAConfig.has_indexer`) is made without an indexer.
    dtype: of all parameters but the indexer's k_norm, which is never narrower than fp32, and its weights_proj, which
    stays fp32 where the file has it so: both are computed in fp32. The tensors are copies.

    Raises: ValueError for a tensor that is missing, of another shape than config's, FP8 without a scale of known
    meaning, or under this layer's prefix but unknown to the layer, for a damaged file or index, and for a config that
    disagrees with config.json, naming the field; TypeError for wrong dtypes; FileNotFoundError for a missing file,
    shard, or config. What `DSAConfig.from_hf` refuses, this refuses.
    """
    _check_layer_index(layer_index)
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype}")
    if config is not None and not isinstance(config, DSAConfig):
        raise TypeError(f"config must be a DSAConfig or None, got {type(config).__name__}")
    source, quantization = path_or_state_dict, None
    if isinstance(source, Mapping):
        place, files = "the state dict", dict.fromkeys(source)
        if config is None:
            raise ValueError("config must be given with a state dict, which has no config.json, got None")
    elif isinstance(source, (str, os.PathLike)):
        place = pathlib.Path(source)
        files = locate(place)
        config, quantization = _config_beside(place, config)
    else:
        raise TypeError(f"path_or_state_dict must be a path or a mapping, got {type(source).__name__}")
    prefix = _prefix(files, layer_index, place)
    names = [name for name in files if name.startswith(prefix)]
    tensors = {name: source[name] for name in names} if isinstance(source, Mapping) else _read(files, names)

    with torch.device("meta"):  # shapes only: random weights of this size would cost seconds and a gigabyte
        layer = DSALayer(config, ops, indexer=config.has_indexer(layer_index))
    wanted = {prefix + name: list(tensor.shape) for name, tensor in layer.state_dict().items()}
    if missing := sorted(wanted.keys() - tensors.keys()):
        no_indexer = all(name.startswith(f"{prefix}indexer.") for name in missing) and len(missing) == 5
        cure = ": a layer that shares a selection has S in config.index_pattern" if no_indexer else ""
        names = ", ".join(missing)
        raise ValueError(f"{place} must hold every tensor of layer {layer_index}, got none named {names}{cure}")
    parameters = {}
    for name, shape in wanted.items():
        own, stored = name.removeprefix(prefix), tensors[name]
        parameter = _take(tensors, name, shape, quantization)
        kept = _parameter_dtype(own, dtype, stored.dtype)
        parameters[own] = parameter.detach().to(kept, copy=True).contiguous()
    if tensors:
        raise ValueError(f"layer {layer_index} must use every tensor, got unknown ones: {', '.join(sorted(tensors))}")
    layer.load_state_dict(parameters, assign=True)
    layer.freqs = layer.frequencies()  # a buffer that no checkpoint holds
    return layer


def save_checkpoint(
    directory: str | os.PathLike, layers: dict[int, DSALayer], fp8: bool = True, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write layers {index: DSALayer} as shards `model-0000n-of-0000N.safetensors` and their index, in `directory`.

    fp8: True writes V3.2's dtypes: FP8 with scales for every projection, wq_b and wk, bf16 for weights_proj and the
    RMSNorms, fp32 for k_norm. False rounds nothing: each parameter in its own dtype, k_norm in fp32 or wider.
    max_shard_bytes: bound on the tensors of one shard; a larger tensor gets a shard to itself. At most two shards are
    held in memory. The index is written last, and no config.json: `load_layer` needs the layers' config.

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
        with torch.device("meta"):
            known = DSALayer(layer.config, layer.ops, indexer=layer.indexer is not None).state_dict()
        if other := sorted(layer.state_dict().keys() ^ known.keys()):
            raise ValueError(
                f"layers[{index}] must have the weights that checkpoints have: merge adapters and remove "
                f"parametrisations first, got {', '.join(other)}"
            )
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


def _config_beside(path, config):
    """(the config to use, quantization_config or None), after config.json beside the tensors where there is one."""
    file = (path if path.is_dir() else path.parent) / CONFIG
    if not file.is_file():
        if config is None:
            raise FileNotFoundError(f"config must be given where there is no {CONFIG}, got None and no file {file}")
        return config, None
    fields = read_config(file)
    found = DSAConfig.from_hf(fields)
    if config is not None:
        names = [field.name for field in dataclasses.fields(DSAConfig)]
        if not config.yarn and not found.yarn:
            names = [name for name in names if name not in YARN]
        for name in ("yarn", *names):
            ours, theirs = getattr(config, name), getattr(found, name)
            if ours != theirs and name not in NOT_IN_THE_FILE:
                raise ValueError(f"config.{name} must be {theirs!r}, as {file} has it, got {ours!r}")
    return config or found, fields.get("quantization_config")


def _prefix(names, layer_index, place):
    """What this layer's names begin with."""
    layer = f"layers.{layer_index}.self_attn."
    if strange := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"the names of {place} must be str, got {strange[0]!r}")
    found = {name.partition(layer)[0] for name in names if layer in name}
    known = [prefix for prefix in PREFIXES if prefix in found]
    if len(known) > 1:
        raise ValueError(f"{place} must name layer {layer_index} once, got both model.{layer} and {layer}")
    if found and not known:
        raise ValueError(f"{place} must name tensors model.{layer}... or {layer}..., got {min(found)}{layer}...")
    return (known or PREFIXES)[0] + layer


def _read(files, names):
    """The tensors of these names, in the files' own dtypes. files: {name: file}."""
    shards = collections.defaultdict(list)
    for name in names:
        shards[files[name]].append(name)
    tensors = {}
    for file, wanted in shards.items():
        with _open(file) as shard:
            if absent := sorted(set(wanted) - set(shard.keys())):
                raise ValueError(f"{file} must hold what the index places there, got none named {', '.join(absent)}")
            tensors |= {name: shard.get_tensor(name) for name in wanted}
    return tensors


def locate(path: pathlib.Path) -> dict[str, pathlib.Path]:
    """{tensor name: the file that holds it}, without reading a tensor. Raises as `load_layer` does for files."""
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


def _take(tensors, name, shape, quantization):
    """Remove one parameter, and its scale if it is FP8, from tensors; check it and return it as floats."""
    tensor = tensors[name]
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if list(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} (from config), got {list(tensor.shape)}")
    check_dtype(name, tensor, (*FLOATS, E4M3))
    if tensor.dtype == E4M3:
        return take_dequantized(tensors, name, quantization)
    return tensors.pop(name)  # a scale beside it stays behind, and is refused as unknown


def _stored_tensors(layers, fp8):
    """Every (full name, tensor) of a checkpoint, in the dtypes of the file and on the CPU, one at a time."""
    for index, layer in sorted(layers.items()):
        for own, parameter in layer.state_dict().items():
            name, parameter = f"model.layers.{index}.self_attn.{own}", parameter.cpu()
            if fp8 and parameter.dim() == 2 and own != "indexer.weights_proj.weight":
                w8, scale_inv = quantize_blocks(parameter)
                yield name, w8
                yield name + SCALE_INV, scale_inv
            else:
                dtype = torch.bfloat16 if fp8 else parameter.dtype
                dtype = _parameter_dtype(own, dtype, dtype)
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


def _parameter_dtype(name, dtype, stored):
    """dtype, but fp32 or wider for the indexer's k_norm, and for its weights_proj where that is stored in fp32."""
    keeps = name.startswith("indexer.k_norm.") or name == "indexer.weights_proj.weight" and stored == torch.float32
    return torch.promote_types(dtype, torch.float32) if keeps else dtype


def _partial(n):
    """The name of a shard while the number of shards is not known."""
    return f"model-{n:05d}.partial"


def _check_layer_index(index) -> None:
    if isinstance(index, bool) or not isinstance(index, int):
        raise TypeError(f"layer_index must be an int, got {index!r}")
    if index < 0:
        raise ValueError(f"layer_index must be at least 0, got {index}")
