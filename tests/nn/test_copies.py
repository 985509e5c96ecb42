"""Layers and models are copied, pickled, averaged and sent to other processes, with their ops."""

import copy
import dataclasses
import io
import pickle
import sys
import types

import pytest
import torch
import torch.multiprocessing
from inputs import normal

import dsa_ref
from dsa_ref import TINY, DSALayer, LayerCache, lightning_select, rope, rotate_quantize, sparse_attention
from dsa_ref.nn import ModelConfig, SmallModel

T = 12
RUNGS = pytest.mark.rungs("reference", "kernels")


class Steps:
    """Ops as a class in an importable module."""

    rope = staticmethod(rope)
    rotate_quantize = staticmethod(rotate_quantize)
    lightning_select = staticmethod(lightning_select)
    sparse_attention = staticmethod(sparse_attention)


NAMESPACE = types.SimpleNamespace(**{name: vars(Steps)[name].__func__ for name in vars(Steps) if name[0] != "_"})


def make_layer(ops=dsa_ref, device="cpu"):
    layer = DSALayer(TINY, ops)
    for i, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(normal(*parameter.shape, seed=i) * 0.3)
    return layer.to(device)


@torch.no_grad()
def run(layer):
    device = layer.freqs.device
    return layer(normal(T, TINY.dim).to(device), torch.arange(T, device=device))


def by_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def by_torch_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = pytest.mark.parametrize("make_copy", (copy.deepcopy, copy.copy, by_pickle, by_torch_save))


@RUNGS
@COPIES
def test_a_copy_is_the_same_layer(ops, device, make_copy):
    layer = make_layer(ops, device)
    twin = make_copy(layer)
    assert twin.ops is layer.ops and twin.config == layer.config and type(twin) is DSALayer
    assert torch.equal(twin.freqs, layer.freqs) and torch.equal(run(twin), run(layer))
    assert {name: p.requires_grad for name, p in twin.named_parameters()} == {
        n: True for n, _ in layer.named_parameters()
    }
    if make_copy is not copy.copy:
        before = run(layer)
        with torch.no_grad():
            twin.o_proj.weight.zero_()
        assert torch.equal(run(layer), before) and not run(twin).any()


@COPIES
@pytest.mark.parametrize("steps", (Steps, NAMESPACE))
def test_ops_that_are_no_module(steps, make_copy):
    layer = make_layer(steps)
    twin = make_copy(layer)
    assert twin.ops.rope is rope and torch.equal(run(twin), run(layer))


def test_ops_of_local_functions_are_copied_and_refused_by_name_in_a_pickle():
    local = types.SimpleNamespace(**vars(NAMESPACE))
    local.rope = lambda *args: rope(*args)
    layer = make_layer(local)
    assert torch.equal(run(copy.deepcopy(layer)), run(layer))
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(layer)


def test_a_module_that_cannot_be_imported_is_refused_by_name():
    ops = types.ModuleType("made_here")
    vars(ops).update(vars(NAMESPACE))
    layer = make_layer(ops)
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="ops must be importable by its name .* got 'made_here'"):
            attempt(layer)
    sys.modules["made_here"] = ops
    try:
        assert copy.deepcopy(layer).ops is ops
    finally:
        del sys.modules["made_here"]


def test_ops_without_the_steps_are_refused():
    for ops in ("dsa_ref", None, types.SimpleNamespace(rope=rope)):
        with pytest.raises(TypeError, match="ops must .*sparse_attention"):
            DSALayer(TINY, ops)


def test_an_averaged_model():
    """torch's exponential moving average of a model: a deepcopy whose weights follow."""
    torch.manual_seed(0)
    model = SmallModel(ModelConfig(2, 64, attention=dataclasses.replace(TINY, index_fp8=False)))
    average, tokens = torch.optim.swa_utils.AveragedModel(model), torch.arange(T)
    average.update_parameters(model)
    with torch.no_grad():
        assert torch.equal(average(tokens), model(tokens))
        old = {name: p.clone() for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.mul_(3)
        average.update_parameters(model)
    for name, parameter in average.module.named_parameters():
        assert torch.allclose(parameter, 2 * old[name])  # the mean of 1 and 3 times the weights


@torch.no_grad()
def test_a_cache_and_a_record_are_copied():
    layer, x, positions, record = make_layer(), normal(T, TINY.dim), torch.arange(T), []
    cache = LayerCache(TINY, T)
    assert cache.k_idx.dtype == torch.float8_e4m3fn
    layer(x[:8], positions[:8], cache, record=record)
    wanted = None
    for make_copy in (copy.deepcopy, by_pickle, by_torch_save):
        twin = make_copy(cache)
        y = layer(x[8:], positions[8:], twin)
        assert (cache.length, twin.length) == (8, T)
        assert wanted is None or torch.equal(y, wanted)
        wanted = y
    assert torch.equal(copy.deepcopy(record)[0]["indices"], record[0]["indices"])


def in_child(layer, x, queue):
    """Run in a spawned process, to which the layer is sent as a pickle."""
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put(layer(x, torch.arange(len(x))).numpy())


def test_a_layer_in_a_spawned_process():
    layer = make_layer()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=in_child, args=(layer, normal(T, TINY.dim), queue))
    process.start()
    got = queue.get(timeout=120)
    process.join()
    assert process.exitcode == 0
    assert torch.allclose(torch.from_numpy(got), run(layer), atol=1e-6)


@pytest.mark.parametrize("indexer", (True, False))
def test_an_empty_cache_is_copied_with_and_without_an_indexer(indexer):
    """A layer that shares another one's selection has a cache without index keys."""
    cache = LayerCache(TINY, 8, indexer=indexer)
    for copied in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert copied.capacity == 8 and copied.length == 0 and torch.equal(copied.kv, cache.kv)
        assert (copied.k_idx is None) is not indexer
