"""A layer in the surroundings that users put it in: autocast, other precisions and default dtypes, inference mode,
weights that come later, another thread. What the contract computes is the same; weight products are autocast's."""

import contextlib
import copy
import dataclasses
import threading

import pytest
import torch
from inputs import assert_close, normal
from torch.nn import functional as F

import dsa_ref
from dsa_ref import TINY, DSALayer, LayerCache, index_scores, indexer_loss, load_layer, precision, select_topk
from dsa_ref.nn import ModelConfig, SmallModel, load_small_model, save_checkpoint
from dsa_ref.nn.model import save_small_model
from dsa_ref.training.evaluate import attention_weights, held_out_windows, recall_by_method, selected_weights

T = 24
FP8 = pytest.mark.parametrize("fp8", (True, False))
ATTENTION = pytest.mark.parametrize("attention", ("sparse", "mha", "dense"))


def make_layer(fp8=True, ops=dsa_ref, device="cpu"):
    layer = DSALayer(dataclasses.replace(TINY, index_fp8=fp8), ops).requires_grad_(False)
    for i, parameter in enumerate(layer.parameters()):
        parameter.copy_(normal(*parameter.shape, seed=i) * 0.3)
    return layer.to(device)


def tokens(device="cpu"):
    return normal(T, TINY.dim).to(device), torch.arange(T, device=device)


def autocast(device):
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def make_model():
    torch.manual_seed(0)
    return SmallModel(ModelConfig(2, 96, attention=dataclasses.replace(TINY, index_fp8=False)))


@pytest.mark.rungs("reference", "kernels")
@FP8
@ATTENTION
def test_autocast_shortens_weight_products_alone(ops, device, fp8, attention):
    """Near the answer of fp32; a linear layer's dtype; and the recorded step is what the steps make of its inputs."""
    layer, (x, positions), record = make_layer(fp8, ops, device), tokens(device), []
    wanted = layer(x, positions, attention="dense")
    with autocast(device):
        y = layer(x, positions, attention=attention, record=record)
        dense = layer(x, positions, attention="dense")
        narrow = layer(x.bfloat16(), positions, attention=attention)  # what an autocast layer before it gives
    assert y.dtype == narrow.dtype == torch.bfloat16
    assert (dense - wanted).norm() < 0.03 * wanted.norm()
    assert (y - wanted)[:8].norm() < 0.03 * wanted[:8].norm()  # up to k = 8 keys there is nothing to choose
    (step,) = record
    assert step["w"].dtype == step["lse"].dtype == torch.float32
    if not fp8 and attention != "dense":
        scores = index_scores(step["q_idx"], step["k_idx"], step["w"], step["k_scale"])
        same = (select_topk(scores, 8).sort()[0] == step["indices"].sort()[0]).all(dim=1)
        assert same.all() if ops is dsa_ref else same.float().mean() > 0.9


@pytest.mark.parametrize("fp8", (True, False))
def test_head_weights_and_norms_are_fp32_inside_autocast(fp8):
    """Each to fp32's precision, from the same inputs; in bf16 they would be off by 1e-3."""
    layer, (x, _) = make_layer(fp8), tokens()
    outside = layer.indexer(x, normal(T, TINY.q_lora_rank))[2]
    norm = layer.q_a_layernorm(normal(T, TINY.q_lora_rank))
    with autocast("cpu"):
        assert torch.equal(layer.indexer(x, normal(T, TINY.q_lora_rank))[2], outside)
        assert torch.equal(layer.q_a_layernorm(normal(T, TINY.q_lora_rank)), norm)


@FP8
@ATTENTION
@pytest.mark.parametrize("held", (torch.float32, torch.bfloat16))
@torch.no_grad()
def test_caches_inside_autocast(fp8, attention, held):
    """A cache of autocast's dtype or a wider one: the same numbers as without a cache, bit for bit where dtypes are."""
    layer, (x, positions) = make_layer(fp8), tokens()
    cache = LayerCache(layer.config, T, held)
    with autocast("cpu"):
        whole = layer(x, positions, attention=attention)
        parts = [layer(x[i : i + 8], positions[i : i + 8], cache, attention) for i in range(0, T, 8)]
    assert cache.length == T
    assert (torch.cat(parts) - whole).norm() < (1e-6 if held == torch.bfloat16 else 5e-3) * whole.norm()


