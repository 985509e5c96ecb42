"""The whole layer: one answer by decode, by chunks, packed, in MQA, MHA and dense mode, and from every rung.

The reference runs in fp64, so that another order of summation cannot flip a selection; the kernels run in fp32, where a
near tie may flip in a rare row, which is then left out of the comparison of outputs.
"""

import dataclasses
import types

import pytest
import torch
from inputs import assert_close, best, normal, packed, selected
from torch.utils._python_dispatch import TorchDispatchMode

import dsa_ref
from dsa_ref import TINY, DSALayer, LayerCache, index_scores, indexer_loss
from dsa_ref.nn.layer import STEPS

T = 20  # the interpreter needs some 20 ms a token and step
RUNGS = pytest.mark.rungs("reference", "kernels")
FP8 = pytest.mark.parametrize("fp8", (True, False))


def make_layer(ops, device, fp8=True, seed=0, **changes):
    config = dataclasses.replace(TINY, index_fp8=fp8, **changes)
    layer = DSALayer(config, ops).requires_grad_(False)
    for i, parameter in enumerate(layer.parameters()):
        parameter.copy_(normal(*parameter.shape, seed=1000 * seed + i) * 0.3)
    return layer.to(device=device, dtype=dtype_of(ops))


def dtype_of(ops):
    return torch.float64 if ops is dsa_ref else torch.float32


def tokens(layer, count=T, seed=0):
    weight = layer.o_proj.weight
    return normal(count, TINY.dim, seed=seed).to(weight), torch.arange(count, device=weight.device)


def run(layer, x, positions, **options):
    """(output, sorted selections of each row or None, recorded step)."""
    record = []
    y = layer(x, positions, record=record, **options)
    (step,) = record
    return y, selected(step["indices"]) if "indices" in step else [None] * len(x), step


def assert_same(got, wanted):
    """Selections agree in every row (fp64) or all but 5 % (fp32), and outputs wherever selections do."""
    same = torch.tensor([a == b for a, b in zip(got[1], wanted[1], strict=True)])
    exact = wanted[0].dtype == torch.float64
    assert same.all() if exact else same.float().mean() >= 0.95
    assert_close(got[0].cpu()[same], wanted[0].cpu()[same], 1e-6 if exact else 1e-5)


def in_chunks(layer, x, positions, size):
    """Feed the tokens to a cache `size` at a time; outputs and selections of all."""
    cache = LayerCache(layer.config, len(x), x.dtype, x.device)
    parts = [run(layer, x[i : i + size], positions[i : i + size], cache=cache) for i in range(0, len(x), size)]
    assert cache.length == len(x)
    return torch.cat([part[0] for part in parts]), [row for part in parts for row in part[1]]


@RUNGS
@FP8
@pytest.mark.parametrize("size", (1, 7, T))
def test_decode_and_chunks_equal_prefill(ops, device, fp8, size):
    layer = make_layer(ops, device, fp8)
    x, positions = tokens(layer)
    assert_same(in_chunks(layer, x, positions, size), run(layer, x, positions))


@RUNGS
@FP8
@pytest.mark.parametrize("seed", (0, 1))
def test_mqa_equals_mha(ops, device, fp8, seed):
    """Absorbing W_UK and W_UV changes the order of products and nothing else."""
    layer = make_layer(ops, device, fp8, seed)
    x, positions = tokens(layer, seed=seed)
    sparse, mha = run(layer, x, positions), run(layer, x, positions, attention="mha")
    assert_same(mha, sparse)
    assert_close(mha[2]["lse"], sparse[2]["lse"], 1e-5)
    assert sparse[2]["q"].shape == (T, 4, 40) and "q_heads" not in sparse[2]
    assert mha[2]["q_heads"].shape == (T, 4, 24) and "q" not in mha[2]  # one name, one meaning


