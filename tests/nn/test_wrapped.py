"""Modules that somebody wrapped: adapters, hooks, parametrisations and shards take effect wherever the layer uses a
weight, in every attention mode alike, or are refused by name. A plain layer's numbers do not change."""

import contextlib
import copy
import dataclasses
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from inputs import assert_close, normal
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

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


class Turned(nn.Module):
    """The other way round: what was scored highest is scored lowest. It shows no part of what it wraps."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, q_latent):
        q, k, w = self.inner(x, q_latent)
        return q, k, -w


@pytest.mark.parametrize("fp8", (True, False))
def test_a_wrapper_around_the_whole_indexer_counts(fp8):
    layer = make_layer(fp8=fp8)
    wanted, wanted_step = run(layer)
    layer.indexer = Turned(layer.indexer)
    assert not torch.equal(run(layer)[1]["indices"], wanted_step["indices"])
    layer.indexer = Turned(layer.indexer)
    got, step = run(layer)
    assert torch.equal(step["indices"], wanted_step["indices"])
    assert_close(got, wanted, 1e-5)


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


class LoRAOfBuffers(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.register_buffer("down", (normal(2, base.in_features) * 0.3).to(base.weight.dtype))
        self.register_buffer("up", (normal(base.out_features, 2, seed=1) * 0.3).to(base.weight.dtype))

    def forward(self, x):
        return self.base_layer(x) + x @ self.down.T @ self.up.T


class Scaled(nn.Module):
    """A buffer that is not a matrix, and one that is a matrix: what follows a base."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        width = base.weight.shape[0]
        self.register_buffer("gain", torch.linspace(0.2, 2, width).to(base.weight.dtype))
        self.register_buffer("mix", (torch.eye(width) + 0.1 * normal(width, width)).to(base.weight.dtype))

    def forward(self, x):
        return torch.einsum("tc,dc->td", self.base_layer(x) * self.gain, self.mix)


class Int8(nn.Module):
    """A quantised linear module that casts its input to what its scale has, or takes it as it comes."""

    def __init__(self, base, casts=False):
        super().__init__()
        scale = base.weight.float().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight8", (base.weight.float() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.to(base.weight.dtype))
        self.casts = casts

    def forward(self, x):
        x = x.to(self.scale.dtype) if self.casts else x
        return nn.functional.linear(x, self.weight8.to(self.scale.dtype) * self.scale)


