"""A call that fails or is interrupted changes nothing: no cache, no record, in no layer; and tokens are taken back."""

import dataclasses

import pytest
import torch
from inputs import assert_close, normal

import dsa_ref
from dsa_ref import TINY, DSALayer, LayerCache, unchecked_values
from dsa_ref.nn import ModelConfig, SmallModel, truncate_caches

T = 24
RUNGS = pytest.mark.rungs("reference", "kernels")
MODES = pytest.mark.parametrize("attention", ("sparse", "mha", "dense"))
FP8 = pytest.mark.parametrize("fp8", (True, False))


def make_layer(ops=dsa_ref, device="cpu", fp8=True, **changes):
    layer = DSALayer(dataclasses.replace(TINY, index_fp8=fp8, **changes), ops).requires_grad_(False)
    for i, parameter in enumerate(layer.parameters()):
        parameter.copy_(normal(*parameter.shape, seed=i) * 0.3)
    return layer.to(device)


def make_model(device="cpu", n_layers=3):
    torch.manual_seed(0)
    config = ModelConfig(n_layers, 96, attention=dataclasses.replace(TINY, index_fp8=False))
    model = SmallModel(config).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.2)
    return model.to(device)


def tokens(device="cpu"):
    return normal(T, TINY.dim).to(device), torch.arange(T, device=device)


def contents(cache):
    """What the cache holds, as bytes."""
    held = (tensor[: cache.length].view(torch.uint8) for tensor in (cache.kv, cache.k_idx, cache.k_scale))
    return [cache.length, *(tensor.tolist() for tensor in held)]


@RUNGS
@FP8
@pytest.mark.parametrize("cached", (True, False))
@pytest.mark.parametrize("name", ("q_a_proj", "indexer.wk"))
def test_nan_of_a_row_that_is_not_scored(ops, device, name, cached, fp8):
    """The indexer refuses it as it refuses a scored one's."""
    layer, (x, positions) = make_layer(ops, device, fp8, index_topk=64), tokens(device)
    bad = torch.zeros(T, 1, device=device).index_fill_(0, torch.tensor([5], device=device), torch.nan)
    cache = LayerCache(layer.config, T, device=device) if cached else None
    handle = layer.get_submodule(name).register_forward_hook(lambda _, __, out: out + bad)
    with pytest.raises(ValueError, match="NaN"):
        layer(x, positions, cache)
    handle.remove()
    assert cache is None or cache.length == 0
    assert layer(x, positions, cache).isfinite().all()


@RUNGS
@FP8
def test_a_token_of_nan(ops, device, fp8):
    """The step raises where the indexer meets it; the cache goes on as if it had never come."""
    layer, (x, positions) = make_layer(ops, device, fp8), tokens(device)
    wanted, cache, record = layer(x, positions), LayerCache(layer.config, T, device=device), []
    layer(x[:10], positions[:10], cache, record=record)
    before, bad = contents(cache), x[10:11] * torch.nan
    for _ in range(2):
        with pytest.raises(ValueError, match="NaN"):
            layer(bad, positions[10:11], cache, record=record)
        assert contents(cache) == before and len(record) == 1
    assert_close(layer(x[10:], positions[10:], cache, record=record), wanted[10:], 1e-4)
    assert (cache.length, len(record)) == (T, 2)


@MODES
@FP8
@pytest.mark.parametrize("indexer", (True, False))
@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
def test_no_cache_keeps_a_token_that_is_not_finite(attention, fp8, indexer, value):
    """In every mode alike, with an indexer and without: later tokens would see its row, and be NaN for ever."""
    config = dataclasses.replace(TINY, index_fp8=fp8)
    layer, (x, positions) = DSALayer(config, indexer=indexer).requires_grad_(False), tokens()
    shared = torch.arange(T, dtype=torch.int32)[:, None] if not indexer and attention != "dense" else None

    def run(x, rows, **options):
        chosen = None if shared is None else shared[rows]
        return layer(x, positions[rows], attention=attention, indices=chosen, **options)

    wanted, cache, record = run(x, slice(T)), LayerCache(config, T, indexer=indexer), []
    run(x[:10], slice(10), cache=cache, record=record)
    bad = x[10:13].clone()
    bad[1, 0] = value
    kept = cache.kv.clone()
    with pytest.raises(ValueError, match="NaN"):
        run(bad, slice(10, 13), cache=cache, record=record)
    assert cache.length == 10 and len(record) == 1 and torch.equal(cache.kv, kept)
    assert_close(run(x[10:], slice(10, T), cache=cache), wanted[10:], 1e-4)


