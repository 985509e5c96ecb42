"""Derivatives, and the steps as operators of torch.library: all that torch has to know of a step to train through it.

A step's public function calls its kernels itself where no gradient is wanted, and `torch.ops.dsa_kernels.<step>` where
one is, where torch.compile traces, and where a mode looks at operators, as selective activation checkpointing does. So
steps import nothing of this module; it imports them, and says for each operator what it runs, what shapes come out of
it (for tracing), and what its gradient is. What an operator launches, and what values it reads, no graph sees.

    sparse_attention    of q and kv, by `sparse_attention_backward`; the probe receives its target
    indexer_loss        of q_idx, k_idx and w: made in the forward pass, and multiplied by what comes from above
    mha_attention       of q, k and v, by torch's kernels
    rope, hadamard      the step itself: with turned angles, and as it is, since that matrix is its own inverse
    lightning_select, rotate_quantize, quantize    none: a choice has no derivative, and rounding counts as one

A policy of selective checkpointing that saves `torch.ops.dsa_kernels.lightning_select.default` selects no key twice.
Second derivatives, but for the linear steps, and forward mode are refused: only dsa_ref computes them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dsa_ref.contracts import check_indexer_loss, check_mha_attention, row_ranges, unchecked_values

from .indexer_loss import loss_and_gradients
from .lightning_select import lightning_select
from .mha_attention import attend, gradients
from .rotate_quantize import hadamard, quantize, rope, rotate_quantize
from .runtime import FLOATS, check_runnable
from .sparse_attention import check_scale_in_base_2, sparse_attention
from .sparse_attention_backward import sparse_attention_backward


def operator(name: str, run: Callable):
    """The operator dsa_kernels::name, whose schema is read off run's annotations."""
    return torch.library.custom_op(f"dsa_kernels::{name}", run, mutates_args=())


def first_order(step: str, backward: Callable) -> Callable:
    """backward(ctx, *gradients), which cannot be differentiated: raises where autograd would try to."""

    def run(ctx, *gradients):
        if torch.is_grad_enabled():
            raise ValueError(f"create_graph must be False for {step}: second derivatives only dsa_ref computes")
        return backward(ctx, *gradients)

    return run


# Without a gradient ---------------------------------------------------------------------------------------------------


def _select(
    q_idx: Tensor, k_idx: Tensor, w: Tensor, k: int, k_scale: Tensor | None, start: Tensor | None, end: Tensor | None,
    variant: str | None,
) -> Tensor:  # fmt: skip
    return lightning_select(q_idx, k_idx, w, k, k_scale, start, end, variant)


def _rotate_quantize(x: Tensor, positions: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor]:
    return rotate_quantize(x, positions, freqs)


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize(x)


def _narrow(x, *_):
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:-1], dtype=torch.float32)


operator("lightning_select", _select).register_fake(
    lambda q_idx, k_idx, w, k, *_: q_idx.new_empty(q_idx.shape[0], k, dtype=torch.int32)
)
operator("rotate_quantize", _rotate_quantize).register_fake(_narrow)
operator("quantize", _quantize).register_fake(_narrow)

# Linear: the gradient is the step itself, with other arguments, and so differentiable again ---------------------------


def _rope(x: Tensor, positions: Tensor, freqs: Tensor, layout: str) -> Tensor:
    return rope(x, positions, freqs, layout)


def _hadamard(x: Tensor) -> Tensor:
    return hadamard(x)


def _keep_angles(ctx, inputs, output):
    _, positions, freqs, ctx.layout = inputs
    ctx.save_for_backward(positions, freqs)


def _turn_back(ctx, dout):
    positions, freqs = ctx.saved_tensors
    return torch.ops.dsa_kernels.rope(dout, positions, -freqs, ctx.layout), None, None, None


for name, run, backward, setup in (
    ("rope", _rope, _turn_back, _keep_angles),
    ("hadamard", _hadamard, lambda ctx, dout: torch.ops.dsa_kernels.hadamard(dout), None),
):
    linear = operator(name, run)
    linear.register_fake(lambda x, *_: x.new_empty(x.shape))
    linear.register_autograd(backward, setup_context=setup)

# Attention over selected keys -----------------------------------------------------------------------------------------


def _sparse_attention(
    q: Tensor, kv: Tensor, indices: Tensor, scale: float, v_dim: int, probe: Tensor | None, variant: str | None
) -> tuple[Tensor, Tensor]:
    return sparse_attention(q, kv, indices, scale, v_dim, probe, variant)


