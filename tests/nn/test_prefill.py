"""A chunk without gradients takes few launches, writes where things stay, and gives what the written-out step does."""

import contextlib
import copy
import dataclasses
import types

import pytest
import torch
from inputs import assert_close, assert_same_bits, normal, selected
from launches import noted

import dsa_ref
from dsa_ref import TINY, DSALayer, LayerCache, unchecked_values
from dsa_ref.nn.layer import STEPS

T = 24
FP8 = pytest.mark.parametrize("fp8", (True, False))


def make_layer(ops=dsa_ref, dtype=torch.float32, device="cpu", indexer=True, **changes):
    layer = DSALayer(dataclasses.replace(TINY, **changes), ops, indexer).requires_grad_(False)
    for i, parameter in enumerate(layer.parameters()):
        parameter.copy_(normal(*parameter.shape, seed=i) * 0.3)
    return layer.to(device, dtype)


def tokens(layer, count=T):
    weight = layer.o_proj.weight
    return normal(count, TINY.dim).to(weight), torch.arange(count, device=weight.device)


def run(layer, chunk=T, cached=True, unchecked=False, **options):
    """(outputs, recorded steps, the cache): the tokens, `chunk` at a time."""
    (x, positions), record = tokens(layer), []
    cache = LayerCache(layer.config, T, x.dtype, x.device, layer.indexer is not None) if cached else None
    with unchecked_values() if unchecked else contextlib.nullcontext():
        parts = [
            layer(x[i : i + chunk], positions[i : i + chunk], cache, record=record, **options)
            for i in range(0, T, chunk)
        ]
    return torch.cat(parts), record, cache


def four_steps(ops):
    """`ops` without the small steps: then the layer runs the step as it is written out, with gradients or without."""
    return types.SimpleNamespace(**{name: getattr(ops, name) for name in STEPS})


def compare(got, wanted, same):
    """Outputs, records and caches: their bits, or as far as sums of another order let them agree."""
    assert [list(step) for step in got[1]] == [list(step) for step in wanted[1]]
    pairs = [(got[0], wanted[0])]
    for one, other in zip(got[1], wanted[1], strict=True):
        assert one["start"].dtype == other["start"].dtype and torch.equal(one["start"], other["start"])
        assert selected(one["indices"]) == selected(other["indices"])
        pairs += [(one[name], other[name]) for name in one if name not in ("start", "indices", "k_scale")]
        assert (one.get("k_scale") is None) == (other.get("k_scale") is None)
    if got[2] is not None:
        assert got[2].length == wanted[2].length == T
        pairs += [(one, other) for one, other in zip(got[2].rows(), wanted[2].rows(), strict=True) if one is not None]
    for one, other in pairs:
        assert one.dtype == other.dtype
        if same:
            assert_same_bits(one, other)
        elif one.dtype == torch.float8_e4m3fn:
            assert torch.equal(one.float(), other.float())
        else:
            assert_close(one.float(), other.float(), 1e-5 if one.dtype == torch.float32 else 2e-2)


@FP8
@pytest.mark.parametrize("unchecked", (False, True))
@pytest.mark.parametrize("cached, chunk", [(False, T), (True, T), (True, 7)])
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_the_reference_gives_the_same_bits_either_way(dtype, cached, chunk, unchecked, fp8):
    layer = make_layer(dtype=dtype, index_fp8=fp8)
    got = run(layer, chunk, cached, unchecked)
    layer.ops = four_steps(dsa_ref)
    compare(got, run(layer, chunk, cached), same=True)


@pytest.mark.rungs("kernels")
@FP8
@pytest.mark.parametrize("unchecked", (False, True))
@pytest.mark.parametrize("cached, chunk", [(False, T), (True, 7)])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_kernels_agree_either_way(ops, device, dtype, cached, chunk, unchecked, fp8):
    """Their sums over a row have another order."""
    layer = make_layer(ops, dtype, device, index_fp8=fp8)
    got = run(layer, chunk, cached, unchecked)
    layer.ops = four_steps(ops)
    compare(got, run(layer, chunk, cached), same=False)


