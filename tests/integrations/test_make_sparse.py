"""A sparse model against transformers' own attention, eager and sdpa, for all that transformers' users do."""

import copy
import pickle

import pytest
import torch
from tiny_models import FAMILIES, FEWER, SIZES, T, assert_same, tiny, tokens
from transformers import DynamicCache, StaticCache
from transformers.models.deepseek_v32 import modeling_deepseek_v32

import dsa_ref
from dsa_ref.integrations.transformers import attention as sparse
from dsa_ref.integrations.transformers import make_sparse, undo_sparse

IMPLEMENTATIONS = ("eager", "sdpa")
families = pytest.mark.parametrize("family", FAMILIES)


def padded(kind):
    """attention_mask [2, T]: none, left, right, or holes, as a batch has that was padded again in its second turn."""
    mask = torch.ones(2, T, dtype=torch.long)
    if kind == "left":
        mask[0, :11] = 0
    elif kind == "right":
        mask[1, 25:] = 0
    elif kind == "holes":
        mask[0, 9:14] = 0
        mask[1, :3] = mask[1, 20:22] = 0
    return mask


def places(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def causal(mask):
    """The mask [B, 1, S, T] that transformers makes of a mask [B, T]."""
    return torch.ones(T, T).tril().bool()[None, None] & mask[:, None, None].bool()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("padding", ("none", "left", "right", "holes"))
@families
def test_batches_and_padding(family, padding, implementation):
    model, x, mask = tiny(family, implementation), tokens(), padded(padding)
    wanted = model(x, attention_mask=mask, position_ids=places(mask)).logits
    assert_same(make_sparse(model)(x, attention_mask=mask, position_ids=places(mask)).logits, wanted, mask)


@pytest.mark.parametrize("length", (1, 2, 7, 8, 9, 10))
@families
def test_lengths_around_k(family, length):
    """Up to index_topk = 8 tokens attention is dense."""
    model, x = tiny(family), tokens(length=length)
    wanted = model(x).logits
    assert_same(make_sparse(model)(x).logits, wanted)


@families
def test_padding_in_dense_attention(family):
    model, x, mask = tiny(family, index_topk=64), tokens(), padded("left")
    wanted = model(x, attention_mask=mask).logits
    assert_same(make_sparse(model)(x, attention_mask=mask).logits, wanted, mask)


@families
def test_few_queries_at_once(family, monkeypatch):
    """Queries in blocks of 7, and blocks of whole sequences."""
    model, x, mask = tiny(family), tokens(B=3), torch.ones(3, T)
    mask[1, :5] = 0
    wanted = model(x, attention_mask=mask).logits
    make_sparse(model)
    for queries in (7, 2 * T):
        numbers = queries * model.model.layers[0].self_attn._numbers_a_query()
        monkeypatch.setattr(sparse, "NUMBERS_AT_ONCE", numbers)
        assert_same(model(x, attention_mask=mask).logits, wanted, mask)


@pytest.mark.parametrize("given", ("bool", "float", "infinite", "of one batch"))
@families
def test_masks_of_rank_four(family, given):
    model, x, mask = tiny(family), tokens(), padded("holes")
    four = causal(mask)
    if given == "of one batch":
        mask[:], four = 1, causal(mask[:1] * 0 + 1)
    if given in ("float", "infinite"):
        lowest = torch.finfo(torch.float32).min if given == "float" else -torch.inf
        four = torch.zeros(four.shape).masked_fill(~four, lowest)
    wanted = model(x, attention_mask=mask).logits
    assert_same(make_sparse(model)(x, attention_mask=four).logits, wanted, mask)


@families
def test_packed_sequences(family):
    model, x = tiny(family), tokens(B=1)
    positions = torch.cat((torch.arange(13), torch.arange(T - 13)))[None]
    wanted = model(x, position_ids=positions, use_cache=False).logits
    assert_same(wanted[:, 13:], model(x[:, 13:]).logits)
    make_sparse(model)
    assert_same(model(x, position_ids=positions, use_cache=False).logits, wanted)
    for more in ({}, {"use_cache": False, "attention_mask": torch.ones(1, T)}):
        with pytest.raises(ValueError, match="position_ids must count up: packed sequences need use_cache=False"):
            model(x, position_ids=positions, **more)


@pytest.mark.parametrize("pieces", ((40,), (39, 1), (1, 1, 38), (5, 17, 1, 17)))
@families
def test_continuing_from_a_cache(family, pieces):
    model, x, mask = tiny(family), tokens(), padded("left")
    wanted = model(x, attention_mask=mask, position_ids=places(mask)).logits
    make_sparse(model)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=T + 9)):
        parts, done = [], 0
        for n in pieces:
            now = slice(done, done + n)
            given = {"attention_mask": mask[:, : done + n], "position_ids": places(mask)[:, now]}
            parts.append(model(x[:, now], past_key_values=cache, **given).logits)
            done += n
        assert_same(torch.cat(parts, 1), wanted, mask)