@MODES
def test_an_overflow_is_kept_by_no_cache(attention):
    """Weights that are too large for fp16 make rows of infinity out of finite tokens."""
    layer, (x, positions) = make_layer(fp8=False).half(), tokens()
    layer.kv_a_proj_with_mqa.weight.fill_(6e4)
    cache = LayerCache(layer.config, T, torch.float16)
    with pytest.raises(ValueError, match="kv must be finite, got NaN or infinity"):
        layer(x.half(), positions, cache, attention)
    assert cache.length == 0 and not cache.kv.any()


@pytest.mark.parametrize("name", ("kv", "k_idx", "k_scale"))
@FP8
def test_rows_that_are_not_finite_are_refused_by_the_cache_itself(fp8, name):
    config = dataclasses.replace(TINY, index_fp8=fp8)
    cache = LayerCache(config, T, torch.float64)  # finite in fp64 is finite, also beyond fp32
    rows = {"kv": torch.full((3, 40), 1e300, dtype=torch.float64), "k_idx": torch.ones(3, 16), "k_scale": torch.ones(3)}
    rows["k_idx"] = rows["k_idx"].to(torch.float8_e4m3fn if fp8 else torch.float64)
    if not fp8:
        rows["k_scale"] = None
    cache.append(**rows)
    if rows[name] is not None:
        bad = rows[name].double().clone()
        bad.view(-1)[-1] = torch.nan
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            cache.append(**rows | {name: bad.to(rows[name].dtype)})
        assert cache.length == 3
        with unchecked_values():  # on request, as in a CUDA graph
            cache.append(**rows | {name: bad.to(rows[name].dtype)})


@MODES
@pytest.mark.parametrize("name", ("kv_a_layernorm", "indexer.weights_proj", "kv_b_proj", "o_proj"))
@pytest.mark.parametrize("error", (KeyboardInterrupt, RuntimeError))
def test_a_layer_that_is_interrupted(error, name, attention):
    layer, (x, positions), armed = make_layer(), tokens(), [False]

    def interrupt(*args):
        if armed[0]:
            raise error("now")

    layer.get_submodule(name).register_forward_hook(interrupt)
    wanted, cache, record = layer(x, positions, attention=attention), LayerCache(layer.config, T), []
    layer(x[:10], positions[:10], cache, attention, record)
    before, armed[0] = contents(cache), True
    with pytest.raises(error, match="now"):
        layer(x[10:], positions[10:], cache, attention, record)
    assert contents(cache) == before and len(record) == 1
    armed[0] = False
    assert_close(layer(x[10:], positions[10:], cache, attention, record), wanted[10:], 1e-5)


@pytest.mark.parametrize("where", ("embed", "layers.0.mlp_norm", "layers.2.self_attn.o_proj", "layers.2", "norm"))
def test_a_model_that_is_interrupted(device, where):
    """All layers or none, wherever it happens; decoding goes on to the same logits."""
    model, text, armed = make_model(device), torch.arange(T, device=device) * 7 % 256, [False]

    def interrupt(*args):
        if armed[0]:
            raise KeyboardInterrupt

    model.get_submodule(where).register_forward_hook(interrupt)
    caches, record = model.new_caches(T), []
    wanted = model(text)
    model(text[:16], caches=caches, record=record)
    before, armed[0] = [contents(cache) for cache in caches], True
    with pytest.raises(KeyboardInterrupt):
        model(text[16:], caches=caches, record=record)
    assert [contents(cache) for cache in caches] == before and len(record) == 3
    armed[0] = False
    assert_close(model(text[16:], caches=caches, record=record), wanted[16:], 1e-3)


