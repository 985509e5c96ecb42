"""The versions of `index_scores`, in the order in which they were made."""

import importlib

import dsa_kernels

from ..version import Version

CASE = "4096 x 128K"  # the shape that they are compared on


def _copy(name):
    """What runs the version of which the file `name` is a copy. It needs Gluon, so it is imported when it runs."""

    def call(*inputs):
        return importlib.import_module(f".{name}", __name__).index_scores(*inputs)

    return call


def _production(*inputs):
    return dsa_kernels.index_scores(*inputs, variant="hopper")


VERSIONS = {
    "portable": Version(
        "One program for four queries; every program fetches its own tiles of keys.",
        (1000.0, "TFLOP/s"),
        "a study of this kernel in plain Triton, on an H200, reached 1000",
    ),
    "whole": Version(
        "Gluon: one warp brings tiles by TMA, two warpgroups multiply four queries at once; relu as x + |x|.",
        (1050.0, "TFLOP/s"),
        "a study of this kernel in Gluon, on an H200, reached 1034 to 1065",
        call=_copy("whole"),
    ),
    "turns": Version(
        "Products of two queries, weighed while the next two are multiplied; warpgroups strictly in turn.",
        (1150.0, "TFLOP/s"),
        "a kernel without ranges that did so, on an H100: 1121; and a fourth of the scores to mask and store: 2 %",
        kept=False,
        call=_copy("turns"),
    ),
    "maximum": Version(
        "As halves, but relus are maxima with 0, which run at half the rate of additions; NaN is lost.",
        (1000.0, "TFLOP/s"),
        "128 of 600 clocks more for a tile's relus and weights, half of them hidden",
        kept=False,
        call=_copy("maximum"),
    ),
    "saturate": Version(
        "As halves, but relus are products that saturate at 0 and 1; NaN is lost.",
        (1000.0, "TFLOP/s"),
        "such relus made a kernel in plain Triton, on an H200, slower by 13 %",
        kept=False,
        call=_copy("saturate"),
    ),
    "halves": Version(
        "As turns, without them: the tensor cores take whoever comes. What `hopper` runs.",
        (1150.0, "TFLOP/s"),
        "the prediction of turns, which it was tried beside: none of its own was made",
        call=_production,
    ),
}