GENERATIONS = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "chunked prefill": {"prefill_chunk_size": 7},
    "beams": {"num_beams": 3, "max_new_tokens": 10},
    "sampled": {"do_sample": True, "top_k": 5},
}


@pytest.mark.parametrize("how", GENERATIONS)
@families
def test_same_generations(family, how):
    model, x, mask = tiny(family), tokens(length=15), padded("left")[:, 5:20]
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False} | GENERATIONS[how]

    def generate():
        torch.manual_seed(0)
        return model.generate(x, **options)

    wanted = generate()
    make_sparse(model)
    assert torch.equal(generate(), wanted)


@families
def test_generation_goes_on_after_an_answer(family):
    """Two turns of a conversation on one cache, the second padded on its left: the cache has holes."""
    model, x = tiny(family), tokens(length=30)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :4] = mask[1, 20:23] = 0

    def turns():
        cache = DynamicCache(config=model.config)
        first = model(x[:, :20], attention_mask=mask[:, :20], past_key_values=cache, position_ids=places(mask)[:, :20])
        given = {"attention_mask": mask, "position_ids": places(mask)[:, 20:]}
        return torch.cat((first.logits, model(x[:, 20:], past_key_values=cache, **given).logits), 1)

    wanted = turns()
    make_sparse(model)
    assert_same(turns(), wanted, mask)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_rope_has_the_bits_of_transformers(dtype):
    """Rounded otherwise, an indexer's keys select other tokens; fused products would be noticed here."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 50, 4, 16, generator=draw).to(dtype)
    angles = torch.randn(2, 50, 8, generator=draw).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    turns = {True: modeling_deepseek_v32.apply_rotary_pos_emb}
    turns[False] = modeling_deepseek_v32.apply_rotary_pos_emb_interleave
    for half_split, theirs in turns.items():
        wanted, _ = theirs(x, x, cos, sin, unsqueeze_dim=2)
        assert torch.equal(sparse.turn(x, cos[:, :, None], sin[:, :, None], half_split), wanted)
        assert not torch.equal(sparse.turn(x, cos[:, :, None], sin[:, :, None], not half_split), wanted)


@families
def test_bfloat16(family):
    """bf16 rounds what is scored, and absorbed products are rounded elsewhere: most tokens agree to a few percent."""
    model, x = tiny(family, torch_dtype=torch.bfloat16).to(torch.bfloat16), tokens(length=30)
    wanted = model(x).logits.float()
    got = make_sparse(model)(x).logits
    assert got.dtype == torch.bfloat16
    off = (got.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert off.median() < 0.03
    wrong = make_sparse(model, index_fp8=True)(x).logits.float()
    assert ((wrong - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median() > off.median()


@pytest.mark.parametrize("checkpointing", (False, True))
@families
def test_gradients(family, checkpointing):
    model, x, mask = tiny(family).train().requires_grad_(True), tokens(), padded("right")
    labels = x.masked_fill(mask == 0, -100)

    def gradients():
        model.zero_grad()
        loss = model(x, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    loss, wanted = gradients()
    make_sparse(model)
    if checkpointing:
        model.activation_checkpointing_enable()
    sparse_loss, got = gradients()
    assert torch.allclose(sparse_loss, loss, rtol=1e-5)
    assert got.keys() == wanted.keys()
    assert not any("indexer" in name for name in got)
    for name in got:
        assert (got[name] - wanted[name]).abs().max() < 1e-4 * wanted[name].abs().max() + 1e-9, name


@families
def test_compiled_decode_steps(family):
    """A whole graph of a decode step on a static cache, with the operators in it."""
    model, x = make_sparse(tiny(family, **FEWER[family])), tokens(length=T)
    wanted = model(x).logits
    cache = StaticCache(config=model.config, max_cache_len=T + 4)
    model(x[:, :-2], past_key_values=cache)
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    for t in (T - 2, T - 1):
        given = {"attention_mask": torch.ones(2, t + 1), "position_ids": torch.full((2, 1), t)}
        assert_same(step(x[:, t : t + 1], past_key_values=cache, **given).logits, wanted[:, t : t + 1])
    torch._dynamo.reset()


@families
def test_saved_as_before(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path / "before")
    make_sparse(model, index_fp8=True).save_pretrained(tmp_path / "sparse")
    before, after = ({p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("before", "sparse"))
    assert after == before
    loaded = type(model).from_pretrained(tmp_path / "sparse")
    assert loaded.config._attn_implementation != "dsa"
    x = tokens()
    wanted = loaded.eval()(x).logits
    assert_same(make_sparse(loaded)(x).logits, wanted)


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))))
@families
def test_copies(family, copied):
    model, x = make_sparse(tiny(family)), tokens()
    twin = copied(model)
    assert_same(twin(x).logits, model(x).logits)
    undo_sparse(twin)  # and the original stays sparse
    assert type(twin.model.layers[0].self_attn) is not type(model.model.layers[0].self_attn)
    assert model.config._attn_implementation == "dsa" and twin.config._attn_implementation == "eager"
    assert_same(twin(x).logits, model(x).logits)


@families
def test_undone_and_switched(family):
    model, x = tiny(family, "sdpa"), tokens()
    classes = [type(module) for module in model.modules()]
    state = [sorted(vars(module)) for module in model.modules()]
    wanted = model(x).logits
    make_sparse(make_sparse(model), index_fp8=True)
    assert not torch.equal(model(x).logits, wanted)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(x).logits, wanted)
    model.set_attn_implementation("dsa")
    assert not torch.equal(model(x).logits, wanted)
    undo_sparse(model)
    assert model.config._attn_implementation == "sdpa"
    assert [type(module) for module in model.modules()] == classes
    assert [sorted(vars(module)) for module in model.modules()] == state
    assert torch.equal(model(x).logits, wanted)


class Adapted(torch.nn.Module):
    """A LoRA adapter around a linear layer, as PEFT puts one."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base
        self.a = torch.nn.Linear(base.in_features, rank, bias=False)
        self.b = torch.nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


