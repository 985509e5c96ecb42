"""A decode step in a CUDA graph: the bits of the step itself, for sequences that grow, on any page."""

import dataclasses

import pytest
import rungs
import torch
from inputs import assert_same_bits, normal

import dsa_ref
from dsa_ref import TINY, DSALayer, PagedCache, PageTable
from dsa_ref.nn import CapturedStep, ModelConfig, SmallModel

PAGE = 5


def make_layer(device, dtype, **changes):
    layer = DSALayer(dataclasses.replace(TINY, **changes), rungs.load("kernels")).requires_grad_(False)
    for i, parameter in enumerate(layer.parameters()):
        parameter.copy_(normal(*parameter.shape, seed=i) * 0.3)
    return layer.to(device=device, dtype=dtype)


def filled(layer, lengths, fp8, max_length=64):
    """A table and a cache with sequences of these lengths."""
    weight = layer.o_proj.weight
    table = PageTable(60, len(lengths) + 1, max_length, PAGE, weight.device)
    cache = PagedCache(table, layer.config, weight.dtype, fp8)
    for i, length in enumerate(lengths):
        row = table.new()
        x = normal(length, TINY.dim, seed=i).to(weight)
        layer(x, torch.arange(length, device=x.device), cache.sequence(row))
    return table, cache


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", (True, False))
@pytest.mark.parametrize("N", (1, 2, 4))
def test_replays_have_the_bits_of_the_step(N, fp8):
    """From within a page over two borders, past k, and after a rejected guess."""
    layer, lengths = make_layer("cuda", torch.bfloat16), (2, 7, 13)
    (table, cache), (other, plain) = (filled(layer, lengths, fp8) for _ in range(2))
    sequences = [2, 0, 1]
    example = torch.zeros(3, N, TINY.dim, dtype=torch.bfloat16, device="cuda")
    step = CapturedStep(lambda x, batch: layer.decode(x, cache, batch), table, sequences, example, layer.ops)
    assert [table.length(row) for row in range(3)] == list(lengths)
    for i in range(12 // N):
        x = normal(3, N, TINY.dim, seed=100 + i).to(example)
        got = step(x).clone()
        wanted = layer.decode(x, plain, other.batch(sequences, N))
        other.advance(sequences, N)
        assert_same_bits(got, wanted)
        if i == 1:
            for one in (table, other):
                one.truncate(0, one.length(0) - 1)
    assert_same_bits(table.lengths, other.lengths)
    for row in range(3):
        for one, two in zip(cache.rows(row), plain.rows(row), strict=True):
            assert_same_bits(one, two)


@pytest.mark.gpu
def test_a_model_s_replays():
    model = SmallModel(ModelConfig(2, 96, attention=TINY), rungs.load("kernels")).requires_grad_(False).cuda()
    texts = [torch.randint(256, (9 + 4 * i,), device="cuda") for i in range(2)]
    made = []
    for _ in range(2):
        table, caches = model.new_paged_caches(40, 2, 60, PAGE)
        for text in texts:
            row = table.new()
            model(text, caches=[cache.sequence(row) for cache in caches])
        made.append((table, caches))
    (table, caches), (other, plain) = made
    example = torch.zeros(2, 1, dtype=torch.int64, device="cuda")
    step = CapturedStep(
        lambda t, batch: model.decode_batch(t, caches, batch), table, [0, 1], example, rungs.load("kernels")
    )
    newest = example
    for _ in range(12):
        got = step(newest).clone()
        assert_same_bits(got, model.decode(newest, other, plain, [0, 1]))
        newest = got.argmax(dim=-1)


@pytest.mark.gpu
def test_a_refused_call_changes_nothing():
    layer = make_layer("cuda", torch.bfloat16)
    table, cache = filled(layer, (7,), True, max_length=9)
    x = normal(1, 1, TINY.dim).to("cuda", torch.bfloat16)
    step = CapturedStep(lambda x, batch: layer.decode(x, cache, batch), table, [0], x, layer.ops)
    for error, bad, message in (
        (TypeError, x.float(), "x must be a tensor of torch.bfloat16"),
        (ValueError, x[:, :, 1:], "x must have shape"),
        (ValueError, x.cpu(), "x must have shape"),
    ):
        with pytest.raises(error, match=message):
            step(bad)
    for _ in range(2):
        step(x)
    with pytest.raises(ValueError, match="tokens must fit max_length = 9, got 9 held and 1 more"):
        step(x)
    assert table.length(0) == 9
    with pytest.raises(ValueError, match="the reference waits for values"):
        CapturedStep(lambda x, batch: x, table, [0], x, dsa_ref)
    with pytest.raises(ValueError, match="x must have shape \\[B, N, ...\\] with B = 2 sequences"):
        CapturedStep(lambda x, batch: x, table, [0, 1], x, layer.ops)


def test_a_cpu_has_no_graphs():
    table = PageTable(4, 2, 9, PAGE)
    table.new()
    with pytest.raises(ValueError, match="must be on a CUDA device, where graphs are captured, got cpu"):
        CapturedStep(lambda x, batch: x, table, [0], torch.zeros(1, 1, 4), dsa_ref)
    with pytest.raises(TypeError, match="x must be a torch.Tensor, got list"):
        CapturedStep(lambda x, batch: x, table, [0], [[0]], dsa_ref)
    with pytest.raises(TypeError, match="sequences must be a list of ints, got int"):
        CapturedStep(lambda x, batch: x, table, 0, torch.zeros(1, 1, 4), dsa_ref)