class CastsItsInput(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    def forward(self, x):
        by_dtype = self.base_layer(x.to(self.base_layer.weight.dtype))
        return (by_dtype + self.base_layer(x.to(self.base_layer.weight))) / 2


def spectral(base):
    torch.manual_seed(0)
    return parametrizations.spectral_norm(base, eps=1e-6)


def older_spectral(base):
    torch.manual_seed(0)
    return nn.utils.spectral_norm(base, eps=1e-6)


def pruned(base):
    return prune.random_unstructured(base, "weight", 0.5)


AROUND = {
    "spectral_norm": (spectral, 0.03),  # it divides a bf16 weight
    "the older spectral_norm": (older_spectral, 0.03),
    "pruning": (pruned, 1e-5),
    "LoRA of buffers": (LoRAOfBuffers, 1e-5),
    "buffers behind it": (Scaled, 1e-5),
    "int8 in buffers": (Int8, 0.03),
    "int8 in buffers, casting": (lambda base: Int8(base, True), 0.03),
    "a cast of its input": (CastsItsInput, 1e-5),
    "TorchScript": (torch.jit.script, 0.03),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize(
    "around, name",
    [(around, "weights_proj") for around in AROUND]
    + [(around, "k_norm") for around in ("buffers behind it", "a cast of its input", "TorchScript")],
)
def test_what_wraps_the_indexer_may_keep_buffers(around, name, dtype):
    """In the weights' dtype: it takes effect as in a layer whose wrapper is made of the same numbers in fp32."""
    wrap, tolerance = AROUND[around]
    module = getattr(make_layer(dtype).indexer, name)
    torch.manual_seed(1)
    wrapped_module = wrap(module).eval()
    exact = copy.deepcopy(wrapped_module).float()
    x = normal(T, TINY.index_head_dim if name == "k_norm" else TINY.dim).to(dtype)
    got = wrapped.in_fp32(wrapped_module, x)
    assert got.dtype == torch.float32
    assert_close(got, exact(x.float()), tolerance)
    assert all(weight.dtype == dtype or weight.dtype == torch.int8 for weight in wrapped_module.state_dict().values())
    layer = make_layer(dtype)
    setattr(layer.indexer, name, wrap(getattr(layer.indexer, name)))
    assert run(layer)[0].isfinite().all()


@pytest.mark.parametrize("wrap", (spectral, older_spectral))
def test_what_a_module_notes_in_its_buffers_is_kept(wrap):
    layer = make_layer(torch.bfloat16)
    wrap(layer.indexer.weights_proj).train()
    before = {name: buffer.clone() for name, buffer in layer.indexer.weights_proj.named_buffers()}
    layer.indexer.weights_proj.requires_grad_(True)
    run(layer)[1]["w"].sum().backward()
    assert any(not torch.equal(b, before[name]) for name, b in layer.indexer.weights_proj.named_buffers())
    assert any(p.grad is not None and p.grad.any() for p in layer.indexer.weights_proj.parameters())


PRODUCTS = {
    "matmul": lambda x, w: x @ w.T,
    "of the other": lambda x, w: (w @ x.T).T,
    "mm": lambda x, w: torch.mm(x, w.T),
    "mv": lambda x, w: torch.stack([torch.mv(w, row) for row in x]),
    "dot": lambda x, w: torch.stack([torch.dot(row, column) for row in x for column in w]).unflatten(0, (len(x), -1)),
    "addmm": lambda x, w: torch.addmm(torch.zeros_like(w[:1, :1]), x, w.T),
    "bmm": lambda x, w: torch.bmm(x[None], w.T[None])[0],
    "einsum": lambda x, w: torch.einsum("tc,dc->td", x, w),
    "einsum of a list": lambda x, w: torch.einsum("tc,dc->td", [x, w]),
    "tensordot": lambda x, w: torch.tensordot(x, w, ([1], [1])),
    "inner": lambda x, w: torch.inner(x, w),
    "multi_dot": lambda x, w: torch.linalg.multi_dot([x, w.T]),
    "conv1d": lambda x, w: nn.functional.conv1d(x.T[None], w[:, :, None])[0].T,
    "by hand": lambda x, w: (x[:, None] * w).sum(dim=-1),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_whatever_product_a_wrapper_makes(product):
    class Product(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.kernel = base.weight

        def forward(self, x):
            return PRODUCTS[product](x, self.kernel)

    plain = make_layer(torch.bfloat16)
    wanted = run(plain)[1]["w"]
    plain.indexer.weights_proj = Product(plain.indexer.weights_proj)
    got = run(plain)[1]["w"]
    assert got.dtype == torch.float32
    assert_close(got, wanted, 1e-6)


def hooked_layers(count, hook):
    """bf16 layers, so that their indexers' modules compute in fp32 with weights of another dtype."""
    layers = [make_layer(torch.bfloat16) for _ in range(count)]
    for layer in layers:
        layer.indexer.weights_proj.register_forward_hook(lambda *_: hook() and None)
    return layers


def together(*calls):
    """Whether all calls end when each has its thread."""
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("layers", (1, 2))
def test_hooks_of_several_threads_may_wait_for_each_other(layers):
    """As collectives do; and while they wait, other threads find the modules' own weights."""
    barrier, found, results = threading.Barrier(2, timeout=10), [], []
    made = hooked_layers(layers, lambda: (barrier.wait(), found.append(made[0].indexer.weights_proj.weight)))
    own = made[0].indexer.weights_proj.weight

    def call(layer):
        with contextlib.suppress(threading.BrokenBarrierError):
            results.append(run(layer)[0])

    assert together(lambda: call(made[0]), lambda: call(made[-1]))
    assert len(results) == 2 and torch.equal(*results)
    assert all(weight is own for weight in found)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_process_forked_while_a_hook_runs_can_use_the_layer():
    inside, leave = threading.Event(), threading.Event()
    (layer,) = hooked_layers(1, lambda: (inside.set(), leave.wait(30)))
    thread = threading.Thread(target=lambda: run(layer), daemon=True)
    thread.start()
    assert inside.wait(30)
    child = os.fork()
    if child == 0:
        try:  # a child must not go on with pytest
            leave.set()
            w = wrapped.in_fp32(layer.indexer.weights_proj, torch.ones(1, TINY.dim, dtype=torch.bfloat16))
            whole = w.isfinite().all() and layer.indexer.weights_proj.weight.dtype == torch.bfloat16
            os._exit(0 if whole else 1)
        finally:
            os._exit(2)
    ended, deadline = (0, 0), time.monotonic() + 20
    while ended == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
        ended = os.waitpid(child, os.WNOHANG)
    if ended == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    leave.set()
    thread.join(30)
    assert ended == (child, 0)


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


SMALL_PARTS = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "abs": torch.abs,
    "tanh": torch.tanh,
}


class SmallPart(nn.Module):
    """An adapter whose own part is small and not linear."""

    def __init__(self, base, change):
        super().__init__()
        self.base_layer, self.change = base, change
        like = base.weight.dtype
        self.down = nn.Parameter(normal(16, base.in_features).to(like))
        self.up = nn.Parameter(normal(base.out_features, 16, seed=1).to(like))

    def forward(self, x):
        inner = self.change(x @ self.down.T)
        return self.base_layer(x) + 0.1 * base_size(self.base_layer) * inner @ self.up.T / 4


def base_size(base):
    return base.weight.detach().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("change", SMALL_PARTS)
def test_a_small_part_that_is_not_linear_is_refused_where_nothing_rounds_as_much(change, dtype):
    """A tenth of the base's size. TF32, and autocast, may hide it: what they round is as large."""
    base = nn.Linear(512, 1024, bias=False, dtype=dtype).requires_grad_(False)
    nn.init.normal_(base.weight, std=0.02)
    adapter = SmallPart(base, SMALL_PARTS[change]).requires_grad_(False)
    with pytest.raises(ValueError, match="kv_b_proj must be linear .* to 0.001 of it"):
        wrapped.matrix("kv_b_proj", adapter, 512, dtype, torch.device("cpu"))


SHORT = {
    "high": "torch.set_float32_matmul_precision('high')",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "allow_tf32": "torch.backends.cuda.matmul.allow_tf32 = True",
    "all backends": "torch.backends.fp32_precision = 'tf32'",
    "a GPU's products": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "a CPU's products": "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
}


def test_autocast_and_short_products_round():
    """The settings are the process's, and torch does not give back what they were: each has a process of its own."""
    adapter, rows = LoRA(nn.Linear(16, 8, bias=False)), torch.zeros(2, 8)
    assert not wrapped._rounds(adapter, rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert wrapped._rounds(adapter, rows)
    code = "import torch\nfrom dsa_ref.nn.wrapped import _products_are_short as short\nassert not short()\n"
    newer = hasattr(torch.backends.cuda.matmul, "fp32_precision")
    children = {
        name: subprocess.Popen([sys.executable, "-c", f"{code}{setting}\nassert short()"])
        for name, setting in SHORT.items()
        if newer or "fp32_precision" not in setting
    }
    assert {name: child.wait() for name, child in children.items()} == dict.fromkeys(children, 0)


class FourBits(nn.Module):
    """A quantised base that rounds its weight, as NF4's does, beside an adapter in fp32."""

    def __init__(self, base):
        super().__init__()
        scale = base.weight.abs().amax(dim=1, keepdim=True) / 7
        self.register_buffer("packed", ((base.weight / scale).round() + 8).to(torch.uint8))
        self.register_buffer("scale", scale)
        self.weight, self.in_features, self.out_features = scale, base.in_features, base.out_features

    def rounded_input(self, x):
        return x

    def forward(self, x):
        return self.rounded_input(x) @ ((self.packed.to(x.dtype) - 8) * self.scale.to(x.dtype)).T


class EightBitInputs(FourBits):
    """One that also rounds each row of its input to 8 bits."""

    def rounded_input(self, x):
        step = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-9) / 127
        return (x / step).round() * step


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("quantised", (FourBits, EightBitInputs))
def test_a_quantised_base_is_absorbed(quantised, dtype):
    """What it makes of unit vectors, which quantised inputs hold exactly; other inputs' rounding takes no effect."""
    base = nn.Linear(512, 1024, bias=False, dtype=dtype).requires_grad_(False)
    nn.init.normal_(base.weight, std=0.02)
    wrapper = quantised(base)
    got = wrapped.matrix("kv_b_proj", wrapper, 512, dtype, torch.device("cpu"))
    assert_close(got.float(), ((wrapper.packed.float() - 8) * wrapper.scale.float()), 0.01)
    wrapped.matrix("kv_b_proj", LoRA(wrapper, rank=4), 512, dtype, torch.device("cpu"))


def test_a_base_that_rounds_its_whole_input_together_is_refused_with_that_reason():
    class Together(EightBitInputs):
        def rounded_input(self, x):
            step = x.abs().max() / 7
            return (x / step).round() * step

    base = nn.Linear(512, 1024, bias=False).requires_grad_(False)
    with pytest.raises(ValueError, match="kv_b_proj must be linear .* or it rounds its input or output"):
        wrapped.matrix("kv_b_proj", Together(base), 512, torch.float32, torch.device("cpu"))


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
