"""Modules that somebody wrapped: adapters, hooks, parametrisations and shards take effect wherever the layer uses a
weight, in every attention mode alike, or are refused by name. A plain layer's numbers do not change."""

import dataclasses

import pytest
import torch
from inputs import assert_close, normal
from torch import nn
from torch.nn.utils import parametrize

import dsa_ref
from dsa_ref import TINY, DSALayer, indexer_loss
from dsa_ref.nn import ModelConfig, SmallModel, save_checkpoint, wrapped
from dsa_ref.nn.model import save_small_model

T = 20
MODES = ("sparse", "mha", "dense")
LINEAR = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
INDEXER = ("indexer.wq_b", "indexer.wk", "indexer.weights_proj")


class LoRA(nn.Module):
    """What adapter libraries put around a linear layer; `weight` is the base's alone, or hidden."""

    def __init__(self, base, rank=2, seed=0, **options):
        super().__init__()
        self.base_layer = base
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.down = nn.Parameter(normal(rank, base.in_features, seed=seed).to(**like) * 0.3)
        self.up = nn.Parameter(normal(base.out_features, rank, seed=seed + 1).to(**like) * 0.3)

    def forward(self, x):
        return self.base_layer(x) + x @ self.down.T @ self.up.T

    def merged(self):
        return self.base_layer.weight + self.up @ self.down


class LoRAWithWeight(LoRA):
    weight = property(lambda self: self.base_layer.weight)  # as PEFT's layers show it


class Norm(nn.Module):
    """A norm with a trained gain around another one."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.gain = inner, nn.Parameter(torch.linspace(0.2, 2, inner.weight.numel()))

    def forward(self, x):
        return self.inner(x) * self.gain


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def make_layer(dtype=torch.float64, fp8=False, ops=dsa_ref, device="cpu"):
    layer = DSALayer(dataclasses.replace(TINY, index_fp8=fp8), ops).requires_grad_(False)
    for i, parameter in enumerate(layer.parameters()):
        parameter.copy_(normal(*parameter.shape, seed=i) * 0.3)
    return layer.to(device, dtype)


def run(layer, attention="sparse", seed=0):
    record, weight = [], layer.q_a_layernorm.weight
    x, positions = normal(T, TINY.dim, seed=seed).to(weight), torch.arange(T, device=weight.device)
    return layer(x, positions, attention=attention, record=record), record[0]


@pytest.mark.parametrize("attention", MODES)
@pytest.mark.parametrize("wrapper", (LoRA, LoRAWithWeight))
@pytest.mark.parametrize("name", LINEAR + INDEXER)
def test_an_adapter_counts_like_its_merged_weight(name, wrapper, attention):
    plain, wrapped = make_layer(), make_layer()
    adapter = wrapper(wrapped.get_submodule(name))
    wrapped.set_submodule(name, adapter)
    before, _ = run(plain, attention)
    plain.get_submodule(name).weight.copy_(adapter.merged())
    (wanted, wanted_step), (got, step) = run(plain, attention), run(wrapped, attention)
    assert_close(got, wanted, 1e-5)
    assert_close(step["w"], wanted_step["w"], 1e-5)
    if attention != "dense":
        assert torch.equal(step["indices"], wanted_step["indices"])
        assert (got - before).abs().max() > 1e-2
    elif name in INDEXER:
        assert torch.equal(got, before)


@pytest.mark.rungs("kernels")
@pytest.mark.parametrize("name", ("kv_b_proj", "indexer.weights_proj"))
def test_an_adapter_counts_on_every_rung(ops, device, name):
    layer, reference = make_layer(torch.float32, True, ops, device), make_layer(torch.float32, True)
    adapter = LoRA(layer.get_submodule(name))
    layer.set_submodule(name, adapter.requires_grad_(False))
    reference.get_submodule(name).weight.copy_(adapter.merged().detach())
    assert_close(run(layer)[0].cpu(), run(reference)[0], 1e-4)


def test_a_wrapped_key_norm_counts():
    plain, wrapped = make_layer(), make_layer()
    wrapped.indexer.k_norm = Norm(wrapped.indexer.k_norm.float())
    gain = wrapped.indexer.k_norm.gain.detach()
    for parameter in plain.indexer.k_norm.parameters():
        parameter.mul_(gain)
    (wanted, wanted_step), (got, step) = run(plain), run(wrapped)
    assert_close(step["k_idx"], wanted_step["k_idx"], 1e-5)
    assert torch.equal(step["indices"], wanted_step["indices"])
    assert_close(got, wanted, 1e-5)


@pytest.mark.parametrize("attention", MODES)
def test_adapters_learn(attention):
    """Gradients of an absorbed adapter, by finite differences; and the indexer's adapter learns from its loss."""
    layer = make_layer()
    adapter = layer.kv_b_proj = LoRA(layer.kv_b_proj)
    run(layer, attention)[0].square().sum().backward()
    for parameter in (adapter.down, adapter.up):
        place, sides, step = (1, 1), [], 1e-5
        for sign in (1, -1):
            with torch.no_grad():
                parameter[place] += sign * step
                sides.append(run(layer, attention)[0].square().sum().item())
                parameter[place] -= sign * step
        assert parameter.grad[place].item() == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-4)
    layer.indexer.weights_proj = adapter = LoRA(layer.indexer.weights_proj)
    _, step = run(layer, "dense")
    indexer_loss(*(step[name] for name in ("q_idx", "k_idx", "w", "q", "kv")), layer.config.softmax_scale).backward()
    assert adapter.down.grad.any() and adapter.up.grad.any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("fp8", (True, False))
