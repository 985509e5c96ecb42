"""Decoding from pages: a batch of sequences, each as if it were alone and had been read at once, and nothing between.

The reference runs in fp64, so that another order of summation cannot flip a selection; kernels run in fp32.
"""

import copy
import dataclasses

import pytest
import torch
from inputs import assert_close, assert_same_bits, normal, paged_contents, selected
from torch import nn

import dsa_ref
from dsa_ref import TINY, DSALayer, PagedCache, PageTable
from dsa_ref.nn import LayerCache

pytestmark = pytest.mark.rungs("reference", "kernels")
FP8 = pytest.mark.parametrize("fp8", (True, False))
PAGE = 5


def make_layer(ops=dsa_ref, device="cpu", dtype=None, indexer=True, **changes):
    layer = DSALayer(dataclasses.replace(TINY, **changes), ops, indexer).requires_grad_(False)
    for i, parameter in enumerate(layer.parameters()):
        parameter.copy_(normal(*parameter.shape, seed=i) * 0.3)
    return layer.to(device=device, dtype=dtype or (torch.float64 if ops is dsa_ref else torch.float32))


def make_cache(layer, pages=40, sequences=4, max_length=64, fp8=False):
    """A table and a cache whose pools hold no zeros, but NaN: what nobody wrote may not matter."""
    weight = layer.o_proj.weight
    table = PageTable(pages, sequences, max_length, PAGE, weight.device)
    cache = PagedCache(table, layer.config, weight.dtype, fp8, layer.indexer is not None)
    for pool in (cache.kv_pages, cache.index_pages):
        if pool is not None:
            pool.view(torch.uint8).fill_(0xFF)
    return table, cache


def tokens(layer, count, seed=0):
    weight = layer.o_proj.weight
    return normal(count, TINY.dim, seed=seed).to(weight), torch.arange(count, device=weight.device)


def prefill(layer, cache, x, sequence=None):
    """A sequence that holds x; its number."""
    sequence = cache.table.new() if sequence is None else sequence
    return sequence, layer(x, torch.arange(len(x), device=x.device), cache.sequence(sequence))


def decode(layer, cache, sequences, x, record=None, **options):
    """A step of x [B, N, dim] that is kept."""
    batch = cache.table.batch(sequences, x.shape[1])
    y = layer.decode(x, cache, batch, record, **options)
    cache.table.advance(sequences, x.shape[1])
    return y


def tolerance(layer, fp8=False):
    return 1e-6 if layer.ops is dsa_ref else 2e-2 if fp8 else 1e-4


@FP8
@pytest.mark.parametrize("N", (1, 2, 3, 4))
def test_decode_equals_prefill(ops, device, N, fp8):
    """Step by step, over borders of pages, with k below the length: selections and outputs of one pass over a copy."""
    layer, count, first = make_layer(ops, device), 12 + 2 * N, 12
    x, positions = tokens(layer, count)
    cache, other = make_cache(layer, fp8=fp8)[1], make_cache(layer, fp8=fp8)[1]
    once, steps = [], []
    s, _ = prefill(layer, other, x[:first])
    wanted = layer(x[first:], positions[first:], other.sequence(s), record=once)
    s, _ = prefill(layer, cache, x[:first])
    got = torch.cat([decode(layer, cache, [s], x[None, i : i + N], steps)[0] for i in range(first, count, N)])
    assert selected(torch.cat([step["indices"][0] for step in steps])) == selected(once[0]["indices"])
    assert_close(got, wanted, tolerance(layer, fp8))
    for one, two in zip(cache.rows(s), other.rows(s), strict=True):
        assert_close(one.double(), two.double(), tolerance(layer, fp8))
    if not fp8:
        assert_close(got, layer(x, positions)[first:], tolerance(layer))


