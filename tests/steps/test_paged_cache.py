"""A layer's pools, and one sequence of them beside a LayerCache that got the same rows."""

import contextlib
import copy
import dataclasses
import pickle

import pytest
import torch
from inputs import assert_same_bits, normal

import dsa_ref
from dsa_ref import TINY, LayerCache, PagedCache, PageTable
from dsa_ref.nn.cache import all_or_nothing, truncate_caches

PAGE, LONGEST = 4, 30


def rows(T, seed=0, dtype=torch.float32):
    kv = normal(T, TINY.latent_dim, seed=seed, dtype=dtype)
    return kv, *dsa_ref.quantize(normal(T, TINY.index_head_dim, seed=seed + 1))


def make(layers=1, pages=12, **options):
    table = PageTable(pages, 3, LONGEST, PAGE)
    caches = [PagedCache(table, TINY, **options) for _ in range(layers)]
    other = table.new()  # so that pages are not where positions are
    table.reserve(other, 5)
    sequence = table.new()
    return table, caches, [cache.sequence(sequence) for cache in caches]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_sequence_gives_what_a_layer_cache_gives(dtype):
    """Chunks of all sizes, over page ends, none at all; forgotten tokens make room for others."""
    _, _, (paged,) = make(dtype=dtype)
    plain = LayerCache(TINY, LONGEST, dtype=dtype)
    for step, count in enumerate((3, 1, 1, 0, 9, 4)):
        for got, wanted in zip(
            paged.append(*rows(count, step, dtype)), plain.append(*rows(count, step, dtype)), strict=True
        ):
            assert_same_bits(got, wanted)
        assert paged.length == plain.length
        if step == 2:
            for cache in (paged, plain):
                cache.truncate(2)
    assert (paged.kv.shape[1:], paged.kv.dtype, paged.kv.device) == (plain.kv.shape[1:], dtype, plain.kv.device)
    assert (paged.k_idx.shape[1:], paged.k_idx.dtype) == (plain.k_idx.shape[1:], plain.k_idx.dtype)
    truncate_caches([paged, plain], 7)
    assert paged.length == plain.length == 7


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_fp8_rows_come_back_as_they_were_rounded(dtype):
    _, (cache,), (paged,) = make(dtype=dtype, fp8=True)
    assert cache.kv_pages.dtype == torch.uint8 and cache.kv_pages.shape == (12, PAGE, 32 + 4 + 2 * 8)
    for chunk in (rows(5, 0, dtype), rows(4, 9, dtype)):
        kv, _, _ = paged.append(*chunk)
    both = torch.cat((rows(5, 0, dtype)[0], rows(4, 9, dtype)[0]))
    assert kv.dtype == dtype
    assert_same_bits(kv, dsa_ref.unpack_kv(dsa_ref.pack_kv(both, TINY.kv_lora_rank), TINY.kv_lora_rank, dtype))


def test_a_layer_without_an_indexer():
    _, (cache,), (paged,) = make(indexer=False)
    assert cache.index_pages is None and paged.k_idx is None
    kv, k_idx, k_scale = paged.append(rows(5)[0], None, None)
    assert_same_bits(kv, rows(5)[0])
    assert k_idx is k_scale is None


def test_the_table_moves_on_with_the_last_layer():
    """A chunk goes through one layer after the other; steps see its tokens when all layers have them."""
    table, _, layers = make(layers=3)
    for n, layer in enumerate(layers):
        assert table.lengths.tolist()[1] == table.length(1) == 0
        layer.append(*rows(6, n))
        assert [other.length for other in layers] == [6] * (n + 1) + [0] * (2 - n)
    assert table.lengths.tolist()[1] == table.length(1) == 6
    for n, layer in enumerate(layers):
        assert_same_bits(layer.append(*rows(0))[0], rows(6, n)[0])
    table.truncate(1, 4)
    assert [layer.length for layer in layers] == [4, 4, 4]
    table.reserve(1, 2)
    table.advance([1], 2)
    assert [layer.length for layer in layers] == [6, 6, 6]