@pytest.mark.parametrize("attention", MODES)
def test_a_hook_that_watches_fires_and_changes_no_bit(attention, fp8, dtype):
    layer, seen = make_layer(dtype, fp8), []
    wanted, _ = run(layer, attention)
    for name, module in layer.named_modules():
        if name:
            module.register_forward_hook(lambda module, args, output, name=name: seen.append(name))
            module.register_forward_pre_hook(lambda module, args, name=name: seen.append(name))
    got, _ = run(layer, attention)
    assert torch.equal(got, wanted)
    assert sorted(seen) == sorted(2 * [name for name, _ in layer.named_modules() if name])


@pytest.mark.parametrize("attention", MODES)
def test_a_hook_on_all_modules_of_the_program_fires(attention):
    layer, seen = make_layer(torch.bfloat16), set()
    wanted, _ = run(layer, attention)
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.add(module))
    try:
        got, _ = run(layer, attention)
    finally:
        hook.remove()
    assert torch.equal(got, wanted)
    assert seen == set(layer.modules())


def test_a_watched_bf16_layer_keeps_its_weights_and_their_dtype():
    layer = make_layer(torch.bfloat16)
    before = {name: (id(p), p.clone()) for name, p in layer.named_parameters()}
    for module in (layer.indexer.weights_proj, layer.indexer.k_norm):
        module.register_forward_hook(lambda *args: None)
    _, step = run(layer)
    assert step["w"].dtype == torch.float32
    assert all(id(p) == before[name][0] and torch.equal(p, before[name][1]) for name, p in layer.named_parameters())


@pytest.mark.parametrize("attention", MODES)
@pytest.mark.parametrize("name", ("kv_b_proj", "indexer.weights_proj"))
def test_hooks_and_parametrisations_that_change_a_module_take_effect(name, attention):
    plain = make_layer()
    plain.get_submodule(name).weight.mul_(2)
    wanted, wanted_step = run(plain, attention)
    for change in (
        lambda module: module.register_forward_hook(lambda module, args, output: 2 * output),
        lambda module: module.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        lambda module: parametrize.register_parametrization(module, "weight", Doubled()),
        lambda module: setattr(module, "forward", lambda x, weight=module.weight: 2 * x.to(weight) @ weight.T),
    ):
        layer = make_layer()
        change(layer.get_submodule(name))
        got, step = run(layer, attention)
        assert_close(got, wanted, 1e-5)
        assert_close(step["w"], wanted_step["w"], 1e-5)


