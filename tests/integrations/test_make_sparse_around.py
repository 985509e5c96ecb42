"""What transformers' users do around a model, beside its calls: parts replaced, caches used again, compiled calls."""

import types

import pytest
import torch
from tiny_models import FAMILIES, FEWER, T, assert_same, tiny, tokens
from transformers import DynamicCache, StaticCache

from dsa_ref.integrations.transformers import make_sparse, undo_sparse
from dsa_ref.integrations.transformers.visible import visible

families = pytest.mark.parametrize("family", FAMILIES)


def indexers(model):
    return [layer.self_attn.indexer for layer in model.model.layers if layer.self_attn.indexer is not None]


@pytest.mark.parametrize("k", (1, 5, 30, T, 2 * T))
@families
def test_as_many_keys_as_the_indexer_says(family, k):
    """transformers reads index_topk where its indexers were made, not in the config: so does a sparse layer."""
    model, x = tiny(family), tokens()
    for indexer in indexers(model):
        indexer.index_topk = k
    wanted, short = model(x).logits, model(x[:, :6]).logits
    make_sparse(model).config.index_topk = 3
    assert_same(model(x).logits, wanted)
    assert_same(model(x[:, :6]).logits, short)


@pytest.mark.parametrize("types", ("fff", "fss", "ffs", "sff"))
@pytest.mark.parametrize("length", (6, 20, T))
def test_layers_that_share(types, length):
    names = {"f": "full", "s": "shared"}
    model, x = tiny("glm_moe_dsa", indexer_types=[names[c] for c in types]), tokens(length=length)
    if types[0] == "s":
        for change in (lambda model: model, make_sparse):
            with pytest.raises(ValueError, match="prev_topk_indices must be given|require top-k indices"):
                change(model)(x)
        return
    wanted = model(x).logits
    assert_same(make_sparse(model)(x).logits, wanted)


def other_type(layer):
    class Other(type(layer.indexer)):
        pass

    layer.indexer.__class__ = Other


PARTS = {
    "indexer must be transformers' own, got one with forward hooks in layer 1": lambda layer: (
        layer.indexer.register_forward_hook(lambda *args: None)
    ),
    "indexer must be transformers' own, got one whose forward was replaced by .*lambda": lambda layer: setattr(
        layer.indexer, "forward", lambda *args, **kwargs: None
    ),
    "indexer must be transformers' own, got a Other in layer 1": other_type,
    "expand_kv must be the layer's own, got .*lambda": lambda layer: setattr(layer, "expand_kv", lambda *args: None),
}


@pytest.mark.parametrize("said", PARTS)
def test_parts_that_would_be_passed_over(said):
    """Before make_sparse, and after it."""
    model, x = tiny("deepseek_v32"), tokens()
    make_sparse(model)(x)
    PARTS[said](model.model.layers[1].self_attn)
    with pytest.raises(ValueError, match=said):
        model(x)
    undo_sparse(model)
    with pytest.raises(ValueError, match=said):
        make_sparse(model)
    assert model.config._attn_implementation == "eager"


def test_accelerate_s_hook_on_the_indexer_passes():
    """device_map puts one on every module; where it offloads the indexer as a whole, its weights would not come."""
    model, x = tiny("deepseek_v32"), tokens()
    wanted, indexer = model(x).logits, model.model.layers[1].self_attn.indexer
    indexer.forward, indexer._hf_hook = (
        types.MethodType(lambda self: None, indexer),
        types.SimpleNamespace(offload=False),
    )
    assert_same(make_sparse(model)(x).logits, wanted)
    indexer._hf_hook.offload = True
    with pytest.raises(ValueError, match="indexer must be transformers' own, got one whose forward was replaced"):
        model(x)