@RUNGS
@FP8
def test_selecting_everything_is_dense(ops, device, fp8):
    layer = make_layer(ops, device, fp8, index_topk=T)
    x, positions = tokens(layer)
    dense = layer(x, positions, attention="dense")
    assert_close(layer(x, positions), dense, 1e-5)
    few = make_layer(ops, device, fp8)(x, positions)
    assert_close(few[:8], dense[:8], 1e-5)  # up to k keys there is nothing to choose
    assert (few[8:] - dense[8:]).abs().amax(dim=1).min() > 1e-2


@RUNGS
@FP8
@pytest.mark.parametrize("attention", ("sparse", "mha", "dense"))
def test_causality(ops, device, fp8, attention):
    """What comes later changes no bit of what was before."""
    layer = make_layer(ops, device, fp8)
    x, positions = tokens(layer)
    before = layer(x, positions, attention=attention)
    x[12:] = -3 * x[12:] + 1
    after = layer(x, positions, attention=attention)
    assert torch.equal(before[:12], after[:12])
    assert (before[12:] != after[12:]).any(dim=1).all()


@RUNGS
@FP8
@pytest.mark.parametrize("attention", ("sparse", "dense"))
def test_packed_equals_separate(ops, device, fp8, attention):
    layer = make_layer(ops, device, fp8)
    x, _ = tokens(layer)
    lengths = (5, 1, 14)
    start, _, positions = packed(*lengths, device=device)
    whole = run(layer, x, positions, attention=attention)
    for first, length in zip((0, 5, 6), lengths, strict=True):
        rows = slice(first, first + length)
        alone = run(layer, x[rows], positions[rows], attention=attention)
        moved = [row if row is None else [s + first for s in row] for row in alone[1]]
        assert_same((whole[0][rows], whole[1][rows]), (alone[0], moved))
    assert torch.equal(whole[2]["start"], start)


@pytest.mark.rungs("kernels", "loops")
@FP8
def test_rungs_agree(ops, device, fp8):
    """In fp32. A byte of FP8 may round the other way in the loops' float64, so there the sets are compared loosely."""
    layer = make_layer(ops, device, fp8)
    reference = make_layer(dsa_ref, device, fp8).float()
    x, positions = tokens(layer)
    got, wanted = run(layer, x, positions), run(reference, x, positions)
    assert_same(got, wanted)


@RUNGS
@FP8
def test_recorded_step(ops, device, fp8):
    """What the layer says it did obeys the contracts of the steps it says it took."""
    layer = make_layer(ops, device, fp8)
    x, positions = tokens(layer)
    _, rows, step = run(layer, x, positions)
    c = layer.config
    index_dtype = torch.float8_e4m3fn if fp8 else x.dtype
    shapes = {"q_idx": (T, 16, 16), "k_idx": (T, 16), "w": (T, 16), "q": (T, 4, 40), "kv": (T, 40), "indices": (T, 8)}
    assert {name: tuple(step[name].shape) for name in shapes} == shapes
    assert step["q_idx"].dtype == step["k_idx"].dtype == index_dtype
    scores = index_scores(step["q_idx"], step["k_idx"], step["w"], step["k_scale"]).cpu()
    chosen = torch.tensor([[s in row for s in range(T)] for row in rows])
    assert [len(row) for row in rows] == [min(t + 1, 8) for t in range(T)]
    assert (scores[chosen] > -torch.inf).all()
    if ops is dsa_ref:
        assert rows == best(scores.numpy(), 8)
    weakest = scores.masked_fill(~chosen, torch.inf).amin(dim=1)
    strongest = scores.masked_fill(chosen, -torch.inf).amax(dim=1)
    assert (weakest >= strongest - 1e-5).all()
    _, lse = dsa_ref.sparse_attention(step["q"], step["kv"], step["indices"], c.softmax_scale, c.kv_lora_rank)
    assert_close(step["lse"], lse, 1e-5)


