"""The versions of `sparse_attention`, in the order in which they were made."""

import importlib

import torch

from ..version import Version

CASE = "4096 x 32K, 128 heads, random"  # the shape that they are compared on


def _hopper_attention(name):
    def call(q, kv, indices, scale, v_dim):
        out = torch.empty(*q.shape[:2], v_dim, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        importlib.import_module("dsa_kernels.hopper.sparse_attention").sparse_attention(
            q, kv, indices, scale, out, lse, version=name
        )
        return out, lse

    return call


VERSIONS = {
    "portable": Version(
        "Plain Triton: one program for 64 heads of a query.",
        (287.0, "TFLOP/s"),
        "the study in plain Triton, on an H200: both warpgroups compute the same rows of QK^T (KERNELS.md)",
    ),
    "one tile a program": Version(
        "Gluon: one warpgroup gathers, two multiply, each with half of the output.",
        (548.0, "TFLOP/s"),
        "the Gluon study with the -1 mask, on an H200 (KERNELS.md)",
        call=_hopper_attention("one tile a program"),
    ),
    "persistent": Version(
        "A program walks over many tiles and gathers the next one's keys while it finishes this one.",
        (565.0, "TFLOP/s"),
        "62.1 waves of tiles become one: no half-empty last wave, no start-up between tiles; 3 %",
        call=_hopper_attention("persistent"),
    ),
    "rare rescaling": Version(
        "The output is rescaled only where the running maximum grew by more than a threshold.",
        (575.0, "TFLOP/s"),
        "a guess of 2 %: 256 multiplications a thread and block fewer, where most are hidden already",
        call=_hopper_attention("rare rescaling"),
    ),
    "early hand-over": Version(
        "Probabilities go to the other warpgroup before one's own product with the values is waited for.",
        (580.0, "TFLOP/s"),
        "a guess of 1 %: some of a wait of a barrier's length each block",
        call=_hopper_attention("early hand-over"),
    ),
}