@pytest.mark.parametrize("fails_at", (0, 1, 2))
def test_a_failed_chunk_leaves_all_as_it_was(fails_at):
    """Whichever layer fails, after its append: lengths, free pages, and a retry gives the right rows."""
    table, _, layers = make(layers=3)
    for n, layer in enumerate(layers):
        layer.append(*rows(3, n))
    before = table.free_pages, table.table.tolist(), table.lengths.tolist()
    with contextlib.suppress(KeyboardInterrupt), all_or_nothing(layers, None):
        for n, layer in enumerate(layers):
            with all_or_nothing([layer], None):
                layer.append(*rows(8, 10 + n))
                if n == fails_at:
                    raise KeyboardInterrupt
    assert (table.free_pages, table.table.tolist(), table.lengths.tolist()) == before
    assert [layer.length for layer in layers] == [3, 3, 3]
    for n, layer in enumerate(layers):
        assert_same_bits(layer.append(*rows(2, 20 + n))[0], torch.cat((rows(3, n)[0], rows(2, 20 + n)[0])))


def test_one_layer_may_be_taken_back_and_run_again():
    """The others keep their rows and their pages meanwhile."""
    table, _, layers = make(layers=2)
    for n, layer in enumerate(layers):
        layer.append(*rows(9, n))
    layers[1].truncate(2)
    assert table.length(1) == 2 and layers[0].length == 9
    layers[1].append(*rows(7, 5))
    assert table.length(1) == 9
    for layer, wanted in zip(layers, (rows(9, 0)[0], torch.cat((rows(9, 1)[0][:2], rows(7, 5)[0]))), strict=True):
        assert_same_bits(layer.append(*rows(0))[0], wanted)


def test_a_layer_may_run_ahead():
    """Two chunks, over a page's end, before the next layer sees the first; and pages reserved in advance stay."""
    table, _, layers = make(layers=2)
    table.reserve(1, 21)
    free = table.free_pages
    for n, layer in enumerate(layers):
        layer.append(*rows(3, n))
        assert table.free_pages == free
        assert_same_bits(layer.append(*rows(18, 5 + n))[0], torch.cat((rows(3, n)[0], rows(18, 5 + n)[0])))
        assert table.length(1) == (21 if n else 0) and table.free_pages == free
    for layer in layers:
        layer.append(*rows(4))
        layer.append(*rows(5))  # into pages that nobody reserved
        assert layer.length == 30
    assert table.length(1) == 30 and table.free_pages == free - 2


def test_layers_with_forks():
    """A fork shares what all layers have; copies on write take every layer's pools along."""
    table, caches, layers = make(layers=2, fp8=True)
    for n, layer in enumerate(layers):
        layer.append(*rows(6, n))
    layers[0].append(*rows(1, 30))  # of this, layer 1 knows nothing yet, so the fork neither
    other = [cache.sequence(table.fork(1) if cache is caches[0] else 2) for cache in caches]
    assert [layer.length for layer in other] == [6, 6]
    for n, (mine, theirs) in enumerate(zip(layers, other, strict=True)):
        theirs.append(*rows(3, 40 + n))
        if n:
            mine.append(*rows(1, 31))
    for n, (mine, theirs) in enumerate(zip(layers, other, strict=True)):
        for cache, chunks in ((mine, (rows(6, n), rows(1, 30 + n))), (theirs, (rows(6, n), rows(3, 40 + n)))):
            kv, k_idx, k_scale = cache.append(*rows(0))
            wanted = dsa_ref.pack_kv(torch.cat([chunk[0] for chunk in chunks]), TINY.kv_lora_rank)
            assert_same_bits(kv, dsa_ref.unpack_kv(wanted, TINY.kv_lora_rank))
            assert_same_bits(k_idx, torch.cat([chunk[1] for chunk in chunks]))
            assert_same_bits(k_scale, torch.cat([chunk[2] for chunk in chunks]))