def _sparse_attention_backward(
    q: Tensor, kv: Tensor, indices: Tensor, scale: float, v_dim: int, out: Tensor, lse: Tensor, dout: Tensor,
    dlse: Tensor | None, variant: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with unchecked_values():  # the forward pass has looked at them
        return sparse_attention_backward(q, kv, indices, scale, v_dim, out, lse, dout, dlse, variant=variant)


def _keep_attention(ctx, inputs, output):
    q, kv, indices, ctx.scale, ctx.v_dim, _, ctx.variant = inputs
    ctx.save_for_backward(q, kv, indices, *output)
    ctx.set_materialize_grads(False)


def _of_attention(ctx, dout, dlse):
    q, kv, indices, out, lse = ctx.saved_tensors
    dq, dkv, target = torch.ops.dsa_kernels.sparse_attention_backward(
        q, kv, indices, ctx.scale, ctx.v_dim, out, lse, torch.zeros_like(out) if dout is None else dout, dlse,
        ctx.variant,
    )  # fmt: skip
    return dq, dkv, None, None, None, target if ctx.needs_input_grad[5] else None, None


attention = operator("sparse_attention", _sparse_attention)
attention.register_fake(
    lambda q, kv, indices, scale, v_dim, *_: (
        q.new_empty(q.shape[0], q.shape[1], v_dim),
        q.new_empty(q.shape[:2], dtype=torch.float32),
    )
)
attention.register_autograd(first_order("sparse_attention", _of_attention), setup_context=_keep_attention)
operator("sparse_attention_backward", _sparse_attention_backward).register_fake(
    lambda q, kv, indices, *_: (
        q.new_empty(q.shape),
        kv.new_empty(kv.shape),
        q.new_empty(indices.shape, dtype=torch.float32),
    )
)

# The indexer's loss ---------------------------------------------------------------------------------------------------


def _indexer_loss(
    q_idx: Tensor, k_idx: Tensor, w: Tensor, q: Tensor | None, kv: Tensor | None, scale: float | None,
    indices: Tensor | None, start: Tensor | None, end: Tensor | None, lse: Tensor | None, target: Tensor | None,
    wanted: bool, reduction: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(sum of the rows' losses, rows with a key, gradients of the sum, which are empty unless wanted). reduction: to be
    checked like everything else, or None where all is checked: values are read for the sizes of blocks, too."""
    if reduction is not None:
        check_indexer_loss(q_idx, k_idx, w, q, kv, scale, indices, start, end, lse, target, reduction, FLOATS)
        if scale is not None:
            check_scale_in_base_2(scale)
        check_runnable(True, q_idx=q_idx, k_idx=k_idx, w=w, q=q, kv=kv)
    start, end = row_ranges(len(q_idx), len(k_idx), q_idx.device, start, end)
    loss, rows, *found = loss_and_gradients(q_idx, k_idx, w, q, kv, scale, indices, start, end, lse, target, wanted)
    return loss, rows, *(found if wanted else (x.new_empty(0) for x in (q_idx, k_idx, w)))


def _fake_loss(q_idx, k_idx, w, *others):
    wanted = others[-2]
    shapes = [x.shape if wanted else (0,) for x in (q_idx, k_idx, w)]
    found = (x.new_empty(shape) for x, shape in zip((q_idx, k_idx, w), shapes, strict=True))
    return q_idx.new_empty((), dtype=torch.float32), q_idx.new_empty((), dtype=torch.int64), *found


def _keep_gradients(ctx, inputs, output):
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])


def _of_loss(ctx, dloss, *_):
    return *((x * dloss).to(x.dtype) for x in ctx.saved_tensors), *(None,) * 10


teacher = operator("indexer_loss", _indexer_loss)
teacher.register_fake(_fake_loss)
teacher.register_autograd(first_order("indexer_loss", _of_loss), setup_context=_keep_gradients)

# MHA mode -------------------------------------------------------------------------------------------------------------


def _mha_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, indices: Tensor | None, start: Tensor | None, end: Tensor | None
) -> tuple[Tensor, Tensor]:
    check_mha_attention(q, k, v, scale, indices, start, end, FLOATS)
    check_runnable(True, q=q, k=k, v=v)
    return attend(q, k, v, scale, indices, start, end, not_captured(q))


def _mha_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, indices: Tensor | None, start: Tensor | None, end: Tensor | None,
    out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return gradients(q, k, v, scale, indices, start, end, not_captured(q), out, lse, dout, dlse)


def not_captured(x):
    """Whether the host may read a tensor where a gradient is wanted, also in `unchecked_values`."""
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _keep_mha(ctx, inputs, output):
    q, k, v, ctx.scale, indices, start, end = inputs
    ctx.save_for_backward(q, k, v, indices, start, end, *output)
    ctx.set_materialize_grads(False)


def _of_mha(ctx, dout, dlse):
    q, k, v, indices, start, end, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    grads = torch.ops.dsa_kernels.mha_attention_backward(q, k, v, ctx.scale, indices, start, end, out, lse, dout, dlse)
    return *grads, None, None, None, None


by_heads = operator("mha_attention", _mha_attention)
by_heads.register_fake(
    lambda q, k, v, *_: (
        q.new_empty(q.shape[0], q.shape[1], v.shape[2]),
        q.new_empty(q.shape[:2], dtype=torch.float32),
    )
)
by_heads.register_autograd(first_order("mha_attention", _of_mha), setup_context=_keep_mha)
operator("mha_attention_backward", _mha_attention_backward).register_fake(
    lambda q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
)