def test_a_layer_without_an_indexer_gives_the_same_bits_either_way():
    layer = make_layer(indexer=False)
    indices = torch.arange(T, dtype=torch.int32)[:, None].clone()
    got = run(layer, indices=indices)
    layer.ops = four_steps(dsa_ref)
    compare(got, run(layer, indices=indices), same=True)


def test_gradients_take_the_written_out_step():
    """What keeps a derivative of any kind is not written in place."""
    layer = make_layer(dtype=torch.float64)
    (x, positions), (wanted, _, _) = tokens(layer), run(layer, cached=False)
    layer.requires_grad_(True)
    y = layer(x, positions)
    assert_same_bits(y.detach(), wanted)
    y.sum().backward()
    assert layer.q_b_proj.weight.grad.abs().max() > 0
    layer.requires_grad_(False)
    _, change = torch.func.jvp(lambda x: layer(x, positions), (x,), (torch.ones_like(x),))
    assert change.abs().max() > 0
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(layer(dual, positions)).tangent, change)


@pytest.mark.rungs("kernels")
def test_a_chunk_takes_few_launches_and_never_waits(ops, device):
    """8 products, 9 kernels, slots, starts and flags; no concatenation. Looking at values is what costs more."""
    layer = make_layer(ops, torch.bfloat16, device)
    (x, positions), cache = tokens(layer), LayerCache(layer.config, T, torch.bfloat16, device)
    layer(x[:12], positions[:12], cache)
    with unchecked_values(), noted() as (kernels, operations):
        layer(x[12:], positions[12:], cache)
    assert operations.count("WAIT") == 0
    assert not {"cat", "copy_", "clone", "_to_copy", "index_put_"} & set(operations)
    assert operations.count("mm") + operations.count("bmm") == 8
    assert len(kernels) + len(operations) <= (21 if device == "cpu" else 30), (kernels, operations)


def test_rows_go_straight_into_the_cache_where_nobody_looks():
    """And what they hold beside the length is nobody's business: a step that fails leaves the length."""
    layer = make_layer()
    (x, positions), cache = tokens(layer), LayerCache(layer.config, T)
    with unchecked_values():
        layer(x[:10], positions[:10], cache)
    held = [part.clone().view(torch.uint8) for part in cache.rows()]
    layer.o_proj.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with unchecked_values(), pytest.raises(KeyboardInterrupt):
        layer(x[10:], positions[10:], cache)
    assert cache.length == 10
    for part, before in zip(cache.rows(), held, strict=True):
        assert torch.equal(part.view(torch.uint8), before)


@pytest.mark.parametrize("make_copy", (copy.deepcopy, copy.copy))
@pytest.mark.parametrize("capacity", (T, T + 9))
def test_a_copied_cache_goes_on(make_copy, capacity):
    """Its keys are still parts of the page that the small steps write to."""
    layer = make_layer()
    (x, positions), cache = tokens(layer), LayerCache(layer.config, capacity)
    with unchecked_values():
        wanted = layer(x, positions)[10:]
        layer(x[:10], positions[:10], cache)
        other = make_copy(cache)
        got = layer(x[10:], positions[10:], other)
    assert_close(got, wanted, 1e-5)
    assert (cache.length, other.length) == (10, T)
    scales = other.k_scale[10:T].view(torch.int32)
    assert torch.equal(scales, other.index_pages[0, -4 * (len(other.index_pages[0]) // 20) :].view(torch.int32)[10:T])
    assert other.k_idx.shape == (capacity, 16) and other.k_scale.shape == (capacity,)


def test_the_page_of_a_cache_is_one_that_paged_steps_read():
    layer = make_layer()
    _, _, cache = run(layer)
    k_idx, k_scale = dsa_ref.unpack_index(cache.index_pages, TINY.index_head_dim)
    assert_same_bits(k_idx.flatten(0, -2)[:T], cache.k_idx[:T])
    assert_same_bits(k_scale.flatten()[:T], cache.k_scale[:T])