def test_steps_read_what_a_sequence_wrote():
    """Prefill through `append`, then the paged steps on the pools: the selection and attention of contiguous rows."""
    table, (cache,), (paged,) = make()
    kv, k_idx, k_scale = paged.append(*rows(19))
    q_idx, w = dsa_ref.quantize(normal(1, 2, 4, 16, seed=5))[0], normal(1, 2, 4, seed=6)
    pages, lengths = table.table[[1]], table.lengths[[1]]
    positions, slots = dsa_ref.paged_select(q_idx, cache.index_pages, w, 6, pages, lengths)
    wanted = dsa_ref.lightning_select(q_idx[0], k_idx, w[0], 6, k_scale)
    assert torch.equal(positions[0], wanted)
    q = normal(1, 2, 3, TINY.latent_dim, seed=7)
    out, lse = dsa_ref.paged_sparse_attention(q, cache.kv_pages, slots, 0.2, TINY.kv_lora_rank, splits=1)
    wanted_out, wanted_lse = dsa_ref.sparse_attention(q[0], kv, wanted, 0.2, TINY.kv_lora_rank)
    torch.testing.assert_close(out[0], wanted_out)
    torch.testing.assert_close(lse[0], wanted_lse)


def test_autocast_widens_as_a_layer_cache_does():
    _, _, (paged,) = make()
    kv, k_idx, k_scale = rows(3, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(paged.append(kv, k_idx, k_scale)[0], kv.float())
    with pytest.raises(TypeError, match="kv must have dtype float32, got bfloat16"):
        paged.append(kv, k_idx, k_scale)


KV, K_IDX, K_SCALE = rows(2)
LEARNS = KV.clone().requires_grad_()
NAN = KV.clone().index_fill(1, torch.tensor([31]), torch.nan)
INFINITE = KV.clone().index_fill(1, torch.tensor([39]), torch.inf)  # in a column that FP8 rows keep as bf16
BAD = [  # options, rows, error, message
    ({}, (KV[:, 1:], K_IDX, K_SCALE), ValueError, "kv must have rows of 40, got 39"),
    ({}, (KV.half(), K_IDX, K_SCALE), TypeError, "kv must have dtype float32, got float16"),
    ({}, (KV, K_IDX[:, 1:], K_SCALE), ValueError, "k_idx must have rows of 16, got 15"),
    ({}, (KV, K_IDX.float(), K_SCALE), TypeError, "k_idx must have dtype float8_e4m3fn"),
    ({}, (KV, K_IDX, K_SCALE.double()), TypeError, "k_scale must have dtype float32, got float64"),
    ({}, (KV, K_IDX, K_SCALE[:1]), ValueError, "k_scale must have shape"),
    ({}, (KV, K_IDX, None), ValueError, "k_scale must be given in a cache made with indexer=True"),
    ({}, (KV, None, None), ValueError, "k_idx must be given in a cache made with indexer=True"),
    ({"indexer": False}, (KV, K_IDX, K_SCALE), ValueError, "k_idx must be None in a cache made with indexer=False"),
    ({}, (LEARNS, K_IDX, K_SCALE), ValueError, "kv must not require a gradient"),
    ({"fp8": True}, (NAN, K_IDX, K_SCALE), ValueError, "kv must be finite in its first v_dim columns"),
    (
        {"fp8": True},
        (INFINITE, K_IDX, K_SCALE),
        ValueError,
        "kv must be finite, got NaN or infinity in the rows of new",
    ),
    ({}, (NAN, K_IDX, K_SCALE), ValueError, "kv must be finite, got NaN or infinity in the rows of new tokens"),
    ({"indexer": False}, (INFINITE, None, None), ValueError, "kv must be finite, got NaN or infinity"),
    ({}, (KV, NAN[:, -16:].to(K_IDX.dtype), K_SCALE), ValueError, "k_idx must be finite"),
    ({}, (KV, K_IDX, K_SCALE * torch.inf), ValueError, "k_scale must be finite"),
    ({}, rows(31), ValueError, "cache must have room for 31 more tokens: tokens must fit max_length = 30, got 0 held"),
    ({"pages": 4}, rows(9), ValueError, "cache must have room for 9 more tokens: tokens must fit the pages that are"),
    ({}, ([1.0], K_IDX, K_SCALE), TypeError, "kv must be a torch.Tensor"),
]


@pytest.mark.parametrize("options, bad, error, message", BAD)
def test_bad_rows_are_named_and_nothing_is_written(options, bad, error, message):
    table, (cache,), (paged,) = make(**options)
    before = table.free_pages, table.table.tolist(), cache.kv_pages.clone()
    with pytest.raises(error, match=message):
        paged.append(*bad)
    assert before[:2] == (table.free_pages, table.table.tolist()) and torch.equal(cache.kv_pages, before[2])
    assert paged.length == 0
    if "room" in message:
        with pytest.raises(error, match=message):
            paged.check_room(len(bad[0]))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"config": dataclasses.replace(TINY, index_fp8=False)}, ValueError, "config must have index_fp8 = True"),
        (
            {"config": dataclasses.replace(TINY, kv_lora_rank=200), "fp8": True},
            ValueError,
            "kv_lora_rank must be below",
        ),
        ({"config": None}, TypeError, "config must be a DSAConfig, got NoneType"),
        ({"table": torch.zeros(1)}, TypeError, "table must be a PageTable, got Tensor"),
        ({"dtype": torch.int32}, TypeError, "dtype must be one of"),
        ({"fp8": 1}, TypeError, "fp8 must be a bool, got 1"),
        ({"indexer": None}, TypeError, "indexer must be a bool, got None"),
        ({"splits": 0}, ValueError, "splits must be at least 1, got 0"),
        ({"splits": 1.0}, TypeError, "splits must be an int, got float 1.0"),
    ],
)
def test_bad_options(change, error, message):
    """A table is not left with a cache that could not be made."""
    table = PageTable(3, 1, 8, 4)
    with pytest.raises(error, match=message):
        PagedCache(**{"table": table, "config": TINY} | change)
    PagedCache(table, dataclasses.replace(TINY, index_fp8=False), indexer=False)
    sequence = table.new()
    table.reserve(sequence, 5)
    table.advance([sequence], 5)
    assert table.length(sequence) == 5