@RUNGS
@pytest.mark.parametrize("attention", ("sparse", "mha"))
def test_lists_are_no_wider_than_there_are_keys(ops, device, attention):
    """Of a large k, places are asked for as far as there are keys, with a cache and without."""
    asked, steps = [], {name: getattr(ops, name) for name in STEPS}

    def lightning_select(q_idx, k_idx, w, k, **options):
        asked.append(k)
        return ops.lightning_select(q_idx, k_idx, w, k, **options)

    layer = make_layer(ops, device, index_topk=2048)
    x, positions = tokens(layer)
    wanted = run(layer, x, positions, attention=attention)
    layer.ops = types.SimpleNamespace(**steps | {"lightning_select": lightning_select})
    cache, record = LayerCache(layer.config, T, x.dtype, device), []
    parts = [layer(x[i : i + 5], positions[i : i + 5], cache, attention, record) for i in range(0, T, 5)]
    assert asked == [5, 10, 15, 20] == [step["indices"].shape[1] for step in record]
    assert wanted[2]["indices"].shape == (T, T)
    assert_close(torch.cat(parts), wanted[0], 1e-4)


class Counted(TorchDispatchMode):
    """Counts the operations by which a check looks at index lists."""

    def __init__(self):
        super().__init__()
        self.looks = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.aminmax.default, torch.ops.aten.sort.default):
            self.looks.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ("sparse", "mha"))
def test_a_layer_does_not_look_at_what_it_has_just_selected(attention):
    """Those checks make the host wait for a GPU. Lists that a user shares are looked at, also for an index twice."""
    backwards = types.SimpleNamespace(**{name: getattr(dsa_ref, name) for name in STEPS})
    backwards.lightning_select = lambda *a, **k: dsa_ref.lightning_select(*a, **k).flip(1)  # sorted where it is checked
    layer = make_layer(backwards, "cpu").double()
    x, positions = tokens(layer)
    with Counted() as counted:
        layer(x, positions, attention=attention)
    assert counted.looks == []
    sharing = DSALayer(layer.config, indexer=False).requires_grad_(False).double()
    twice = torch.zeros(T, 2, dtype=torch.int32)
    with Counted() as counted, pytest.raises(ValueError, match="indices must be distinct"):
        sharing(x, positions, attention=attention, indices=twice)
    assert counted.looks != []
    with dsa_ref.unchecked_values(), Counted() as counted:
        sharing(x, positions, attention=attention, indices=twice[:, :1])
    assert counted.looks == []


@RUNGS
@FP8
def test_one_token_and_none(ops, device, fp8):
    layer = make_layer(ops, device, fp8)
    x, positions = tokens(layer)
    cache = LayerCache(layer.config, 1, x.dtype, device)
    assert_close(layer(x[:1], positions[:1], cache), layer(x, positions)[:1], 1e-5)
    assert layer(x[:0], positions[:0], cache).shape == (0, TINY.dim)


@pytest.mark.parametrize("seed", (0, 1))
def test_indexer_written_out(device, seed):
    """q, k and w before RoPE, from the weights in float64: which norm and latent, which precision, which constant."""
    layer = make_layer(dsa_ref, device, seed=seed).float()
    x, _ = tokens(layer, seed=seed)
    q, k, w = layer.indexer(x, layer.q_a_layernorm(layer.q_a_proj(x)))
    weights = {name: tensor.double() for name, tensor in layer.state_dict().items()}
    x = x.double()
    latent = x @ weights["q_a_proj.weight"].T
    latent = latent / (latent.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * weights["q_a_layernorm.weight"]
    key = x @ weights["indexer.wk.weight"].T
    key = (key - key.mean(dim=1, keepdim=True)) / (key.var(dim=1, correction=0, keepdim=True) + 1e-6).sqrt()
    assert_close(q.flatten(1), latent @ weights["indexer.wq_b.weight"].T, 1e-6)
    assert_close(k, key * weights["indexer.k_norm.weight"] + weights["indexer.k_norm.bias"], 1e-5)
    assert_close(w, x @ weights["indexer.weights_proj.weight"].T * 16**-0.5 * 16**-0.5, 1e-6)


@pytest.mark.parametrize("attention", ("sparse", "mha", "dense"))
def test_narrow_dtype(device, attention):
    """bf16 weights give a bf16 answer near the fp32 one, and RoPE's frequencies keep their precision meanwhile."""
    layer = make_layer(dsa_ref, device, index_topk=T).float()
    x, positions = tokens(layer)
    wanted, freqs = layer(x, positions, attention=attention), layer.freqs.clone()
    y = layer.bfloat16()(x.bfloat16(), positions, attention=attention)
    assert y.dtype == torch.bfloat16
    assert (y - wanted).norm() < 0.03 * wanted.norm()
    assert torch.equal(layer.float().freqs, freqs)


def test_losses_stay_in_their_halves(device):
    """The model's loss moves every weight but the indexer's; the indexer's loss moves the indexer's alone."""
    layer = make_layer(dsa_ref, device, fp8=False).requires_grad_(True)
    x, positions = tokens(layer)
    x.requires_grad_()
    record = []
    layer(x, positions, record=record).square().mean().backward()
    assert x.grad.abs().max() > 0
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is None) == name.startswith("indexer."), name
    layer.zero_grad()
    x.grad = None
    (step,) = record
    scores_side = [step[name] for name in ("q_idx", "k_idx", "w")]
    indexer_loss(*scores_side, step["q"], step["kv"], layer.config.softmax_scale, step["indices"]).backward()
    assert x.grad is None
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == name.startswith("indexer."), name