def test_a_bias_is_not_dropped():
    """Where it cannot be absorbed it is refused by name; where it can take part it does."""
    layer = make_layer()
    layer.kv_b_proj.bias = nn.Parameter(torch.ones(layer.kv_b_proj.out_features, dtype=torch.float64))
    for attention in ("sparse", "dense"):
        with pytest.raises(ValueError, match="kv_b_proj must be linear, without a bias"):
            run(layer, attention)
    layer = make_layer()
    _, before = run(layer)
    layer.indexer.weights_proj.bias = nn.Parameter(torch.ones(16, dtype=torch.float64), requires_grad=False)
    assert_close(run(layer)[1]["w"], before["w"] + 1 / 16, 1e-6)  # the constant that w is scaled by, 16^-0.5 twice


NON_LINEAR = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "a square": lambda y: y + 0.05 * y * y,
    "a soft cap": lambda y: 5 * torch.tanh(y / 5),
    "clamped": lambda y: y.clamp(-0.5, 0.5),
    "normalised": lambda y: nn.functional.normalize(y, dim=-1),
    "in some outputs": lambda y: torch.cat((y[..., :4].abs(), y[..., 4:]), dim=-1),
}


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("change", NON_LINEAR)
def test_what_is_not_linear_cannot_be_absorbed(change, dtype):
    """All of these keep 0 at 0. In mha mode, where nothing is absorbed, they take effect."""
    layer = make_layer(dtype)
    layer.kv_b_proj.register_forward_hook(lambda module, args, output: NON_LINEAR[change](output))
    for attention in ("sparse", "dense"):
        with pytest.raises(ValueError, match="kv_b_proj must be linear.* to be absorbed, got Linear"):
            run(layer, attention)
    assert (run(layer, "mha")[0] - run(make_layer(dtype), "mha")[0]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("strength", (0.02, 1.0, 10.0))
def test_an_adapter_that_rounds_is_linear(dtype, strength):
    """In the width of V3.2's latent, beside weights of its size; and where autocast rounds inside a wider layer."""
    base = nn.Linear(512, 4096, bias=False, dtype=dtype).requires_grad_(False)
    nn.init.normal_(base.weight, std=0.02)
    adapter = LoRA(base, rank=16).requires_grad_(False)
    adapter.up.mul_(strength)
    got = wrapped.matrix("kv_b_proj", adapter, 512, dtype, torch.device("cpu"))
    assert_close(got.float(), adapter.merged().float(), 0.02)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float16):  # which a CPU's autocast does not take
        wrapped.matrix("kv_b_proj", adapter, 512, dtype, torch.device("cpu"))