@pytest.mark.parametrize("length, error", [(-1, ValueError), (6, ValueError), (2.0, TypeError), (True, TypeError)])
def test_bad_lengths(length, error):
    table, (cache,), (paged,) = make()
    paged.append(*rows(5))
    with pytest.raises(error, match="length must be"):
        paged.truncate(length)
    assert paged.length == 5
    for sequence, error in ((2, ValueError), (3, ValueError), ("0", TypeError)):
        with pytest.raises(error, match="sequence must be"):
            cache.sequence(sequence)


def test_a_sequence_that_has_ended():
    table, (cache,), (paged,) = make()
    paged.append(*rows(5))
    table.free(paged.sequence)
    free = table.free_pages
    for call in (
        lambda: paged.append(*rows(1)),
        lambda: paged.check_room(1),
        lambda: paged.truncate(0),
        lambda: setattr(paged, "length", 0),
        lambda: cache.rows(paged.sequence),
    ):
        with pytest.raises(ValueError, match="sequence must be one that new or fork gave and free did not end"):
            call()
    assert (table.free_pages, cache.filled[paged.sequence]) == (free, 0)


def test_copies_and_pickles():
    """Of a table, its caches and one sequence: they belong together, and go on by themselves."""
    table, (cache,), (paged,) = make()
    paged.append(*rows(5))
    one, fork = paged.sequence, table.fork(paged.sequence)
    for copied in (copy.deepcopy((table, paged)), pickle.loads(pickle.dumps((table, paged)))):
        twin, theirs = copied
        assert theirs.cache.table is twin and theirs.length == 5 and theirs.k_idx.dtype == paged.k_idx.dtype
        got = theirs.append(*rows(3, seed=1))
        assert [len(part) for part in got] == [8] * 3 and torch.equal(got[0][:5], cache.rows(one)[0])
        assert torch.equal(theirs.cache.rows(fork)[0], cache.rows(fork)[0])
        assert (table.length(one), paged.length, twin.length(one), twin.length(fork)) == (5, 5, 8, 5)
