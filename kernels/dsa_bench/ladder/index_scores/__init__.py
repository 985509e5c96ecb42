"""The versions of `index_scores`, in the order in which they were made."""

import importlib

import torch

from ..version import Version

CASE = "4096 x 128K"  # the shape that they are compared on


def _hopper_scores(name):
    def call(q_idx, k_idx, w, k_scale, start, end):
        out = torch.empty(len(q_idx), len(k_idx), device=q_idx.device)
        hopper = importlib.import_module("dsa_kernels.hopper.index_scores")
        hopper.index_scores(q_idx, k_idx, w, k_scale, start, end, out, name)
        return out

    return call


VERSIONS = {
    "portable": Version(
        "One program for four queries; every program fetches its own tiles of keys.",
        (1000.0, "TFLOP/s"),
        "the study of it in plain Triton, on an H200 (KERNELS.md)",
    ),
    "whole": Version(
        "Gluon: one warp brings tiles by TMA, two warpgroups multiply four queries at once; relu as x + |x|.",
        (1050.0, "TFLOP/s"),
        "the Gluon study, on an H200: 1034 to 1065 (KERNELS.md)",
        call=_hopper_scores("whole"),
    ),
    "turns": Version(
        "Products of two queries, weighed while the next two are multiplied; warpgroups strictly in turn.",
        (1150.0, "TFLOP/s"),
        "a kernel without ranges that did so, on an H100: 1121; and a fourth of the scores to mask and store: 2 %",
        kept=False,
        call=_hopper_scores("turns"),
    ),
    "maximum": Version(
        "As halves, but relus are maxima with 0, which run at half the rate of additions; NaN is lost.",
        (1000.0, "TFLOP/s"),
        "128 of 600 clocks more for a tile's relus and weights, half of them hidden",
        kept=False,
        call=_hopper_scores("maximum"),
    ),
    "saturate": Version(
        "As halves, but relus are products that saturate at 0 and 1; NaN is lost.",
        (1000.0, "TFLOP/s"),
        "it lost 13 % in the study in plain Triton (KERNELS.md)",
        kept=False,
        call=_hopper_scores("saturate"),
    ),
    "halves": Version(
        "As turns, without them: the tensor cores take whoever comes. What `hopper` runs.",
        (1150.0, "TFLOP/s"),
        "the prediction of turns, which it was tried beside: none of its own was made",
        call=_hopper_scores("halves"),
    ),
}
