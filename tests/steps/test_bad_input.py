"""Whatever is wrong with an argument, the error names it: hypothesis draws bad values for every step and argument."""

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from inputs import causal, normal, random_indices

RUNGS = pytest.mark.rungs("reference", "kernels")
T, S, HI, DI, H, D, K = 5, 9, 3, 16, 2, 40, 4
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e5m2)


def index_arguments():
    start, end = causal(T, S)
    return {
        "q_idx": normal(T, HI, DI),
        "k_idx": normal(S, DI, seed=1),
        "w": normal(T, HI, seed=2),
        "k_scale": normal(S, seed=3).abs(),
        "start": start,
        "end": end,
    }


def rope_arguments():
    return {"x": normal(T, H, DI), "positions": torch.arange(T), "freqs": torch.ones(4)}


GOOD = {  # one good call of each step
    "rope": lambda: rope_arguments() | {"layout": "half"},
    "hadamard": lambda: {"x": normal(T, DI)},
    "quantize": lambda: {"x": normal(T, DI)},
    "rotate_quantize": rope_arguments,
    "index_scores": index_arguments,
    "lightning_select": lambda: index_arguments() | {"k": K},
    "select_topk": lambda: {"scores": normal(T, S), "k": K} | dict(zip(("start", "end"), causal(T, S), strict=True)),
    "sparse_attention": lambda: {
        "q": normal(T, H, D),
        "kv": normal(S, D, seed=1),
        "indices": random_indices(T, S, K),
        "scale": 0.2,
        "v_dim": 24,
    },
    "sparse_attention_backward": lambda: {
        "q": normal(T, H, D),
        "kv": normal(S, D, seed=1),
        "indices": random_indices(T, S, K),
        "scale": 0.2,
        "v_dim": 24,
        "out": normal(T, H, 24, seed=2),
        "lse": normal(T, H, seed=3),
        "dout": normal(T, H, 24, seed=4),
        "dlse": normal(T, H, seed=5),
        "sums": "sorted",
    },
}
# Dims that another argument shares, so that a change must be noticed; and dtypes that are wrong.
SHARED_DIMS = {
    "positions": (0,), "q_idx": (0, 1, 2), "k_idx": (1,), "w": (0, 1), "k_scale": (0,), "start": (0,), "end": (0,),
    "q": (0, 2), "kv": (1,), "indices": (0,), "out": (0, 1, 2), "lse": (0, 1), "dout": (0, 1, 2), "dlse": (0, 1),
}  # fmt: skip
ANY_RANK = ("hadamard", "quantize")
WRONG_DTYPES = {
    "positions": FLOATS + (torch.int16, torch.bool),
    "freqs": OTHERS + FLOATS[1:],
    "k_idx": OTHERS + FLOATS[1:],
    "kv": OTHERS + FLOATS[1:],
    "start": FLOATS + (torch.int64, torch.int16, torch.bool),
    "end": FLOATS + (torch.int64, torch.int16, torch.bool),
    "indices": FLOATS + (torch.int64, torch.int16, torch.bool),
    **dict.fromkeys(("out", "lse", "dout", "dlse"), OTHERS + FLOATS[1:]),
}
NOT_TENSORS = (1.0, "x", [0.0, 1.0], np.zeros((T, S)), object())
NOT_NUMBERS = (None, "1", [1], True, False, torch.tensor(1), np.float32(1))
BELOW_ONE = st.integers(max_value=0)
PLAIN = {  # bad values of the arguments that are no tensors
    "k": BELOW_ONE | st.floats() | st.sampled_from(NOT_NUMBERS),
    "v_dim": BELOW_ONE | st.integers(min_value=D + 1) | st.floats() | st.sampled_from(NOT_NUMBERS),
    "scale": st.floats(max_value=0) | st.sampled_from((torch.nan, torch.inf, *NOT_NUMBERS)),
    "sums": st.text().filter(lambda text: text not in ("sorted", "atomic")) | st.sampled_from((None, 0)),
    "layout": st.text().filter(lambda text: text not in ("half", "interleaved")) | st.sampled_from((None, 0)),
}


def wrong_values(draw, name, good):
    """The right tensor with one value that its meaning forbids, or None where every value is fine."""
    bad, t = good.clone(), draw(st.integers(0, len(good) - 1))
    if name in ("start", "end"):
        bad[t] = draw(st.integers(-(2**31), -1) | st.integers(S + 1, 2**31 - 1))
    elif name == "indices":
        bad[t, draw(st.integers(0, K - 1))] = draw(st.integers(-(2**31), -2) | st.integers(S, 2**31 - 1))
    else:
        return None
    return bad


