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
    if not isinstance(torch.empty, types.BuiltinFunctionType):  # poisoned memory is filled, which no step launches
        operations = [name for name in operations if name != "fill_"]
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


LONG = 100  # tokens; with k = 64, MHA mode pays at TINY's sizes


def run_long(layer, chunks=(LONG,), cached=True, unchecked=False, recording=True, packed_at=None):
    """As `run`, for LONG tokens in chunks of these sizes."""
    x, positions = tokens(layer, LONG)
    if packed_at:
        positions[packed_at:] -= packed_at
    cache = LayerCache(layer.config, LONG, x.dtype, x.device, layer.indexer is not None) if cached else None
    record, parts, first = [] if recording else None, [], 0
    with unchecked_values() if unchecked else contextlib.nullcontext():
        for size in chunks:
            rows = slice(first, first + size)
            parts.append(layer(x[rows], positions[rows], cache, record=record))
            first += size
    return torch.cat(parts), record, cache


@pytest.mark.parametrize("recording", (True, False))
@pytest.mark.parametrize("cached, chunks, packed_at", [
    (True, (LONG,), None), (True, (40, 60), None), (True, (64, 36), None), (True, (60, 1, 39), None),
    (False, (LONG,), None), (False, (LONG,), 30),
])  # fmt: skip
@pytest.mark.parametrize("mha_keys", (0, 20, 90))
def test_rows_that_see_few_keys_attend_in_mha_mode(mha_keys, cached, chunks, packed_at, recording):
    agree_in_mha_mode(dsa_ref, "cpu", mha_keys, cached, chunks, packed_at, recording)


@pytest.mark.rungs("kernels")
@pytest.mark.parametrize("mha_keys, chunks, recording", [(0, (LONG,), False), (90, (70, 30), True)])
def test_they_do_so_with_kernels(ops, device, mha_keys, chunks, recording):
    agree_in_mha_mode(ops, device, mha_keys, True, chunks, None, recording)


def agree_in_mha_mode(ops, device, mha_keys, cached, chunks, packed_at, recording):
    """The answer, the record and the cache are those of a layer that has no such rows."""
    dtype = torch.float64 if ops is dsa_ref else torch.float32
    layer = make_layer(ops, dtype, device, index_topk=64, mha_keys=mha_keys)
    plain = make_layer(ops, dtype, device, index_topk=64, mha_keys=1)
    got = run_long(layer, chunks, cached, True, recording, packed_at)
    wanted = run_long(plain, chunks, cached, True, True, packed_at)
    assert_close(got[0], wanted[0], 1e-10 if ops is dsa_ref else 1e-5)
    if cached:
        for one, other in zip(got[2].rows(), wanted[2].rows(), strict=True):
            assert_same_bits(one, other)
    for one, other in zip(got[1] or [], wanted[1], strict=bool(got[1])):
        assert list(one) == list(other)
        for name in ("q_idx", "k_idx", "w", "k_scale", "q", "kv", "start"):
            assert_same_bits(one[name], other[name])
        assert selected(one["indices"]) == selected(other["indices"])
        assert_close(one["lse"], other["lse"], 1e-5)


def calls(layer, chunks=(LONG,), **options):
    """Which rows each attention and selection got: (step, rows, keys, whether by lists)."""
    seen = []

    def spy(name, step):
        def call(q, *args, **named):
            lists = args[3] is not None if name == "mha_attention" else True
            seen.append((name, len(q), len(args[0]), lists))
            return step(q, *args, **named)

        return call

    ops = {name: getattr(layer.ops, name) for name in dir(layer.ops) if not name.startswith("__")}
    ops |= {name: spy(name, ops[name]) for name in ("mha_attention", "lightning_select", "sparse_attention")}
    layer.ops = types.SimpleNamespace(**ops)
    run_long(layer, chunks, recording=False, **options)
    return seen