class InInt8(torch.nn.Module):
    """A linear layer whose weights are eight bits and a scale a row."""

    def __init__(self, base):
        super().__init__()
        scale = base.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (base.weight / scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.weight.float() * self.scale).T


@pytest.mark.parametrize("wrapped", (Adapted, InInt8))
@families
def test_adapters_and_quantised_weights(family, wrapped):
    """Of every linear layer in attention, and of kv_b_proj, which is absorbed, among them."""
    model, x = tiny(family), tokens()
    plain = model(x).logits
    for layer in model.model.layers:
        attention = layer.self_attn
        for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
            setattr(attention, name, wrapped(getattr(attention, name)).requires_grad_(False))
    wanted = model(x).logits
    assert (wanted - plain).abs().max() > 1e-3 * plain.abs().max()
    assert_same(make_sparse(model)(x).logits, wanted)


@families
def test_fp8_changes_few_keys(family, monkeypatch):
    """Of what the first layer selects: most keys stay, some do not."""
    model, x, own, chosen = tiny(family), tokens(length=200), sparse.SparseAttention._select, []
    monkeypatch.setattr(sparse.SparseAttention, "_select", lambda *args: chosen.append(own(*args)) or chosen[-1])
    firsts = []
    for index_fp8 in (False, True):
        chosen.clear()
        make_sparse(model, index_fp8=index_fp8)(x)
        firsts.append(chosen[0][:, 8:].flatten(0, 1).tolist())
    shared = [len({*plain} & {*fp8}) / SIZES["index_topk"] for plain, fp8 in zip(*firsts, strict=True)]
    assert 0.9 < sum(shared) / len(shared) < 1