@torch.no_grad()
def test_a_cache_that_is_filled_outside_autocast_goes_on_inside():
    layer, (x, positions) = make_layer(False), tokens()
    for attention in ("sparse", "mha", "dense"):
        cache = LayerCache(layer.config, T)
        before = layer(x, positions, attention=attention)
        first = layer(x[:16], positions[:16], cache, attention)
        with autocast("cpu"):
            rest = layer(x[16:], positions[16:], cache, attention)
        assert_close(first, before[:16], 1e-5)
        assert (rest - before[16:]).norm() < 0.1 * before[16:].norm()


@torch.no_grad()
def test_a_cache_that_cannot_hold_what_autocast_gives_is_refused():
    layer, (x, positions) = make_layer(False), tokens()
    for held in ("float16", "float64"):
        cache = LayerCache(layer.config, T, getattr(torch, held))
        with autocast("cpu"), pytest.raises(TypeError, match=f"kv must have dtype {held}, got bfloat16"):
            layer(x, positions, cache)
        assert cache.length == 0
    with pytest.raises(TypeError, match="kv must have dtype float64"):  # outside, a wider cache is a mistake
        layer(x, positions, LayerCache(layer.config, T, torch.float64))


def test_training_inside_autocast():
    """Both losses, sparse: gradients near those of fp32, the indexer's from its own loss alone."""
    gradients = []
    for context in (contextlib.nullcontext(), autocast("cpu")):
        model, text, record = make_model(), torch.arange(T + 1) * 7 % 256, []
        with context:
            logits = model(text[:-1], record=record)
            language = F.cross_entropy(logits, text[1:])
            scale = model.config.attention.softmax_scale
            steps = [[s[name] for name in ("q_idx", "k_idx", "w", "q", "kv")] + [scale, s["indices"]] for s in record]
            (language + sum(indexer_loss(*step) for step in steps)).backward()
        assert logits.dtype == torch.float32
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    exact, cast = gradients
    for name in exact:
        assert exact[name].any(), name
        assert cast[name].dtype == torch.float32
        cosine = F.cosine_similarity(exact[name].flatten(), cast[name].flatten(), dim=0)
        assert cosine > (0.7 if ".indexer." in name else 0.98), (name, cosine)


@torch.no_grad()
def test_precision_of_products_changes_no_head_weight_and_no_selection():
    """At "medium", a CPU that can multiply bf16 does so; on others nothing could change."""
    layer, (x, positions) = make_layer(False), tokens()
    latent, old = normal(T, TINY.q_lora_rank), torch.get_float32_matmul_precision()
    wanted, record = layer.indexer(x, latent)[2], []
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(layer.indexer(x, latent)[2], wanted)
        layer(x, positions, record=record)
        assert torch.get_float32_matmul_precision() == "medium"  # and it is the user's again
    finally:
        torch.set_float32_matmul_precision(old)
    (step,) = record
    scores = index_scores(step["q_idx"], step["k_idx"], step["w"])
    assert torch.equal(select_topk(scores, 8), step["indices"])


@contextlib.contextmanager
def default_dtype(dtype):
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(old)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_default_dtype(dtype, tmp_path):
    """It is the dtype of new weights, as in torch, and of nothing else: not of a loaded model, RoPE or a cache."""
    layer, (x, positions), text = make_layer(), tokens(), torch.arange(T)
    wanted, model = layer(x, positions), load_small_model()
    logits = model(text)
    with default_dtype(dtype):
        assert torch.equal(layer(x, positions), wanted)
        assert torch.equal(copy.deepcopy(layer)(x, positions), wanted)
        loaded, new = load_small_model(), DSALayer(TINY)
        assert torch.equal(loaded(text), logits)
        save_small_model(loaded, tmp_path / "model.safetensors")
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        assert {p.dtype for p in new.parameters()} == {dtype} and torch.equal(new.freqs, layer.freqs)
        cache = LayerCache(layer.config, T)
        assert (cache.kv.dtype, cache.k_scale.dtype) == (torch.float32, torch.float32)
        assert torch.equal(layer(x, positions, cache), wanted)
    assert torch.equal(load_small_model(tmp_path / "model.safetensors")(text), logits)


def test_deterministic_algorithms():
    """Same bits, with gradients, and uninitialised memory that torch fills with NaN then does no harm."""
    results = []
    for wanted in (False, True):
        torch.use_deterministic_algorithms(wanted)
        try:
            model = make_model()
            logits = model(torch.arange(T) * 5 % 256)
            logits.square().mean().backward()
            results.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@FP8