@RUNGS
def test_bad_input(ops, device):
    layer = make_layer(ops, device)
    x, positions = tokens(layer)
    cache = LayerCache(layer.config, 10, x.dtype, device)
    layer(x[:8], positions[:8], cache=cache)
    hole = positions.clone()
    hole[5] += 1
    for error, name, args, options in (
        (ValueError, "x must", (x[:, :5], positions), {}),
        (TypeError, "x must", (x.int(), positions), {}),
        (TypeError, "x must", (None, positions), {}),
        (TypeError, "x must have dtype", (x.half(), positions), {}),
        (ValueError, "x must be on", (x.to("meta"), positions.to("meta")), {}),
        (ValueError, "x must hold", (x[:0], positions[:0]), {}),
        (ValueError, "positions must", (x, positions[:5]), {}),
        (TypeError, "positions must", (x, positions.float()), {}),
        (ValueError, "positions must", (x, positions + 1), {}),
        (ValueError, "positions must", (x, hole), {}),
        (ValueError, "positions must", (x, positions), {"cache": cache}),
        (ValueError, "cache must", (x[:3], positions[8:11]), {"cache": cache}),
        (ValueError, "attention must", (x, positions), {"attention": "flash"}),
    ):
        with pytest.raises(error, match=name):
            layer(*args, **options)
    assert cache.length == 8
    narrow = LayerCache(layer.config, 10, torch.float16, device)
    with pytest.raises(TypeError, match="kv must have dtype"):
        layer(x[:2], positions[:2], cache=narrow)
    if ops is dsa_ref:
        with pytest.raises(ValueError, match="kv must not require a gradient"):
            make_layer(ops, device).requires_grad_(True)(
                x[:2], positions[:2], LayerCache(layer.config, 9, x.dtype, device)
            )
    assert narrow.length == 0
    for capacity, error in ((0, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="capacity must"):
            LayerCache(layer.config, capacity)


@RUNGS
def test_an_interleaved_indexer_runs_its_steps_from_ops(ops, device):
    """`hadamard` and `quantize` where ops has them, else the reference's."""
    layer, seen = make_layer(ops, device, index_rope="interleaved"), []

    def spy(name):
        def step(x):
            seen.append(name)
            return getattr(ops, name)(x)

        return step

    x, positions = tokens(layer)
    wanted = run(layer, x, positions)
    layer.ops = types.SimpleNamespace(**{name: getattr(ops, name) for name in STEPS})
    assert_same(run(layer, x, positions), wanted)
    layer.ops.hadamard, layer.ops.quantize = spy("hadamard"), spy("quantize")
    assert_same(run(layer, x, positions), wanted)
    assert seen == ["hadamard", "quantize"] * 2
