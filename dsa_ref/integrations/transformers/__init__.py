"""DeepSeek-V3.2 and GLM-5 of transformers, made really sparse: `make_sparse(model)`, and `undo_sparse(model)`.

transformers scores every pair of tokens in fp32 for every index head, and masks what was not selected: memory and time
grow with the square of the length. A sparse model computes the same with the steps of `dsa_ref` or `dsa_kernels`. Its
weights, its cache and what it saves are transformers' own; in its config the attention implementation changes.

    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", device_map="auto")
    make_sparse(model, ops=dsa_kernels)
    model.generate(**inputs)
"""

import sys
import types

from .supported import OLDEST as OLDEST  # first: it looks at the installed version

# isort: split
import transformers
from torch import nn

import dsa_ref

from .attention import SPARSE, SparseAttention, check_parts, register
from .visible import NAME

STEPS = ("hadamard", "quantize", "lightning_select", "sparse_attention")  # of `ops`


def make_sparse(
    model: transformers.PreTrainedModel, ops: types.ModuleType = dsa_ref, index_fp8: bool = False
) -> transformers.PreTrainedModel:
    """Let every attention layer of the model, in place, select and attend by the steps of `ops`; returns the model.

    model: a DeepseekV32ForCausalLM or GlmMoeDsaForCausalLM, or anything that holds their attention layers, as PEFT's
    models do. ops: `dsa_ref`, or `dsa_kernels`, which wants a GPU.
    index_fp8: False scores with the model's indexer as transformers has it, in the model's dtype, so that the selection
    is the same up to rounding, and to ties, of which the earliest key is taken; True rotates and quantises its queries
    and keys as DeepSeek's own code for V3.2 does, which Hopper's kernels score twice as fast or more.

    A query keeps as many keys as its layer's `indexer.index_topk` says, which transformers reads from the config once.

    The model then has the attention implementation "dsa": `model.set_attn_implementation("sdpa")` is transformers' own
    attention again, and "dsa" this one. A cache that was filled with index_fp8=True holds rotated keys, and may only be
    continued so. Calling it again changes `ops` and `index_fp8`.

    Raises: TypeError for a model without such layers, ops without the steps, an index_fp8 that is no bool; ValueError
    for ops that cannot be imported by name, an indexer head for FP8 that is no power of two, or layers whose forward,
    expand_kv or indexer somebody has replaced, or watches with a hook.
    """
    if not isinstance(index_fp8, bool):
        raise TypeError(f"index_fp8 must be a bool, got {index_fp8!r}")
    if lacking := [step for step in STEPS if not hasattr(ops, step)]:
        raise TypeError(f"ops must be dsa_ref or dsa_kernels, got {ops!r} without {', '.join(lacking)}")
    name = getattr(ops, "__name__", "")
    if sys.modules.get(name) is not ops:
        raise ValueError(f"ops must be a package that can be imported by its name, got {ops!r}")
    layers = _layers(model)
    for layer in layers:
        width = layer.config.index_head_dim
        if index_fp8 and width & (width - 1):
            raise ValueError(f"index_fp8 needs an index_head_dim that is a power of two, got {width}")
        if "forward" in vars(layer) and "_old_forward" not in vars(layer):
            raise ValueError(
                f"model must have its own attention, got a layer {layer.layer_idx} whose forward was replaced by "
                f"{vars(layer)['forward']!r}"
            )
        check_parts(layer)
    register()
    for layer in layers:
        _become(layer, SPARSE.get(type(layer), type(layer)))
        layer.dsa_ops, layer.dsa_index_fp8 = name, index_fp8
        if layer.config._attn_implementation != NAME:
            layer.dsa_before = layer.config._attn_implementation
        elif not hasattr(layer, "dsa_before"):  # a config that some other sparse model has, or had
            layer.dsa_before = "sdpa"  # transformers' own choice
    for config in {id(layer.config): layer.config for layer in layers}.values():
        config._attn_implementation = NAME
    return model


def undo_sparse(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """What `make_sparse` found, in place: the layers' classes and the attention implementation; returns the model.

    Raises TypeError for a model that is not sparse.
    """
    layers = [layer for layer in _layers(model) if isinstance(layer, SparseAttention)]
    if not layers:
        raise TypeError(f"model must have been through make_sparse, got a {type(model).__name__} that has not")
    dense = {sparse: own for own, sparse in SPARSE.items()}
    for layer in layers:
        if layer.config._attn_implementation == NAME:
            layer.config._attn_implementation = layer.dsa_before
        _become(layer, dense[type(layer)])
        del layer.dsa_ops, layer.dsa_index_fp8, layer.dsa_before
    return model


def _layers(model) -> list[nn.Module]:
    """The model's attention layers, sparse or not."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    layers = [module for module in model.modules() if type(module) in (*SPARSE, *SPARSE.values())]
    if not layers:
        raise TypeError(
            f"model must be a DeepseekV32ForCausalLM or GlmMoeDsaForCausalLM, got a {type(model).__name__} without "
            "their attention layers"
        )
    return layers


def _become(layer: nn.Module, kind: type) -> None:
    """Give the layer another class; where accelerate wraps its forward, the wrapped one is that class's."""
    layer.__class__ = kind
    if "_old_forward" in vars(layer):
        layer._old_forward = types.MethodType(kind.forward, layer)