def test_what_is_scored_and_how_rows_attend():
    """Up to k keys no row is scored; up to `mha_keys` a row's list is a mask."""
    assert calls(make_layer(index_topk=64)) == [
        ("lightning_select", 36, 100, True), ("mha_attention", 64, 64, False), ("sparse_attention", 36, 100, True),
    ]  # fmt: skip
    assert calls(make_layer(index_topk=64, mha_keys=90)) == [
        ("lightning_select", 36, 100, True), ("mha_attention", 64, 64, False), ("mha_attention", 26, 90, True),
        ("sparse_attention", 10, 100, True),
    ]  # fmt: skip
    assert calls(make_layer(index_topk=100)) == [("mha_attention", 100, 100, False)]
    assert calls(make_layer(index_topk=64, mha_keys=1))[-1] == ("sparse_attention", 100, 100, True)


def test_one_token_does_not_take_every_key_apart():
    """A step of one token would make the keys and values of all tokens before it for itself alone."""
    seen = calls(make_layer(index_topk=100), (98, 1, 1))
    assert [name for name, *_ in seen] == ["mha_attention"] + 2 * ["lightning_select", "sparse_attention"]


def test_a_layer_that_shares_a_selection_takes_it_as_it_is():
    """Its lists may leave out keys that the row may see."""
    layer, plain = (make_layer(dtype=torch.float64, indexer=False, index_topk=64, mha_keys=n) for n in (90, 1))
    (x, positions), indices = tokens(layer, LONG), torch.arange(LONG, dtype=torch.int32)[:, None] // 2
    assert_close(layer(x, positions, indices=indices), plain(x, positions, indices=indices), 1e-10)
    with pytest.raises(ValueError, match="indices must be distinct"):
        layer(x, positions, indices=indices.repeat(1, 2))


@pytest.mark.rungs("reference", "kernels")
@pytest.mark.parametrize("T, S, lists, ranges", [
    (6, 6, False, False), (4, 9, False, False), (4, 9, True, False), (5, 5, True, True), (5, 9, False, True),
    (0, 4, False, False),
])  # fmt: skip
def test_mha_attention_is_the_references(ops, device, T, S, lists, ranges):
    q, k, v = (normal(n, 3, d, seed=i, device=device) for i, (n, d) in enumerate(((T, 12), (S, 12), (S, 8))))
    indices = torch.stack([torch.arange(S)[:3].roll(t) for t in range(T)]).int().to(device) if lists else None
    start = end = None
    if ranges:
        start = torch.arange(T, dtype=torch.int32, device=device) // 2
        end = start + torch.tensor([2, 0, 1, 3, 2], dtype=torch.int32, device=device)
    got = ops.mha_attention(q, k, v, 0.3, indices, start, end)
    wanted = dsa_ref.mha_attention(q.double(), k.double(), v.double(), 0.3, indices, start, end)
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape and one.dtype == torch.float32
        assert torch.equal(one == -torch.inf, other == -torch.inf)
        assert_close(one.clamp(min=-1e9), other.clamp(min=-1e9).float(), 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("T, S, lists, ranges", [
    (256, 256, False, False), (200, 333, False, False), (200, 333, True, False), (64, 300, True, True),
])  # fmt: skip
def test_mha_attention_by_cudnn_is_the_references(device, T, S, lists, ranges):
    """In the sizes of V3.2's heads; rows that see nothing among them."""
    dsa_kernels = pytest.importorskip("dsa_kernels")
    shapes = (T, 16, 192), (S, 16, 192), (S, 16, 128)
    wide = [normal(*shape, seed=i).to(device, torch.bfloat16) for i, shape in enumerate(shapes)]
    indices = torch.stack([torch.randperm(S)[:40] for _ in range(T)]).int().to(device) if lists else None
    start = end = None
    if ranges:
        start = torch.arange(T, dtype=torch.int32, device=device)
        end = start + torch.arange(T, dtype=torch.int32, device=device) % 7 * 20
    got = dsa_kernels.mha_attention(*wide, 192**-0.5, indices, start, end)
    wanted = dsa_ref.mha_attention(*(x.float() for x in wide), 192**-0.5, indices, start, end)
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32 and got[1].shape == (T, 16)
    blind = wanted[1] == -torch.inf
    assert torch.equal(blind, got[1] == -torch.inf) and not got[0][blind].any()
    assert_close(got[0].float(), wanted[0], 2e-2)
    assert_close(got[1][~blind], wanted[1][~blind], 1e-2)
