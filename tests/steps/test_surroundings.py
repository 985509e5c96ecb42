"""What a step computes follows from its arguments: no setting around it changes a bit, nor one of its gradients."""

import contextlib
import itertools
import os
import subprocess
import sys

import pytest
import torch
from inputs import assert_same_bits, index_inputs, normal, packed

import dsa_ref
from dsa_ref import precision, products, testing

T, S, H, D, V = 40, 40, 4, 64, 48
START, END, _ = packed(13, 27)
INDICES = dsa_ref.select_topk(normal(T, S), 8)
INDEX_INPUTS = index_inputs(normal, T, S, 3, 64)
ATTENTION = (normal(T, H, D, seed=7), normal(S, D, seed=8))
POSITIONS, FREQS = torch.arange(T), dsa_ref.rope_frequencies(dsa_ref.V32)


def loss(indices):
    return lambda q_idx, k_idx, w: dsa_ref.indexer_loss(q_idx, k_idx, w, *ATTENTION, 0.1, indices, START, END)


# name: (function of the tensors that follow, those tensors); all that are differentiable get a gradient
STEPS = {
    "rope": (lambda x: dsa_ref.rope(x, POSITIONS, FREQS, "half"), normal(T, 2, 128)),
    "hadamard": (dsa_ref.hadamard, normal(T, 64)),
    "quantize": (dsa_ref.quantize, normal(T, 64)),
    "rotate_quantize": (lambda x: dsa_ref.rotate_quantize(x, POSITIONS, FREQS), normal(T, 2, 128)),
    "index_scores": (lambda *x: dsa_ref.index_scores(*x, START, END), *INDEX_INPUTS),
    "select_topk": (lambda scores: dsa_ref.select_topk(scores, 8), normal(T, S)),
    "lightning_select": (lambda q, k, w, scale: dsa_ref.lightning_select(q, k, w, 8, scale, START, END), *INDEX_INPUTS),
    "sparse_attention": (lambda q, kv: dsa_ref.sparse_attention(q, kv, INDICES, 0.1, V), *ATTENTION),
    "dense_attention": (lambda q, kv: dsa_ref.dense_attention(q, kv, 0.1, V, START, END), *ATTENTION),
    "mha_attention": (
        lambda q, k, v: dsa_ref.mha_attention(q, k, v, 0.1, INDICES),
        normal(T, H, D),
        normal(S, H, D, seed=1),
        normal(S, H, V, seed=2),
    ),
    "indexer_loss": (loss(None), *INDEX_INPUTS[:3]),
    "indexer_loss, sparse": (loss(INDICES), *INDEX_INPUTS[:3]),
}


