"""What a checkpoint directory holds, beside what transformers would load from it: headers are read, weights are not.

Names and shapes that transformers wants come from its own model of these sizes, made without memory.
"""

import collections
import copy
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from transformers import (
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    PreTrainedConfig,
)
from transformers.core_model_loading import revert_weight_conversion

from ...contracts import FLOATS
from ...nn.block_scales import SCALE, SCALE_INV
from ...nn.checkpoint import locate

MODELS = {
    "deepseek_v32": (DeepseekV32Config, DeepseekV32ForCausalLM),
    "glm_moe_dsa": (GlmMoeDsaConfig, GlmMoeDsaForCausalLM),
}
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
FP8 = "F8_E4M3"
LARGEST_HEADER = 100_000_000  # bytes: what safetensors itself reads at most
LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")


class Stored(NamedTuple):
    """One tensor of a file."""

    dtype: str  # as safetensors writes it
    shape: list[int]
    bytes: int


class Wanted(NamedTuple):
    """One tensor that transformers loads."""

    shape: list[int]
    keeps_fp32: bool  # also where the model has 16 bits


class Weights(NamedTuple):
    """What `read_weights` found."""

    tensors: int
    by_dtype: dict[str, int]  # bytes in the files of what is loaded
    dtype: torch.dtype  # of the loaded model
    memory: int  # bytes once it is loaded
    beyond: dict[int, int]  # bytes in the files of each layer past the model's last
    ignored: list[str]  # what else transformers passes over
    wrong: list[str]  # a sentence for each fault


def read_header(file: pathlib.Path) -> dict[str, Stored]:
    """{name: tensor} of a safetensors file. Raises ValueError where it is none or was cut short, and OSError."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise ValueError(f"{file.name} must be a safetensors file: its header has {length} bytes, the file {size}")
        text = opened.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors, end = {}, 0
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            tensors[name] = Stored(entry["dtype"], [int(n) for n in entry["shape"]], int(last) - int(first))
            end = max(end, last)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file.name} must be a safetensors file: its header is damaged: {error!r}") from error
    if 8 + length + end != size:
        raise ValueError(f"{file.name} must have {8 + length + end} bytes, as its header says, got {size}")
    return tensors


def their_config(fields: Mapping) -> PreTrainedConfig:
    """transformers' config of a config.json's fields. Raises ValueError for one that it refuses."""
    try:
        config = MODELS[fields["model_type"]][0].from_dict(copy.deepcopy(dict(fields)))
    except Exception as error:  # whatever its fields lead to
        raise ValueError(f"config.json must be one that transformers takes: {_one_line(error)}") from error
    if config.dtype is not None and config.dtype not in FLOATS:
        raise ValueError(f"dtype in config.json must be that of a float of 16 bits or more, got {config.dtype}")
    return config


def wanted_tensors(config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Wanted]:
    """{name: tensor} that transformers loads into a model of this config in dtype, under the names that files have.

    Raises ValueError for sizes of which no model can be made.
    """
    try:
        with torch.device("meta"):
            model = MODELS[config.model_type][1](config)
        tied = model.all_tied_weights_keys
        tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        in_files = revert_weight_conversion(model, tensors)
    except Exception as error:
        raise ValueError(f"config.json must be that of a model transformers can make: {_one_line(error)}") from error
    kept = model._keep_in_fp32_modules_strict | (model._keep_in_fp32_modules if dtype == torch.float16 else set())
    return {name: Wanted(list(tensor.shape), any(part in name for part in kept)) for name, tensor in in_files.items()}


def read_weights(
    directory: str | os.PathLike, config: PreTrainedConfig, suffix: str | None, keeps_fp8: bool
) -> Weights:
    """The directory's files beside the `wanted_tensors` of transformers' config.

    suffix: see `scale_suffix`; where it is None, names and shapes are not compared. keeps_fp8: whether FP8 weights stay
    FP8 when transformers loads them here; else they are widened to the model's dtype, which is the config's, or where
    that names none, the one that most of the files have. Bytes in memory: elements times that dtype's bytes, 4 for what
    transformers keeps in fp32, and for an FP8 weight that stays one what the file has, with its scales. In other
    quantisations, the bytes in the files.

    Raises: ValueError for a damaged index or single file, FileNotFoundError where there is neither.
    """
    directory = pathlib.Path(directory)
    places, (stored, wrong) = _read(directory)
    if not any(name.startswith("model.") for name in places):  # a model that was saved without its head
        places = {f"model.{name}" for name in places}
        stored = {f"model.{name}": tensor for name, tensor in stored.items()}

    dtype = config.dtype or _most(stored.values())
    wanted, beyond, others = wanted_tensors(config, dtype), collections.Counter(), []
    by_dtype, layers = collections.Counter(), config.num_hidden_layers
    for name, tensor in stored.items():
        match = LAYER.match(name)
        if match and int(match[1]) >= layers:
            beyond[int(match[1])] += tensor.bytes
        elif suffix is None or name in wanted or suffix and name.removesuffix(suffix) in wanted:
            by_dtype[tensor.dtype] += tensor.bytes
        else:
            others.append(name)
    memory = sum(by_dtype.values())
    if suffix is not None:
        wrong += [f"missing: {part}" for part in _listed(wanted.keys() - places)]
        wrong += _faults(stored, wanted, suffix)
        memory = _memory(stored, wanted, suffix, dtype, keeps_fp8)
    return Weights(len(places), dict(by_dtype), dtype, memory, dict(beyond), _listed(others), wrong)


def _read(directory):
    """(the names that the index or the single file has, ({name: tensor} of what could be read, faults))."""
    shards, stored, wrong = collections.defaultdict(list), {}, []
    places = locate(directory)
    for name, file in places.items():
        shards[file].append(name)
    for file, names in sorted(shards.items()):
        try:
            header = read_header(file)
        except FileNotFoundError:
            wrong.append(f"missing: file {file.name}, which has {len(names)} tensors")
            continue
        except (OSError, ValueError) as error:
            wrong.append(str(error))
            continue
        absent = [name for name in names if name not in header]
        wrong += [f"missing: {part}, which the index places in {file.name}" for part in _listed(absent)]
        stored |= {name: header[name] for name in names if name in header}
    return set(places), (stored, wrong)


def scale_suffix(fields: Mapping) -> str | None:
    """What the name of an FP8 weight's scale ends in; "" where nothing is quantised; None for other quantisations."""
    quantization = fields.get("quantization_config")
    if quantization is None:
        return ""
    if not isinstance(quantization, Mapping):
        raise TypeError(f"quantization_config must be an object, got {quantization!r}")
    if quantization.get("quant_method") == "fp8":
        return SCALE_INV
    floats = quantization.get("format") in ("float-quantized", "naive-quantized")
    return SCALE if quantization.get("quant_method") == "compressed-tensors" and floats else None