@families
def test_fp8_decodes_as_it_prefills(family, monkeypatch):
    """Few queries score the same numbers in floats that many score in FP8."""
    model, x = make_sparse(tiny(family), index_fp8=True), tokens()
    wanted = model(x).logits
    monkeypatch.setattr(sparse, "FEW_QUERIES", 10)
    assert_same(model(x).logits, wanted)
    cache = DynamicCache(config=model.config)
    parts = [model(x[:, t : t + 1], past_key_values=cache).logits for t in range(T)]
    assert_same(torch.cat(parts, 1), wanted)


@families
def test_kernels(family, monkeypatch):
    """Through `dsa_kernels`, interpreted where there is no GPU: prefill, and decode from its cache."""
    dsa_kernels = pytest.importorskip("dsa_kernels", reason="no triton here")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, x = tiny(family).to(device), tokens(length=12).to(device)
    wanted = model(x).logits
    assert_same(make_sparse(model, ops=dsa_kernels)(x).logits, wanted)
    cache = DynamicCache(config=model.config)
    parts = [model(x[:, part], past_key_values=cache).logits for part in (slice(11), slice(11, 12))]
    assert_same(torch.cat(parts, 1), wanted)
    called = []
    monkeypatch.setattr(dsa_ref, "sparse_attention", lambda *args: called.append(args))
    make_sparse(model, ops=dsa_kernels, index_fp8=True)(x)
    assert not called


@pytest.mark.parametrize("index_fp8", (False, True))
@families
def test_gradients_of_kernels(family, index_fp8):
    dsa_kernels = pytest.importorskip("dsa_kernels", reason="no triton here")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, x = tiny(family).train().requires_grad_(True).to(device), tokens(length=12).to(device)
    results = []
    for ops in (dsa_ref, dsa_kernels):
        model.zero_grad()
        make_sparse(model, ops=ops, index_fp8=index_fp8)(x, labels=x, use_cache=False).loss.backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    wanted, got = results
    assert got.keys() == wanted.keys()
    for name in got:
        assert (got[name] - wanted[name]).abs().max() < 1e-4 * wanted[name].abs().max() + 1e-9, name


MUTANTS = {
    "one key too few": ("_select", lambda own: lambda self, *args: own(self, *args)[..., :-1]),
    "keys in order of place": (
        "_select",
        lambda own: lambda self, x, q, keys, *args: torch.arange(8, dtype=torch.int32).expand(*x.shape[:2], 8),
    ),
    "no scale of YaRN's": ("_queries", lambda own: lambda self, *args: tuple(part * 1.01 for part in own(self, *args))),
    "W_UK for W_UV": ("_up_projections", lambda own: lambda self, *args: own(self, *args)[::-1]),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_layer_is_noticed(mutant, monkeypatch):
    model, x = tiny("deepseek_v32"), tokens()
    wanted = model(x).logits
    name, change = MUTANTS[mutant]
    monkeypatch.setattr(sparse.SparseAttention, name, change(getattr(sparse.SparseAttention, name)))
    with pytest.raises(AssertionError, match="differs by"):
        assert_same(make_sparse(model)(x).logits, wanted)