def results(function, *tensors, backward=True):
    """What the function returns, then the gradients, under whatever is switched on around this call."""
    leaves = [x.clone().requires_grad_(backward) for x in tensors]
    outs = function(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grown = [x for x in outs if x.requires_grad]
    if not grown:
        return [*outs]
    weights = [torch.linspace(1, 2, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape) for x in grown]
    weights = [weight.masked_fill(x.isinf(), 0.0) for weight, x in zip(weights, grown, strict=True)]
    return [*outs, *torch.autograd.grad(grown, leaves, weights)]


@contextlib.contextmanager
def changed(get, put, value):
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def short_products():
    """On a CPU that has them, fp32 products of bf16 factors."""
    owner = torch.backends.mkldnn.matmul
    return changed(lambda: owner.fp32_precision, lambda value: setattr(owner, "fp32_precision", value), "bf16")


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast, half": lambda: torch.autocast("cpu", torch.float16),
    "medium": lambda: changed(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "short products": short_products,
    "default double": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default bf16": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "deterministic": lambda: changed(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "anomaly": torch.autograd.detect_anomaly,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("step", STEPS)
def test_nothing_around_a_step_changes_it(step, surroundings):
    wanted = results(*STEPS[step])
    with SURROUNDINGS[surroundings]():
        got = results(*STEPS[step])
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("step", STEPS)
def test_inference_mode(step):
    wanted = results(*STEPS[step], backward=False)
    with torch.inference_mode():
        got = results(*STEPS[step], backward=False)
    for a, b in zip(got, wanted, strict=True):
        assert_same_bits(a, b)


def test_judges_take_arrays_under_any_default_device():
    scores = normal(3, 5)
    indices = dsa_ref.select_topk(scores, 2)
    with torch.device("meta"):
        testing.compare_selection(indices.numpy(), scores.numpy(), 2)
        assert testing.relative_error(scores.numpy(), scores) == 0.0
        assert testing.overlap(indices.numpy(), indices) == 1.0
        assert testing.window_selection(2, START.numpy(), END).device == START.device


@pytest.mark.rungs("reference", "kernels")
def test_autocast_does_not_make_a_tie(ops, device):
    """bf16 has no 257: 256 and 257 would tie, and the first would win."""
    q_idx, k_idx = (
        torch.tensor([[[1.0, 0.0]]], device=device),
        torch.tensor([[256.0, 0.0], [257.0, 0.0]], device=device),
    )
    w = torch.ones(1, 1, device=device)
    with torch.autocast(device, torch.bfloat16):
        scores = ops.index_scores(q_idx, k_idx, w)
        assert scores.dtype == torch.float32 and scores.tolist() == [[256.0, 257.0]]
        assert ops.lightning_select(q_idx, k_idx, w, 1).tolist() == [[1]]
        assert ops.select_topk(scores, 1).tolist() == [[1]]


@pytest.mark.parametrize("surroundings", ("autocast", "medium", "short products"))
def test_the_settings_are_what_they_were(surroundings):
    """After a step, and after one that raised, the program's own products are as short as it wanted them."""
    a, b = normal(64, 64), normal(64, 64, seed=1)
    with SURROUNDINGS[surroundings]():
        before = a @ b
        results(*STEPS["dense_attention"])
        with pytest.raises(RuntimeError):
            products.masked_einsum("thd,sd->ths", normal(2, 2, 3), normal(2, 4))
        assert_same_bits(a @ b, before)


def test_autocast_does_change_plain_products():
    """Otherwise the tests above would show nothing. What "medium" and the short products do depends on the CPU."""
    a, b = normal(64, 64), normal(64, 64, seed=1)
    plain = a @ b
    with SURROUNDINGS["autocast"]():
        assert not torch.equal((a @ b).float(), plain)


NEWER = pytest.mark.skipif(
    not hasattr(torch._C, "_get_fp32_precision_getter"), reason="this torch has no precision for each backend"
)
LEVELS = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"), ("cuda", "matmul"), ("mkldnn", "matmul"))


@pytest.fixture
def precisions():
    """A function that sets the older precision and those of LEVELS; afterwards they are torch's defaults."""

    def put(older, *values):
        torch.set_float32_matmul_precision(older)
        for level, value in zip(LEVELS, values, strict=True):
            torch._C._set_fp32_precision_setter(*level, value)

    yield put
    put("highest", *(["none"] * len(LEVELS)))


def behaviour():
    """What holds at each level now, and would hold if what it may inherit from were set otherwise."""
    read, write, seen = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter, []
    for level in (None, *LEVELS[:3]):
        for value in (None,) if level is None else ("ieee", "tf32", "none"):
            if level is not None:
                write(*level, value)
            seen += [read(*other) for other in (*LEVELS, ("cuda", "conv"), ("mkldnn", "conv"))]
    return seen


@NEWER
@pytest.mark.parametrize("older", ("highest", "high", "medium"))
def test_settings_of_precision_come_back_as_they_were(older, precisions):
    """Inherited or own, in all combinations. Inside, products are fp32, and either interface of torch can be read."""
    cuda, mkldnn = ("none", "ieee", "tf32"), ("none", "ieee", "tf32", "bf16")
    for values in itertools.product(mkldnn, cuda, mkldnn, cuda, mkldnn):
        precisions(older, *values)
        wanted = behaviour()
        precisions(older, *values)
        with precision.exact_arithmetic():
            assert [torch._C._get_fp32_precision_getter(*level) for level in LEVELS[3:]] == ["ieee", "ieee"]
            assert not torch.backends.cuda.matmul.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
        assert behaviour() == wanted, (older, values)
        for level in LEVELS[3:]:  # so that the older one can be read
            torch._C._set_fp32_precision_setter(*level, "ieee")
        assert torch.get_float32_matmul_precision() == older


@NEWER
def test_what_a_program_sets_for_all_backends_still_reaches_products_after_a_step(precisions):
    precisions("highest", *["none"] * len(LEVELS))
    torch.backends.fp32_precision = "tf32"
    results(*STEPS["dense_attention"])
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "tf32"
    torch.backends.fp32_precision = "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.mkldnn.matmul.fp32_precision == "ieee"


def test_code_inside_can_read_the_older_setting():
    """As a hook on the indexer's head weights may."""
    with changed(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"):
        with precision.exact_arithmetic():
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32 and torch.get_float32_matmul_precision() == "medium"


FORKED = """
import os, torch
from dsa_ref import precision

torch.set_float32_matmul_precision("medium")
inside = precision.exact_arithmetic()
inside.__enter__()  # as another thread would be
precision._lock.acquire()
if os.fork() == 0:
    with precision.exact_arithmetic():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "medium"
    os._exit(7)
status = os.wait()[1]
precision._lock.release()
inside.__exit__(None, None, None)
assert os.waitstatus_to_exitcode(status) == 7
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_a_process_forked_inside_a_step_of_another_thread_starts_over():
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=100)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.rungs("reference", "kernels")
def test_quantize_does_not_look_at_values_on_request(ops, device):
    x = torch.tensor([[1.0, torch.nan]], device=device)
    with dsa_ref.unchecked_values():
        assert [part.shape for part in ops.quantize(x)] == [(1, 2), (1,)]
    with pytest.raises(ValueError, match="x must be finite"):
        ops.quantize(x)
