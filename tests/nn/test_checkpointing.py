"""Activation checkpointing: the same losses and gradients as without, one record entry a layer, and where gradients of
the indexer would be lost a refusal that names the cure."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dsa_ref import TINY, DSALayer, LayerCache, indexer_loss
from dsa_ref.nn import ModelConfig, SmallModel

T = 20
FIELDS = ("q_idx", "k_idx", "w", "q", "kv")
CURE = "use_reentrant=False"


def make_model(seed=0):
    torch.manual_seed(seed)
    fields = TINY.__dict__ | {"index_fp8": False}
    return SmallModel(ModelConfig(n_layers=2, hidden_dim=64, attention=type(TINY)(**fields)))


def text():
    return torch.arange(T + 1) * 7 % 256


def around_blocks(model, run, tokens, record, attention):
    x, positions = model.embed(tokens), torch.arange(len(tokens))
    for block in model.layers:
        x = run(block, x, positions, None, attention, record)
    return F.linear(model.norm(x), model.embed.weight)


def around_attention(model, run, tokens, record, attention):
    x, positions = model.embed(tokens), torch.arange(len(tokens))
    for block in model.layers:
        x = x + run(block.self_attn, block.attention_norm(x), positions, None, attention, record)
    return F.linear(model.norm(x), model.embed.weight)


def around_the_model(model, run, tokens, record, attention):
    return run(model, tokens, None, None, attention, record)


WHERE = pytest.mark.parametrize("where", (around_blocks, around_attention, around_the_model))
STAGE = pytest.mark.parametrize("stage", ("dense", "warm-up", "sparse"))


def directly(function, *args):
    return function(*args)


def with_mode(reentrant):
    return lambda function, *args: checkpoint(function, *args, use_reentrant=reentrant)


def losses(model, where, run, stage):
    """(loss of the stage, record) as the training stages have it."""
    record, tokens, total = [], text(), 0
    logits = where(model, run, tokens[:-1], record, "sparse" if stage == "sparse" else "dense")
    if stage != "warm-up":
        total = F.cross_entropy(logits, tokens[1:])
    if stage != "dense":
        scale = model.config.attention.softmax_scale
        total = total + sum(indexer_loss(*(s[n] for n in FIELDS), scale, s.get("indices")) for s in record)
    return total, record


@WHERE
@STAGE
def test_without_reentrance_all_gradients_are_those_without_checkpoints(where, stage):
    results = []
    for run in (directly, with_mode(False)):
        model = make_model()
        loss, record = losses(model, where, run, stage)
        loss.backward()
        assert len(record) == 2  # not one more for each layer that backward repeats
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for wanted, got in zip(*results, strict=True):
        assert (wanted is None and got is None) or torch.equal(wanted, got)
    assert any(gradient is not None for gradient in results[0][1:])


@WHERE
@STAGE
def test_reentrance_is_refused_where_a_record_is_kept(where, stage):
    """At once, in the forward pass, whatever is inside the checkpoint."""
    with pytest.raises(ValueError, match=CURE):
        losses(make_model(), where, with_mode(True), stage)


def test_reentrance_serves_where_no_gradient_is_lost():
    """Without a record, or with a frozen indexer, whose entries carry none in any mode."""
    gradients = []
    for run in (directly, with_mode(True)):
        model = make_model()
        for layer in model.layers:
            layer.self_attn.indexer.requires_grad_(False)
        for record in ([], None):
            around_blocks(model, run, text()[:-1], record, "sparse").square().mean().backward()
            assert record is None or len(record) == 2
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class OtherCheckpoint(torch.autograd.Function):
    """What other libraries' reentrant checkpointing does."""

    @staticmethod
    def forward(ctx, function, x, *args):
        ctx.function, ctx.args = function, args
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x, *args)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x, *ctx.args)
        torch.autograd.backward(y, gradient)
        return None, x.grad, *(None for _ in ctx.args)


def test_another_librarys_reentrance_is_refused_in_the_backward_pass():
    loss, record = losses(make_model(), around_blocks, OtherCheckpoint.apply, "sparse")
    assert not record[0]["w"].requires_grad  # lost, which only the repeated pass can tell from an evaluation
    with pytest.raises(ValueError, match=CURE):
        loss.backward()
    assert len(record) == 2


def test_evaluation_records_as_ever():
    """No gradients are wanted: trainable weights, gradients off, each call recorded."""
    model, record = make_model(), []
    for _ in range(2):
        with torch.no_grad():
            model(text()[:-1], record=record)
    assert len(record) == 4 and not record[0]["w"].requires_grad
    with pytest.raises(TypeError, match="record must be a list"):
        model(text()[:-1], record=())


def cached_layer(trained=True):
    """A layer whose queries alone are trained, so that rows of the cache ask for no gradient."""
    torch.manual_seed(0)
    layer = DSALayer(TINY).requires_grad_(False)
    layer.q_b_proj.requires_grad_(trained)
    return layer, LayerCache(TINY, T), torch.randn(T, TINY.dim), torch.arange(T)


@pytest.mark.parametrize("attention", ("sparse", "mha", "dense"))
def test_a_cached_step_under_checkpointing_is_refused_at_once(attention):
    layer, cache, x, positions = cached_layer()
    with pytest.raises(ValueError, match="cache must not be used under activation checkpointing"):
        checkpoint(layer, x, positions, cache, attention, use_reentrant=False)
    assert cache.length == 0
    with pytest.raises(ValueError, match="cache must not be used under activation checkpointing"):
        checkpoint(layer, x.requires_grad_(), positions, cache, attention, use_reentrant=True)
    assert cache.length == 0


def test_a_cached_step_that_is_repeated_unforeseen_is_explained_in_the_backward_pass():
    """What runs after the frozen layer is trained, or another library repeats it."""
    layer, cache, x, positions = cached_layer(False)
    weight = torch.ones(TINY.dim, requires_grad=True)
    y = checkpoint(lambda *args: layer(*args) * weight, x, positions, cache, use_reentrant=False)
    with pytest.raises(ValueError, match="cache must not be used under activation checkpointing"):
        y.sum().backward()
    layer, cache, x, positions = cached_layer()
    y = OtherCheckpoint.apply(layer, x.requires_grad_(), positions, cache)
    with pytest.raises(ValueError, match="cache must not be used under activation checkpointing"):
        y.sum().backward()
    assert cache.length == T


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", (True, False))
def test_a_cached_step_that_is_not_repeated_passes_through_a_checkpoint(reentrant):
    """Without gradients, as a model in training mode decodes; and where nothing asks for one."""
    layer, cache, x, positions = cached_layer()
    wanted = layer(x, positions)
    with torch.no_grad():
        assert torch.equal(checkpoint(layer, x, positions, cache, use_reentrant=reentrant), wanted)
    layer, cache, x, positions = cached_layer(False)
    assert torch.equal(checkpoint(layer, x, positions, cache, use_reentrant=reentrant), wanted)
    assert cache.length == T