def _faults(stored, wanted, suffix):
    """A sentence for each shape that is not what config.json says, and for FP8 without scales."""
    shapes, bare = collections.defaultdict(list), []
    for name in wanted.keys() & stored.keys():
        tensor, shape = stored[name], wanted[name].shape
        if tensor.shape != shape:
            shapes[f"must have shape {shape} (from config.json), got {tensor.shape}"].append(name)
        if tensor.dtype == FP8 and not (suffix and name + suffix in stored):
            bare.append(name)
    for reason, names in shapes.items():
        yield from (f"{part} {reason}" for part in _listed(names))
    where = f"a {suffix} beside it" if suffix else "a quantization_config in config.json"
    yield from (f"{part} is FP8 and must come with {where}" for part in _listed(bare))


def _memory(stored, wanted, suffix, dtype, keeps_fp8):
    total = 0
    for name, (shape, keeps_fp32) in wanted.items():
        tensor = stored.get(name)
        if tensor is not None and tensor.dtype == FP8 and keeps_fp8:
            scale = stored.get(name + suffix)
            total += tensor.bytes + (0 if scale is None else scale.bytes)
        else:
            total += torch.Size(shape).numel() * (4 if keeps_fp32 else dtype.itemsize)
    return total


def _most(tensors):
    """The float dtype that most bytes have; bf16 where there are other dtypes only."""
    sizes = collections.Counter()
    for tensor in tensors:
        if tensor.dtype in DTYPES:
            sizes[tensor.dtype] += tensor.bytes
    return getattr(torch, DTYPES[sizes.most_common(1)[0][0]]) if sizes else torch.bfloat16


def _one_line(error):
    return " ".join(str(error).split())


def _listed(names: Iterable[str]) -> list[str]:
    """Tensors by what they are, with the numbers of their layers: a text for each kind."""
    kinds = collections.defaultdict(set)
    for name in names:
        match = LAYER.match(name)
        rest = re.sub(r"experts\.\d+\.", "experts.*.", match[2]) if match else name
        kinds[rest].add(int(match[1]) if match else None)
    return [rest if None in layers else f"{rest} of layer {runs(layers)}" for rest, layers in sorted(kinds.items())]


def runs(numbers: Iterable[int]) -> str:
    """Whole numbers as text: 0-2, 5."""
    parts = []
    for n in sorted(numbers):
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in parts)