def test_caches_made_and_filled_in_inference_mode_work_outside(fp8):
    layer, (x, positions) = make_layer(fp8), tokens()
    with torch.inference_mode():
        cache = LayerCache(layer.config, T)
        parts = [layer(x[:10], positions[:10], cache)]
    with torch.no_grad():
        parts.append(layer(x[10:15], positions[10:15], cache))
    with torch.inference_mode():
        parts.append(layer(x[15:], positions[15:], cache))
    assert_close(torch.cat([part.clone() for part in parts]), layer(x, positions), 1e-5)


def test_weights_that_come_later():
    """A layer made on the meta device, then given memory and weights: RoPE's frequencies are there as well."""
    layer, (x, positions) = make_layer(), tokens()
    with torch.device("meta"):
        empty = DSALayer(layer.config)
        assert empty.freqs.is_meta
        moved = copy.deepcopy(layer).to("cpu")  # a default device is for what is new, not for what is there
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(empty(x, positions), layer(x, positions))
    assert torch.equal(moved(x, positions), layer(x, positions))


def test_load_layer_under_a_default_device(tmp_path):
    """The checkpoint's tensors say where a layer is, and RoPE's frequencies are there too."""
    layer, (x, positions) = make_layer(), tokens()
    save_checkpoint(tmp_path, {0: layer}, fp8=False)
    with torch.device("meta"):
        loaded = load_layer(tmp_path, 0, layer.config, dtype=torch.float32)
    assert torch.equal(loaded(x, positions), layer(x, positions))


@torch.no_grad()
def test_recorded_attention_is_fp32_whatever_is_around(device):
    """The measures of an indexer: weights sum to 1 within fp32's rounding, from bf16 records as well."""
    model, text = make_model().to(device), torch.arange(T, device=device) * 7 % 256
    scale = model.config.attention.softmax_scale
    for context in (contextlib.nullcontext(), autocast(device)):
        steps = {"dense": [], "sparse": []}
        with context:
            for attention, record in steps.items():
                model(text, attention=attention, record=record)
            weights = attention_weights(steps["dense"][0], scale)
            kept = selected_weights(steps["sparse"][0], T - 1, scale)
        assert weights.dtype == kept.dtype == torch.float32
        assert_close(weights.sum(dim=1), torch.ones(T), 1e-5)
        assert kept.sum().item() == pytest.approx(1, abs=1e-5)


def test_recall_does_not_follow_the_default_dtype():
    model, windows = load_small_model(), torch.arange(2 * 65).reshape(2, 65).to(torch.uint8)
    wanted = recall_by_method(model, windows, [4, 16])
    starts = held_out_windows(torch.arange(200_000).to(torch.uint8), 7, 64)
    with default_dtype(torch.bfloat16):
        assert recall_by_method(model, windows, [4, 16]) == wanted
        assert torch.equal(held_out_windows(torch.arange(200_000).to(torch.uint8), 7, 64), starts)


def test_threads_in_and_out_of_autocast_do_not_disturb_each_other():
    """The precision of products is one setting for all threads: exact while any of them is inside a step, then back."""
    layer, (x, _) = make_layer(), tokens()
    latent, wrong = normal(T, TINY.q_lora_rank), []
    wanted, old = layer.indexer(x, latent)[2], torch.get_float32_matmul_precision()

    def work(cast):
        for _ in range(50):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                if not torch.equal(layer.indexer(x, latent)[2], wanted):
                    wrong.append(cast)

    torch.set_float32_matmul_precision("medium")
    settings = [getattr(owner, name) for owner, name, _ in precision.SWITCHES]
    try:
        threads = [threading.Thread(target=work, args=(number % 2 == 0,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert [getattr(owner, name) for owner, name, _ in precision.SWITCHES] == settings
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(old)


@pytest.mark.parametrize("where", ("before", "after"))
def test_an_interrupt_of_the_guard_leaves_no_step_unguarded(where, monkeypatch):
    """However it leaves: the next step is exact again, and the program's setting comes back after it."""

    class Interrupted:
        def __init__(self):
            self.__dict__["value"], self.__dict__["armed"] = "short", True

        def __setattr__(self, key, value):
            if key == "value" and self.armed and where == "before":
                self.__dict__["armed"] = False
                raise KeyboardInterrupt
            self.__dict__[key] = value
            if key == "value" and self.armed:
                self.__dict__["armed"] = False
                raise KeyboardInterrupt

    switch = Interrupted()
    monkeypatch.setattr(precision, "SWITCHES", ((switch, "value", "full"),))
    with pytest.raises(KeyboardInterrupt), precision.exact_arithmetic():
        pass
    with precision.exact_arithmetic():
        assert switch.value == "full"
    assert switch.value == "short"