def test_an_adapter_that_cancels_its_base_is_linear():
    base = nn.Linear(512, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    adapter = LoRA(base, rank=2).requires_grad_(False)
    base.weight[:32] = -(adapter.up @ adapter.down)[:32]
    wrapped.matrix("kv_b_proj", adapter, 512, torch.bfloat16, torch.device("cpu"))


class LoRAWithDropout(LoRA):
    def __init__(self, base):
        super().__init__(base)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        return self.base_layer(x) + self.dropout(x) @ self.down.T @ self.up.T


@pytest.mark.parametrize("attention", ("sparse", "dense"))
def test_an_adapters_dropout_drops_channels_in_training_and_nothing_else(attention):
    """What is drawn at random is no sign of a function that is not linear; in evaluation there is nothing to draw."""
    plain, layer = make_layer(), make_layer()
    layer.kv_b_proj = adapter = LoRAWithDropout(layer.kv_b_proj)
    plain.kv_b_proj.weight.copy_(adapter.merged().detach())
    for seed in range(20):
        torch.manual_seed(seed)
        made = wrapped.matrix("kv_b_proj", adapter, TINY.kv_lora_rank, torch.float64, torch.device("cpu"))
        kept = ((made - adapter.base_layer.weight).abs().amax(dim=0) > 0).detach()
        assert_close((made - adapter.base_layer.weight)[:, kept] * 0.7, (adapter.up @ adapter.down)[:, kept], 1e-6)
        run(layer, attention)[0].sum().backward()
    assert not kept.all() and adapter.down.grad.any()
    assert_close(run(layer.eval(), attention)[0], run(plain, attention)[0], 1e-5)


def test_moving_a_layer_whose_modules_have_no_weight_of_that_name():
    layer = make_layer(torch.float32)
    for name in LINEAR:
        layer.set_submodule(name, LoRA(layer.get_submodule(name)))
    x, positions = normal(T, TINY.dim), torch.arange(T)
    wanted = layer(x, positions)
    y = layer.double()(x.double(), positions)
    assert y.dtype == torch.float64
    assert_close(layer.float()(x, positions), wanted, 1e-6)


@pytest.fixture
def one_process():
    """torch.distributed in this process alone, on the CPU."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("each", (True, False))
def test_sharded_modules(one_process, each, dtype):
    """FSDP around every linear module and norm, or around the whole layer: the same output, with gradients."""
    from torch.distributed.fsdp import fully_shard

    layer = make_layer(dtype).requires_grad_(True)
    wanted = {attention: run(layer, attention) for attention in MODES}
    if each:
        for name in (*LINEAR, *INDEXER, "indexer.k_norm"):
            fully_shard(layer.get_submodule(name), mesh=one_process)
    fully_shard(layer, mesh=one_process)
    for attention in MODES:
        got, step = run(layer, attention)
        if each and dtype == torch.bfloat16:  # a shard of bf16 can be read in bf16 alone, so w is rounded to it
            assert_close(step["w"], wanted[attention][1]["w"], 0.05)
        else:
            assert torch.equal(got, wanted[attention][0])
            assert torch.equal(step["w"], wanted[attention][1]["w"])
    (got.float().square().sum() + step["w"].sum()).backward()
    assert all(layer.get_submodule(name).weight.grad is not None for name in (*LINEAR, "indexer.weights_proj"))


class LoRAEmbedding(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Parameter(normal(base.num_embeddings, 2) * 0.3)
        self.up = nn.Parameter(normal(2, base.embedding_dim, seed=1) * 0.3)

    weight = property(lambda self: self.base_layer.weight)

    def forward(self, tokens):
        return self.base_layer(tokens) + self.down[tokens] @ self.up


def test_tied_embeddings_are_tied_with_their_adapter():
    torch.manual_seed(0)
    model, merged = (SmallModel(ModelConfig(1, 96, attention=TINY)) for _ in range(2))
    merged.load_state_dict(model.state_dict())
    adapter = model.embed = LoRAEmbedding(model.embed)
    with torch.no_grad():
        merged.embed.weight += adapter.down @ adapter.up
    text = torch.arange(T) * 11 % 256
    assert_close(model(text), merged(text), 1e-4)
    assert len(model.new_caches(8)) == 1


def test_wrapped_weights_are_not_saved_under_names_that_nobody_reads(tmp_path):
    torch.manual_seed(0)
    model = SmallModel(ModelConfig(1, 96, attention=TINY))
    for name in ("kv_b_proj", "indexer.weights_proj"):
        layer = make_layer(torch.float32)
        layer.set_submodule(name, LoRA(layer.get_submodule(name)))
        with pytest.raises(ValueError, match=f"merge adapters .*{name}.base_layer.weight"):
            save_checkpoint(tmp_path / "layer", {0: layer})
        model.layers[0].self_attn = layer
        with pytest.raises(ValueError, match=f"merge adapters .*{name}.base_layer.weight"):
            save_small_model(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
