"""What `warm` launches is all that a long prefill and a decode step launch: so nothing is left to be compiled there."""

import dataclasses

import pytest
import rungs
import torch
from conftest import NEEDS_TRITON
from inputs import normal
from launches import noted

from dsa_ref import TINY, V32, DSALayer, LayerCache, PagedCache, PageTable, unchecked_values

if rungs.has_triton():
    import dsa_kernels

pytestmark = pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)
CHUNK, CONTEXT = 16, 64
CONFIGS = pytest.mark.parametrize("changes", [{}, {"index_topk": 64}, {"index_fp8": False}])


def make_layer(device, **changes):
    config = dataclasses.replace(TINY, **changes)
    return config, DSALayer(config, dsa_kernels).requires_grad_(False).to(device, torch.bfloat16)


def launched_by(function, *args, **options):
    """The kernels that a call launches, each with what it is compiled for. In the interpreter none of them runs: which
    are launched follows from shapes, and what is not written is zero."""
    compiled = dsa_kernels.mode() == "compiled"
    with pytest.MonkeyPatch.context() as patch, noted(run=compiled) as (kernels, _):
        if not compiled:
            patch.setattr(torch, "empty", torch.zeros)
        function(*args, **options)
    return set(kernels)


def prefill(layer, lengths):
    """The tokens up to each of these lengths, one call each."""
    weight, first = layer.o_proj.weight, 0
    x = normal(lengths[-1], layer.config.dim).to(weight)
    cache = LayerCache(layer.config, lengths[-1] + 3, x.dtype, x.device)
    with unchecked_values():
        for last in lengths:
            layer(x[first:last], torch.arange(first, last, device=x.device), cache)
            first = last


@CONFIGS
def test_a_long_prefill_launches_nothing_else(device, changes):
    """In whole chunks, with a shorter one at the end, and token by token from there."""
    config, layer = make_layer(device, **changes)
    warmed = launched_by(dsa_kernels.warm, config, CONTEXT, CHUNK, (), dtype=torch.bfloat16, device=device)
    needed = launched_by(prefill, layer, (16, 32, 48, 61, 62, 63, 64))
    assert needed and needed <= warmed, needed - warmed


@pytest.mark.parametrize("fp8", (True, False))
def test_a_decode_step_launches_nothing_else(device, fp8):
    config, layer = make_layer(device)
    options = {"page_size": 16, "dtype": torch.bfloat16, "fp8": fp8, "device": device}
    warmed = launched_by(dsa_kernels.warm, config, CONTEXT, CHUNK, ((2, 1), (1, 3)), **options)
    table = PageTable(9, 2, CONTEXT, 16, device)
    cache = PagedCache(table, config, torch.bfloat16, fp8)
    sequences = [table.new() for _ in range(2)]
    x = normal(2, 5, TINY.dim).to(device, torch.bfloat16)
    for sequence in sequences:
        layer(x[sequence], torch.arange(5, device=device), cache.sequence(sequence))

    def decode(chosen, N):
        batch = table.batch(chosen, N)
        with unchecked_values():
            layer.decode(x[: len(chosen), :N], cache, batch)

    needed = launched_by(decode, sequences, 1) | launched_by(decode, sequences[:1], 3)
    assert needed and needed <= warmed, needed - warmed


@pytest.mark.gpu
def test_nothing_is_compiled_after_it(device):
    """On a card, whichever kernels it takes: not in whole chunks, not in the last one, and not in decode."""
    import triton

    sizes = {"dim": 512, "n_heads": 16, "q_lora_rank": 256, "max_seq_len": 40_000}
    config, chunk, names = dataclasses.replace(V32, **sizes), 1024, []
    layer = DSALayer(config, dsa_kernels).requires_grad_(False).to(device, torch.bfloat16)
    dsa_kernels.warm(config, chunk=chunk, device=device)
    kept = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = lambda src, **_: names.append(getattr(src, "name", str(src)))
    try:
        prefill(layer, (*range(chunk, 39 * chunk, chunk), 39_000, 39_001, 39_002))
        table = PageTable(626, 1, 40_000, 64, device)
        cache, sequence = PagedCache(table, config, torch.bfloat16, fp8=True), table.new()
        x = torch.randn(1, 5, config.dim, device=device).to(torch.bfloat16)
        layer(x[0, :4], torch.arange(4, device=device), cache.sequence(sequence))
        with unchecked_values():
            layer.decode(x[:, 4:], cache, table.batch([sequence], 1))
    finally:
        triton.knobs.compilation.listener = kept
    assert names == []


def test_less_warming_is_not_enough(device):
    """Another dtype and another chunk leave kernels out: the comparison can fail."""
    config, layer = make_layer(device)
    needed = launched_by(prefill, layer, (16, 32, 48, 64))
    for chunk, dtype in ((16, torch.float32), (1, torch.bfloat16)):
        warmed = launched_by(dsa_kernels.warm, config, CONTEXT, chunk, (), dtype=dtype, device=device)
        assert needed - warmed


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"context": 0}, ValueError, "context must"),
        ({"chunk": 0}, ValueError, "chunk must"),
        ({"page_size": 1.5}, TypeError, "page_size must"),
        ({"dtype": torch.float64}, TypeError, "dtype must be one of"),
        ({"config": "v32"}, TypeError, "config must be a DSAConfig, got str"),
        ({"fp8": "no"}, TypeError, "fp8 must be a bool, got 'no'"),
    ],
)
def test_bad_sizes(device, options, error, message):
    with pytest.raises(error, match=message):
        dsa_kernels.warm(**{"config": TINY} | options, device=device)


def test_calls_that_stand_for_all(device):
    """Keys beside multiples of 16 and on them, with calls of as many tokens; MHA mode as a layer asks for it."""
    from dsa_kernels.warm import contexts, mha_calls, sizes_of_calls

    assert sizes_of_calls(16) == [16, 13, 2, 1] and sizes_of_calls(1) == [1]
    assert sizes_of_calls(4096) == [4096, 4093, 1021, 1008, 509, 496, 253, 240, 16, 13, 2, 1]
    assert list(contexts(16, 16, 64)) == [16, 32, 64] and list(contexts(13, 16, 64)) == [13, 29, 61]
    assert list(contexts(1, 16, 32)) == [16, 13, 32, 29] and list(contexts(48, 48, 100)) == [64, 96]
    config = dataclasses.replace(TINY, index_topk=64)
    assert list(mha_calls(config, 48, 1000)) == [(48, 48, False), (16, 64, False)]
    assert list(mha_calls(dataclasses.replace(config, mha_keys=90), 48, 1000)) == [
        (48, 48, False), (16, 64, False), (26, 90, True),
    ]  # fmt: skip
