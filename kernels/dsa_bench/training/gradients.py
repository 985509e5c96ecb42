"""Sparse attention's backward at V3.2's sizes, and what the sparse stage's KL adds to it, beside what others have.

Work: 5504 FLOPs a selected pair and head, five products of which three have 576 columns and two 512. For scale: dense
attention's backward in MHA mode for as many queries at the end of as many keys, with its own work.
"""

import torch

import dsa_kernels
import dsa_ref
from dsa_ref import V32

from .. import inputs
from ..cases import K
from . import losses, peers
from .checks import GRADIENT_ERROR, ROW_ERROR, check_gradients, check_target
from .run import Call, Case

SUMS = ("sorted", "atomic")


def backward_flops(H, selected, config=V32):
    """FLOPs of attention's backward with H heads over `selected` (query, key) pairs in MQA mode."""
    return 2 * H * (3 * config.latent_dim + 2 * config.kv_lora_rank) * selected


def attention_gradients(T, S, H, k=K, config=V32, device="cuda", seed=0):
    """(q, kv, indices, scale, out, lse, dout): the forward pass by ours, and normal gradients of its output."""
    q, kv, scale = inputs.attention_inputs(T, S, H, seed, device, config)
    indices = inputs.random_indices(T, S, k, seed, device)
    out, lse = dsa_kernels.sparse_attention(q, kv, indices, scale, config.kv_lora_rank)
    generator = torch.Generator(device).manual_seed(seed + 1)
    dout = torch.randn(out.shape, generator=generator, device=device).to(out.dtype)
    return q, kv, indices, scale, out, lse, dout


def wanted_gradients(q, kv, indices, scale, out, lse, dout):
    """({"dq", "dkv"}, target) of the reference in fp32 from the same out and lse, which the forward pass has judged.

    From an out of its own, in fp32, it would blame the backward pass for out's bf16: where one key has nearly all of
    a head's weight, dS is what is left of dP after delta, the sum of out · dout, and a bit of out may be a third of it.
    """
    q, kv, out, dout = (tensor.float() for tensor in (q, kv, out, dout))
    dq, dkv, target = dsa_ref.sparse_attention_backward(q, kv, indices, scale, dout.shape[2], out, lse, dout)
    return {"dq": dq, "dkv": dkv}, target


def gradient_case(T, S, H, k=K, config=V32, device="cuda"):
    """Ours by both sums, the peers, and, at the model's number of heads, the KL over the same lists."""
    q, kv, indices, scale, out, lse, dout = given = attention_gradients(T, S, H, k, config, device)
    wanted, wanted_target = wanted_gradients(*given)
    v_dim = config.kv_lora_rank
    selected = int((indices >= 0).sum())
    work = backward_flops(H, selected, config)

    def check(result):
        *gradients, target = result
        return f"{check_gradients(gradients, wanted)}, {check_target(target, wanted_target)}"

    def ours(sums):
        return lambda: dsa_kernels.sparse_attention_backward(q, kv, indices, scale, v_dim, out, lse, dout, sums=sums)

    calls = {sums: Call(ours(sums), check, work) for sums in SUMS}
    theirs = {
        "TileLang": peers.TileLang(peers.EXAMPLE, *given),
        "TileLang, miles": peers.TileLang(peers.MILES, *given),
        "torch, gather": peers.Gathered(*given),
    }
    for who, peer in theirs.items():
        bounds = getattr(peer, "bounds", (GRADIENT_ERROR, ROW_ERROR))
        calls[who] = Call(
            peer, lambda found, bounds=bounds: check_gradients(found, wanted, *bounds), work, False,
            getattr(peer, "eager", None), getattr(peer, "whole", None),
        )  # fmt: skip
    who, dense = next(iter(peers.dense_backwards(T, S, H, config, device).items()))
    calls[who] = Call(dense, dense.check, dense.work, ours=False)
    if H == config.n_heads:
        calls |= losses.sparse_calls(T, S, q, kv, indices, scale, lse, wanted_target, config, device)
    return Case(calls, against="sorted", facts={"pairs": selected})