@families
def test_calls_of_the_wrong_shape(family):
    model, x = make_sparse(tiny(family)), tokens()
    cache = DynamicCache(config=model.config)
    for shape, got in (((1, T), r"\[1, 40\]"), ((3, T), r"\[3, 40\]"), ((2, T, T), r"\[2, 40, 40\]")):
        with pytest.raises(ValueError, match=r"attention_mask must be \[2, tokens so far\] or .*got " + got):
            model(x, attention_mask=torch.ones(shape), past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask must be .*got \[40\]"):
        model(x, attention_mask=torch.ones(T), past_key_values=cache)
    for positions in (torch.arange(T), torch.arange(T + 3)[None], torch.zeros(3, T, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"position_ids must be \[2, 40\] or \[1, 40\], got"):
            model(x, position_ids=positions, past_key_values=cache)
    for empty in (x[:0], x[:, :0]):
        with pytest.raises(ValueError, match="input_ids must hold a token or more, got"):
            model(empty, past_key_values=cache)
    made = visible(3, T, T), visible(2, 30, T), visible(2, T, 30)
    for mask, got in zip(made, (r"\[3, 40, 40\]", r"\[2, 30, 40\]", r"\[2, 40, 30\]"), strict=True):
        with pytest.raises(ValueError, match=r"made for \[batch, queries, keys\] = \[2, 40, 40\], got " + got):
            model(x, attention_mask={"indexed_attention": mask}, past_key_values=cache)
    assert cache.get_seq_length() == 0


@families
def test_a_config_that_was_sparse_before(family):
    """A model made from a sparse one's config: undo_sparse gives transformers' own choice."""
    model, x = make_sparse(tiny(family)), tokens()
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    wanted = model(x).logits
    assert_same(make_sparse(other)(x).logits, wanted)
    assert undo_sparse(other).config._attn_implementation == "sdpa"
    assert_same(other(x).logits, wanted)


@families
def test_a_cache_that_was_reset(family):
    """It holds nothing: it may begin with the other kind of index keys."""
    model, x = make_sparse(tiny(family)), tokens()
    wanted = make_sparse(model, index_fp8=True)(x).logits
    for cache in (StaticCache(config=model.config, max_cache_len=T), DynamicCache(config=model.config)):
        make_sparse(model)(x[:, :30], past_key_values=cache)
        cache.reset()
        make_sparse(model, index_fp8=True)
        parts = [model(x[:, part], past_key_values=cache).logits for part in (slice(25), slice(25, T))]
        assert_same(torch.cat(parts, 1), wanted)


def causal(length):
    return torch.ones(2, 1, length, length).tril().bool()


@families
def test_compiled_prefill(family):
    """One graph, with the mask made in it: of packed sequences, and given with rank 4."""
    model, x = tiny(family, **FEWER[family]), tokens()
    attention = model.model.layers[0].self_attn
    attention.kv_b_proj = torch.nn.Sequential(attention.kv_b_proj)  # whose matrix is read by unit vectors
    positions = torch.cat((torch.arange(13), torch.arange(T - 13)))[None]
    calls = {"use_cache": False, "position_ids": positions}, {"use_cache": False, "attention_mask": causal(T)}
    model.set_attn_implementation("sdpa")
    wanted = [model(x, **given).logits for given in calls]
    compiled = torch.compile(make_sparse(model), fullgraph=True, backend="eager")
    for given, logits in zip(calls, wanted, strict=True):
        assert_same(compiled(x, **given).logits, logits)
    gaps = causal(T)
    gaps[..., 30:, 10:20] = False
    with pytest.raises(RuntimeError, match="attention_mask must let each query see one run"):
        compiled(x, use_cache=False, attention_mask=gaps)
    torch._dynamo.reset()


def test_compiled_training():
    """Where a gradient is wanted the graph breaks: attention runs as it does without a compiler."""
    model, x = tiny("deepseek_v32", **FEWER["deepseek_v32"]).train().requires_grad_(True), tokens()

    def gradients(call):
        model.zero_grad()
        call(x, labels=x, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    wanted = gradients(model)
    got = gradients(torch.compile(make_sparse(model), backend="eager"))
    torch._dynamo.reset()
    assert got.keys() == wanted.keys()
    for name in got:
        assert (got[name] - wanted[name]).abs().max() < 1e-4 * wanted[name].abs().max() + 1e-9, name


def test_exported():
    model, x = tiny("deepseek_v32", **FEWER["deepseek_v32"]), tokens()
    wanted = model(x, use_cache=False).logits
    exported = torch.export.export(make_sparse(model), (tokens(seed=7),), {"use_cache": False}, strict=False)
    assert_same(exported.module()(x, use_cache=False).logits, wanted)