def wrong_tensors(draw, step, name, good):
    """One bad value for the tensor argument `good`, of a kind that is drawn first."""
    kind = draw(st.sampled_from(("type", "rank", "size", "dtype", "device", "value")))
    if kind == "rank":
        others = () if step in ANY_RANK else (good[None, None], good[..., None, None])
        return draw(st.sampled_from((good.flatten()[0], *others)))
    if kind == "size":
        dims = SHARED_DIMS.get(name, ())
        if dims and draw(st.booleans()):
            return torch.cat((good, good), dim=draw(st.sampled_from(dims)))
        return good[..., :0]
    if kind == "dtype":
        return good.to(draw(st.sampled_from(WRONG_DTYPES.get(name, OTHERS))))
    if kind == "device" and name != "scores" and step not in ANY_RANK:
        return good.to("cpu" if good.is_cuda else "meta")
    value = wrong_values(draw, name, good) if kind == "value" else None
    return draw(st.sampled_from(NOT_TENSORS)) if value is None else value


def good_arguments(step, device):
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in GOOD[step]().items()}


@RUNGS
@pytest.mark.parametrize("step", GOOD)
def test_good_arguments_pass(ops, device, step):
    """Else the tests below would pass for a step that refuses everything."""
    getattr(ops, step)(**good_arguments(step, device))


@RUNGS
@pytest.mark.parametrize("step, name", [(step, name) for step, make in GOOD.items() for name in make()])
@hypothesis.given(data=st.data())
@hypothesis.settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_error_names_the_argument(ops, device, step, name, data):
    arguments = good_arguments(step, device)
    draw, good = data.draw, arguments[name]
    arguments[name] = draw(PLAIN[name]) if name in PLAIN else wrong_tensors(draw, step, name, good)
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
        getattr(ops, step)(**arguments)


@RUNGS
@pytest.mark.parametrize("step", ("index_scores", "lightning_select", "select_topk"))
def test_ranges(ops, device, step):
    """start past end in one row; and more queries than keys, where no default range makes sense."""
    arguments = good_arguments(step, device)
    arguments["start"][3] = arguments["end"][3] + 1
    with pytest.raises(ValueError, match=r"\bstart\b.*row 3"):
        getattr(ops, step)(**arguments)

    arguments = good_arguments(step, device)
    del arguments["start"], arguments["end"]
    keys = "k_idx" if "k_idx" in arguments else "scores"
    arguments[keys] = arguments[keys][..., :2] if keys == "scores" else arguments[keys][:2]
    arguments.pop("k_scale", None)
    with pytest.raises(ValueError, match=r"T = 5.*S = 2.*\bstart\b.*\bend\b"):
        getattr(ops, step)(**arguments)


@RUNGS
def test_widths(ops, device):
    with pytest.raises(ValueError, match=r"\bx\b.*power of two"):
        ops.hadamard(normal(T, 24, device=device))
    arguments = good_arguments("rotate_quantize", device)
    with pytest.raises(ValueError, match=r"\bx\b.*power of two"):
        ops.rotate_quantize(**arguments | {"x": normal(T, H, 24, device=device)})
    for step, more in (("rope", {"layout": "half"}), ("rotate_quantize", {})):
        with pytest.raises(ValueError, match=r"\bfreqs\b"):
            getattr(ops, step)(**arguments | more | {"freqs": torch.ones(DI // 2 + 1, device=device)})


@pytest.mark.rungs("kernels")
@pytest.mark.parametrize(
    "step, name",
    [
        *(("rope", "x"), ("rope", "freqs"), ("hadamard", "x"), ("sparse_attention", "kv"), ("lightning_select", "w")),
        *(("index_scores", name) for name in ("q_idx", "k_idx", "w", "k_scale")),
        *(("sparse_attention_backward", name) for name in ("q", "kv", "out", "lse", "dout", "dlse")),
    ],
)
def test_kernels_refuse_what_they_cannot_do(ops, device, step, name):
    """fp64, and a gradient that would silently be missing. A choice has none to miss."""
    arguments = good_arguments(step, device)
    with pytest.raises(TypeError, match=rf"\b{name}\b"):
        getattr(ops, step)(**arguments | {name: arguments[name].double()})
    if (step, name) in (("rope", "x"), ("hadamard", "x"), ("sparse_attention", "kv"), ("lightning_select", "w")):
        getattr(ops, step)(**arguments | {name: arguments[name].requires_grad_()})  # `kernels.test_operators` has more
        return
    with pytest.raises(ValueError, match=rf"\b{name}\b.*gradient"):
        getattr(ops, step)(**arguments | {name: arguments[name].requires_grad_()})


@pytest.mark.gpu
@pytest.mark.parametrize("step", GOOD)
def test_compiled_kernels_refuse_cpu_tensors(step):
    import dsa_kernels

    with pytest.raises(ValueError, match="must be on a CUDA device"):
        getattr(dsa_kernels, step)(**GOOD[step]())