@FP8
@pytest.mark.parametrize("N", (1, 2, 3, 4))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.rungs("reference")
def test_the_same_tokens_at_once_give_the_same_bits(ops, device, dtype, N, fp8):
    """Where both forms do the same products, pages and fused steps change no bit of what is stored and selected."""
    layer = make_layer(ops, device, dtype)
    x, positions = tokens(layer, 12 + 2 * N)
    cache, other = make_cache(layer, fp8=fp8)[1], make_cache(layer, fp8=fp8)[1]
    s, _ = prefill(layer, cache, x[:12])
    prefill(layer, other, x[:12])
    for i in range(12, len(x), N):
        step, plain = [], []
        y = decode(layer, cache, [s], x[None, i : i + N], step)[0]
        wanted = layer(x[i : i + N], positions[i : i + N], other.sequence(s), record=plain)
        for name in ("q_idx", "w"):
            assert_same_bits(step[0][name][0], plain[0][name])
        assert selected(step[0]["indices"][0]) == selected(plain[0]["indices"])
        for one, two in zip(cache.rows(s), other.rows(s), strict=True):
            assert_same_bits(one, two)
        assert_close(y, wanted, {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype])


@pytest.mark.parametrize("splits", (None, 1, 3))
def test_the_cache_says_how_attention_is_cut(ops, device, splits, monkeypatch):
    layer, seen = make_layer(ops, device), []
    cache = PagedCache(PageTable(9, 1, 40, PAGE, device), layer.config, layer.o_proj.weight.dtype, splits=splits)
    sequence, _ = prefill(layer, cache, tokens(layer, 11)[0])
    step = layer.ops.paged_sparse_attention
    monkeypatch.setattr(layer.ops, "paged_sparse_attention", lambda *args: seen.append(args[5]) or step(*args))
    x = tokens(layer, 12)[0]
    wanted = layer(x, torch.arange(12, device=device))[11:]
    assert_close(decode(layer, cache, [sequence], x[None, 11:])[0], wanted, tolerance(layer))
    assert seen == [splits]


@FP8
@pytest.mark.parametrize("N", (1, 3))
def test_a_batch_is_its_sequences_alone(ops, device, N, fp8):
    """Lengths from 0 on, borders of pages, pages in any order, sequences in any order."""
    layer, lengths = make_layer(ops, device), (0, 3, PAGE, 14)
    cache, steps = make_cache(layer, fp8=fp8)[1], []
    texts = [tokens(layer, length + N, seed=i)[0] for i, length in enumerate(lengths)]
    rows = [cache.table.new() for _ in lengths]
    for i in (2, 0, 3, 1):
        if lengths[i]:
            prefill(layer, cache, texts[i][: lengths[i]], rows[i])
    order = [3, 0, 2, 1]
    x = torch.stack([texts[i][lengths[i] :] for i in order])
    got = decode(layer, cache, [rows[i] for i in order], x, steps)
    assert {name: len(value) for name, value in steps[0].items()} == dict.fromkeys(
        ("q_idx", "w", "q", "indices", "slots", "lse"), len(order)
    )
    for b, i in enumerate(order):
        alone = make_cache(layer, fp8=fp8)[1]
        s = alone.table.new()
        if lengths[i]:
            prefill(layer, alone, texts[i][: lengths[i]], s)
        assert_close(got[b], decode(layer, alone, [s], x[b : b + 1])[0], tolerance(layer, fp8))
        assert cache.table.length(rows[i]) == lengths[i] + N
        positions, slots = steps[0]["indices"][b].cpu(), steps[0]["slots"][b].cpu()
        assert (positions.amax(dim=1) < lengths[i] + 1 + torch.arange(N)).all()
        there = cache.table.slots(rows[i], 0, lengths[i] + N).cpu().int()
        assert_same_bits(slots, torch.where(positions < 0, -1, there[positions.clamp(min=0).long()]))


def test_a_shared_prefix_is_stored_once(ops, device):
    layer = make_layer(ops, device)
    x, other = tokens(layer, 16)[0], tokens(layer, 4, seed=7)[0]
    table, cache = make_cache(layer)
    first, _ = prefill(layer, cache, x[:12])
    free = table.free_pages
    second = table.fork(first)
    assert table.free_pages == free
    got = decode(layer, cache, [first, second], torch.stack((x[12:], other)))
    assert table.free_pages == free - 3  # a page more for each, and one is copied
    for b, ending in enumerate((x[12:], other)):
        _, alone = make_cache(layer)
        s, _ = prefill(layer, alone, x[:12])
        assert_close(got[b], decode(layer, alone, [s], ending[None])[0], tolerance(layer))


