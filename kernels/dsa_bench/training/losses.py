"""The indexer's KL of both stages, forward and backward in one call, as a training step runs it.

The sparse stage is measured beside attention's backward over the same lists: its target comes out of that. The dense
warm-up, which attends to all keys with all heads, is measured beside the backward of dense attention of the same sizes.
"""

import torch

import dsa_kernels
import dsa_ref
from dsa_ref import V32

from .. import inputs
from . import peers
from .checks import check_gradients, check_loss
from .run import Call, Case

SPARSE = ("KL, target given", "KL, lse given")
WARM_UP = "KL, dense"


def indexer_side(T, S, config=V32, device="cuda", seed=2):
    """(q_idx bf16 [T, Hi, Di], k_idx bf16 [S, Di], w fp32 [T, Hi]) that want gradients: scores of about N(0, 1)."""
    generator = torch.Generator(device).manual_seed(seed)
    Hi, Di = config.index_n_heads, config.index_head_dim

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    q_idx, k_idx, w = normal(T, Hi, Di).bfloat16(), normal(S, Di).bfloat16(), normal(T, Hi) * (Hi * Di) ** -0.5
    return [tensor.requires_grad_() for tensor in (q_idx, k_idx, w)]


def loss_and_gradients(ops, leaves, *attention, **given):
    """(loss, gradients of the leaves (q_idx, k_idx, w)...) of `ops.indexer_loss`."""
    with torch.enable_grad():
        loss = ops.indexer_loss(*leaves, *attention, **given)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def checked(leaves, *attention, **given):
    """A check of `loss_and_gradients` against the reference's in fp32."""
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    attention = [part.float() if isinstance(part, torch.Tensor) else part for part in attention]
    wanted_loss, *gradients = loss_and_gradients(dsa_ref, wide, *attention, **given)
    wanted = dict(zip(("dq_idx", "dk_idx", "dw"), gradients, strict=True))

    def check(result):
        loss, *found = result
        return f"{check_gradients(found, wanted)}, {check_loss(loss, wanted_loss)}"

    return check


def sparse_calls(T, S, q, kv, indices, scale, lse, target, config=V32, device="cuda"):
    """{who: Call} of the sparse stage: with attention's target given, and computed from its log-sum-exp."""
    leaves = indexer_side(T, S, config, device)
    nothing, attention = (None, None, None), (q, kv, scale)
    check = checked(leaves, *nothing, indices=indices, target=target)
    ways = ((nothing, {"target": target}), (attention, {"lse": lse}))
    return {
        who: Call(lambda a=a, more=more: loss_and_gradients(dsa_kernels, leaves, *a, indices=indices, **more), check)
        for who, (a, more) in zip(SPARSE, ways, strict=True)
    }


def warm_up_case(T, H=V32.n_heads, config=V32, device="cuda"):
    """The dense stage on T tokens, beside the backward of dense attention in MHA mode on as many."""
    q, kv, scale = inputs.attention_inputs(T, T, H, device=device, config=config)
    lse = dsa_ref.dense_attention(q.float(), kv.float(), scale, config.kv_lora_rank)[1]
    leaves = indexer_side(T, T, config, device)
    check = checked(leaves, q, kv, scale, lse=lse)
    run = {
        WARM_UP: lambda: loss_and_gradients(dsa_kernels, leaves, q, kv, scale, lse=lse),
        f"{WARM_UP}, lse computed": lambda: loss_and_gradients(dsa_kernels, leaves, q, kv, scale),
    }
    calls = {who: Call(call, check) for who, call in run.items()}
    for who, dense in peers.dense_backwards(T, T, H, config, device).items():
        calls[who] = Call(dense, dense.check, dense.work, ours=False)
    return Case(calls, against=peers.DENSE[0])