def test_a_nan_in_a_later_layer():
    model, text = make_model(), torch.arange(T) * 7 % 256
    caches, record = model.new_caches(T), []
    model(text[:16], caches=caches)
    model.layers[1].down_proj.weight[0, 0] = torch.nan  # layer 2 meets it
    with pytest.raises(ValueError, match="NaN"):
        model(text[16:17], caches=caches, record=record)
    assert [cache.length for cache in caches] == [16, 16, 16] and record == []


@RUNGS
@FP8
def test_truncated_caches_go_on_as_if_nothing_had_been_guessed(ops, device, fp8):
    """Speculative decoding: guesses after token 10 are taken back, and the true tokens give what they give at once."""
    layer, (x, positions) = make_layer(ops, device, fp8), tokens(device)
    wanted, cache = layer(x, positions), LayerCache(layer.config, T, device=device)
    layer(x[:10], positions[:10], cache)
    before = contents(cache)
    layer(-3 * x[10:18], positions[10:18], cache)
    cache.truncate(10)
    assert contents(cache) == before
    assert_close(layer(x[10:], positions[10:], cache), wanted[10:], 1e-4)
    cache.truncate(0)
    assert_close(layer(x, positions, cache), wanted, 1e-4)


def test_all_caches_of_a_model_are_truncated_or_none():
    model, text = make_model(), torch.arange(T) * 7 % 256
    wanted, caches = model(text), model.new_caches(T)
    model(text[:16], caches=caches)
    model(text[16:20] + 1, caches=caches)
    truncate_caches(caches, 16)
    assert [cache.length for cache in caches] == [16, 16, 16]
    assert_close(model(text[16:], caches=caches), wanted[16:], 1e-3)
    caches[2].truncate(5)
    with pytest.raises(ValueError, match=r"length must be in \[0, 5\]"):
        truncate_caches(caches, 16)
    assert [cache.length for cache in caches] == [T, T, 5]
    truncate_caches((cache for cache in caches), 4)
    assert [cache.length for cache in caches] == [4, 4, 4]


def test_lengths_that_no_cache_can_have():
    cache = LayerCache(TINY, T)
    layer, (x, positions) = make_layer(), tokens()
    layer(x[:5], positions[:5], cache)
    for length, error in ((6, ValueError), (-1, ValueError), (True, TypeError), (2.0, TypeError), (None, TypeError)):
        with pytest.raises(error, match="length must"):
            cache.truncate(length)
        with pytest.raises(error, match="length must"):
            truncate_caches([cache], length)
        assert cache.length == 5


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"kv_lora_rank": 16}, ValueError, r"cache must have rows of \(40, 16\).* got \(24, 16\)"),
        ({"index_head_dim": 32}, ValueError, r"cache must have rows of \(40, 16\).* got \(40, 32\)"),
        ({"kv_lora_rank": 1, "qk_rope_head_dim": 2, "index_head_dim": 2}, ValueError, "cache must have rows of"),
        ({"index_fp8": False}, TypeError, "cache must be made for index_fp8 = True"),
    ],
)
def test_another_layers_cache_is_refused_before_anything_is_written(changes, error, message):
    layer, (x, positions) = make_layer(), tokens()
    cache = LayerCache(dataclasses.replace(TINY, **changes), T)
    with pytest.raises(error, match=message):
        layer(x, positions, cache)
    assert cache.length == 0 and not cache.kv.any() and not cache.k_idx.float().any()