def test_rejected_guesses_leave_no_trace(ops, device):
    layer = make_layer(ops, device)
    x, guesses = tokens(layer, 16)[0], tokens(layer, 4, seed=9)[0]
    runs = []
    for guessed in (False, True):
        table, cache = make_cache(layer)
        s, _ = prefill(layer, cache, x[:13])
        if guessed:
            decode(layer, cache, [s], torch.cat((x[13:14], guesses[:3]))[None])
            table.truncate(s, 13)
        runs.append((decode(layer, cache, [s], x[None, 13:]), cache.rows(s), table.free_pages))
    assert_same_bits(runs[0][0], runs[1][0])
    for one, two in zip(runs[0][1], runs[1][1], strict=True):
        assert_same_bits(one, two)
    assert runs[0][2] == runs[1][2]


def test_a_failed_step_changes_nothing(ops, device, monkeypatch):
    layer = make_layer(ops, device)
    x, _ = tokens(layer, 16)
    table, cache = make_cache(layer)
    s, _ = prefill(layer, cache, x[:14])
    batch, before, record = table.batch([s], 2), paged_contents(cache), []
    with pytest.raises(ValueError, match="finite"):
        layer.decode(x[None, 14:] * torch.nan, cache, batch, record)
    assert paged_contents(cache) == before and record == []

    def interrupted(x):
        raise KeyboardInterrupt

    monkeypatch.setattr(layer.o_proj, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        layer.decode(x[None, 14:], cache, batch, record)
    monkeypatch.undo()
    assert paged_contents(cache) == before and record == []
    got = layer.decode(x[None, 14:], cache, batch)
    other = make_cache(layer)[1]
    s, _ = prefill(layer, other, x[:14])
    assert_same_bits(got, decode(layer, other, [s], x[None, 14:]))


@FP8
@pytest.mark.parametrize("name", ("index_rope", "yarn"))
def test_other_configs(ops, device, name, fp8):
    changes = {"index_rope": {"index_rope": "interleaved"}, "yarn": {"max_seq_len": 163840}}[name]
    layer = make_layer(ops, device, **changes)
    x, positions = tokens(layer, 16)
    cache, other = make_cache(layer, fp8=fp8)[1], make_cache(layer, fp8=fp8)[1]
    s, _ = prefill(layer, cache, x[:13])
    prefill(layer, other, x[:13])
    wanted = layer(x[13:], positions[13:], other.sequence(s))
    assert_close(decode(layer, cache, [s], x[None, 13:])[0], wanted, tolerance(layer, fp8))


def test_a_layer_that_shares_a_selection(ops, device):
    layer, sharing = make_layer(ops, device), make_layer(ops, device, indexer=False)
    table, cache = make_cache(layer)
    shared = PagedCache(table, layer.config, cache.dtype, indexer=False)
    x, positions = tokens(layer, 16)
    s, record, whole = table.new(), [], []
    layer(x[:13], positions[:13], cache.sequence(s), record=whole)
    sharing(x[:13], positions[:13], shared.sequence(s), indices=whole[0]["indices"])
    assert table.length(s) == 13
    batch = table.batch([s], 3)
    layer.decode(x[None, 13:], cache, batch, record)
    got = sharing.decode(x[None, 13:], shared, batch, record, indices=record[0]["indices"])
    table.advance([s], 3)
    assert set(record[1]) == {"q", "indices", "slots", "lse"}
    assert_same_bits(record[1]["slots"], record[0]["slots"])
    layer(x, positions, record=whole)
    assert_close(got[0], sharing(x, positions, indices=whole[1]["indices"])[13:], tolerance(layer))
    batch = table.batch([s], 1)
    for options, message in (
        ({}, "indices must be given"),
        ({"indices": record[0]["indices"][:, :1] * 0 + 17}, "indices must hold positions that each query may see"),
        ({"indices": record[0]["indices"]}, "indices must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            sharing.decode(x[None, :1], shared, batch, **options)
    with pytest.raises(ValueError, match="indices must be None"):
        layer.decode(x[None, :1], cache, batch, indices=record[0]["indices"][:, :1])
    with pytest.raises(TypeError, match="indices must have dtype int32"):
        sharing.decode(x[None, :1], shared, batch, indices=record[0]["indices"][:, :1].long())


class Louder(nn.Module):
    """What somebody put around a module: another result, though `weight` shows the old one."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("inner", "_modules") else getattr(self.inner, name)

    def forward(self, *args):
        out = self.inner(*args)
        return tuple(1.5 * part for part in out) if isinstance(out, tuple) else 1.5 * out


MODULES = ("q_a_layernorm", "kv_a_layernorm", "q_b_proj", "kv_b_proj", "kv_a_proj_with_mqa", "indexer",
           "indexer.k_norm", "indexer.weights_proj", "indexer.wq_b", "o_proj")  # fmt: skip


@pytest.mark.parametrize("how", ("wrapped", "hooked"))
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.rungs("reference")
def test_wrapped_modules_take_effect(ops, device, name, how):
    layer = make_layer(ops, device)
    plain, (x, positions) = copy.deepcopy(layer), tokens(layer, 16)
    owner, _, child = name.rpartition(".")
    owner = layer.get_submodule(owner)
    if how == "wrapped":
        setattr(owner, child, Louder(getattr(owner, child)))
    else:
        hook = lambda module, args, out: tuple(2 * part for part in out) if isinstance(out, tuple) else 2 * out  # noqa: E731
        getattr(owner, child).register_forward_hook(hook)
    cache, record, steps = make_cache(plain)[1], [], []
    wanted = layer(x, positions, record=record)
    s = cache.table.new()
    layer(x[:13], positions[:13], cache.sequence(s))
    assert_close(decode(layer, cache, [s], x[None, 13:], steps)[0], wanted[13:], 1e-6)
    assert_close(steps[0]["w"][0], record[0]["w"][13:], 1e-6)
    _, other = make_cache(plain)
    s, _ = prefill(plain, other, x[:13])
    changed = [steps[0]["w"], *cache.rows(s), decode(layer, cache, [s], x[None, :1])]
    plain_steps = []
    decode(plain, other, [s], x[None, 13:], plain_steps)
    untouched = [plain_steps[0]["w"], *other.rows(s), decode(plain, other, [s], x[None, :1])]
    assert not all(torch.equal(a.double(), b.double()) for a, b in zip(changed, untouched, strict=True))


@pytest.mark.rungs("reference")
def test_autocast_decodes_as_it_reads(ops, device):
    layer = make_layer(ops, device, torch.float32)
    x, positions = tokens(layer, 16)
    cache, other = make_cache(layer)[1], make_cache(layer)[1]
    with torch.autocast(device, torch.bfloat16):
        s, _ = prefill(layer, cache, x[:13])
        prefill(layer, other, x[:13])
        wanted = layer(x[13:], positions[13:], other.sequence(s))
        got = decode(layer, cache, [s], x[None, 13:])[0]
    assert got.dtype == wanted.dtype == torch.bfloat16
    assert_close(got, wanted, 2e-2)
    assert_close(cache.rows(s)[0], other.rows(s)[0], 2e-2)


def test_bad_input_is_refused_by_name(ops, device):
    layer = make_layer(ops, device)
    x, positions = tokens(layer, 16)
    table, cache = make_cache(layer)
    s, _ = prefill(layer, cache, x[:13])
    batch, before = table.batch([s], 2), paged_contents(cache)
    good = {"x": x[None, 13:15], "cache": cache, "batch": batch}
    elsewhere = make_cache(layer)
    wide = PagedCache(PageTable(40, 4, 64, PAGE, device), dataclasses.replace(TINY, kv_lora_rank=40), cache.dtype)
    of_wide = {"cache": wide, "batch": wide.table.batch([wide.table.new()], 2)}
    double = torch.float32 if ops is dsa_ref else torch.bfloat16
    for error, change, message in (
        (ValueError, {"x": x[None, 13:16]}, "x must have shape .* as in batch"),
        (ValueError, {"x": x[13:15]}, "x must have shape \\[B, N, dim\\]"),
        (ValueError, {"x": x[None, 13:15, 1:]}, "with dim = 64"),
        (TypeError, {"x": x[None, 13:15].to(double)}, "x must have dtype"),
        (TypeError, {"cache": cache.sequence(s)}, "cache must be a PagedCache, got SequenceCache"),
        (TypeError, {"cache": LayerCache(TINY, 4)}, "cache must be a PagedCache, got LayerCache"),
        (TypeError, {"batch": [s]}, "batch must be a Batch, got list"),
        (TypeError, {"record": ()}, "record must be a list, got tuple"),
        (ValueError, {"batch": elsewhere[0].batch([elsewhere[0].new()], 2)}, "another table's"),
        (ValueError, of_wide, "cache must be made for kv_lora_rank"),
    ):
        with pytest.raises(error, match=message):
            layer.decode(**good | change)
        assert paged_contents(cache) == before
    with pytest.raises(ValueError, match="x must have N at most 4"):
        layer.decode(x[None, :5], cache, table.batch([s], 5))
    with pytest.raises(ValueError, match="cache must be made with indexer=False"):
        make_layer(ops, device, indexer=False).decode(**good, indices=positions[None, None, :2].int())
    with pytest.raises(ValueError, match="must have index_fp8 = True"):
        make_layer(ops, device, index_fp8=False).decode(**good)
    with pytest.raises(ValueError, match="x must not bring gradients"):
        layer.decode(good["x"].requires_grad_(), cache, batch)
    four = {"rope", "rotate_quantize", "lightning_select", "sparse_attention"}
    few = type("Few", (), {name: staticmethod(getattr(ops, name)) for name in four})
    with pytest.raises(TypeError, match="ops must have paged_select, paged_sparse_attention to decode"):
        make_layer(few, device, cache.dtype).decode(x[None, 13:15].detach(), cache, batch)
    table.truncate(s, 12)
    with pytest.raises(ValueError, match="batch must continue sequences of \\[12\\] tokens, got one made at \\[13\\]"):
        layer.decode(x[None, 13:15].detach(), cache, batch)
    batch = table.batch([s], 4)
    table.truncate(s, 12)  # its reserved pages are free again
    with pytest.raises(ValueError, match="tokens must be reserved before"):
        layer.decode(x[None, :4].detach(), cache, batch)


@pytest.mark.rungs("reference")
def test_a_batch_fits_or_nothing_is_reserved(ops, device):
    table = PageTable(6, 4, 20, PAGE, device)
    a, b = table.new(), table.new()
    table.reserve(a, 8)
    table.advance([a], 8)
    c = table.fork(a)
    for change, message in (
        (([a, b, c], 12), "tokens must fit the pages that are free, 4 of 6, got 12 in each of 3 sequences"),
        (([a, b], 13), "tokens must fit max_length = 20, got 8 held and 13 more"),
        (([a, a], 1), "sequences must be distinct"),
        (([a, 3], 1), "sequence must be one that new or fork gave"),
        (([], 1), "sequences must name at least one"),
        (([a], 0), "tokens must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            table.batch(*change)
        assert table.free_pages == 4
    with pytest.raises(TypeError, match="sequences must be a list of ints"):
        table.batch(torch.tensor([a]), 1)
    batch = table.batch([c, a, b], 3)  # c copies the page that it shares, and a has it alone then
    assert table.free_pages == 0 and batch.held == (8, 8, 0) and batch.sequences == (c, a, b)
    places = ops.place_tokens(table.table, table.lengths, torch.tensor([c, a, b], device=device), 3, PAGE)
    for one, two in zip(places, (batch.page_table, batch.lengths, batch.positions, batch.slots), strict=True):
        assert_same_bits(one, two)