def test_caches_that_do_not_fit_are_refused_before_anything_is_written():
    layer, (x, positions) = make_layer(), tokens()
    for cache, error, message in (
        (LayerCache(TINY, T - 1), ValueError, "cache must hold 24 tokens, got a capacity of 23"),
        (LayerCache(TINY, T, torch.bfloat16), TypeError, "kv must have dtype bfloat16, got float32"),
        (LayerCache(TINY, T, device="meta"), ValueError, "cache must be on cpu like x, got meta"),
        ([LayerCache(TINY, T)], TypeError, "cache must be a LayerCache, got list"),
    ):
        with pytest.raises(error, match=message):
            layer(x, positions, cache)
        if isinstance(cache, LayerCache) and cache.kv.device.type == "cpu":
            assert cache.length == 0 and not cache.kv.any()
    with pytest.raises(TypeError, match="dtype must be"):
        LayerCache(TINY, T, torch.int32)


def test_a_models_caches_are_one_a_layer():
    model, text = make_model(), torch.arange(T) * 7 % 256
    caches = model.new_caches(T)
    model(text[:4], caches=caches)
    shorter, longer = model.new_caches(T), make_model(n_layers=4).new_caches(T)
    model(text[:3], caches=shorter)
    for wrong, error, message in (
        ([], ValueError, "caches must be 3 distinct ones, one a layer, got 0"),
        (caches[:2], ValueError, "caches must be 3 distinct ones, one a layer, got 2"),
        (longer, ValueError, "caches must be 3 distinct ones, one a layer, got 4"),
        ([caches[0]] * 3, ValueError, "caches must be 3 distinct ones, one a layer, got 1"),
        ([caches[0], shorter[1], caches[2]], ValueError, r"caches must hold the same tokens, got lengths \[4, 3, 4\]"),
        (caches[0], TypeError, "caches must be a list of LayerCache"),
        ([None] * 3, TypeError, "caches must be a list of LayerCache"),
    ):
        with pytest.raises(error, match=message):
            model(text[4:6], caches=wrong)
        assert [cache.length for cache in caches] == [4, 4, 4]
    small = [*model.new_caches(T)[:2], LayerCache(model.config.attention, 3)]
    with pytest.raises(ValueError, match="cache must hold 4 tokens, got a capacity of 3"):
        model(text[:4], caches=small)
    assert [cache.length for cache in small] == [0, 0, 0]


def test_rows_that_do_not_fit_are_refused_by_the_cache_itself():
    """A row of one would be spread over the whole width, and FP8 keys without scales would count with scale 1."""
    cache = LayerCache(TINY, T)
    kv, k_idx, k_scale = torch.ones(3, 40), torch.ones(3, 16).to(torch.float8_e4m3fn), torch.ones(3)
    for args, error, message in (
        ((kv[:, :1], k_idx, k_scale), ValueError, "kv must have rows of 40, got 1"),
        ((kv, k_idx[:, :1], k_scale), ValueError, "k_idx must have rows of 16, got 1"),
        ((kv[:2], k_idx, k_scale), ValueError, "k_idx must have .* T = 2"),
        ((kv, k_idx, k_scale[:1]), ValueError, "k_scale must have .* T = 3"),
        ((kv, k_idx, None), ValueError, "k_scale must be given for FP8 keys"),
        ((kv, k_idx, k_scale.double()), TypeError, "k_scale must have dtype float32"),
        ((kv.double(), k_idx, k_scale), TypeError, "kv must have dtype float32"),
        ((kv.to("meta"), k_idx.to("meta"), k_scale.to("meta")), ValueError, "kv must be on cpu like the cache"),
    ):
        with pytest.raises(error, match=message):
            cache.append(*args)
        assert cache.length == 0 and not cache.kv.any()
    floats = LayerCache(dataclasses.replace(TINY, index_fp8=False), T)
    with pytest.raises(ValueError, match="k_scale must be None without FP8 keys"):
        floats.append(kv, torch.ones(3, 16), k_scale)
    kv_rows, keys, scales = cache.append(kv, k_idx, k_scale)
    assert (len(kv_rows), len(keys), len(scales), cache.length) == (3, 3, 3, 3)
