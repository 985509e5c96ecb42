"""The versions of `sparse_attention`, in the order in which they were made.

Those that lost are copies in files of their own, but for "one tile a program", which is a launch of persistent's copy;
"early hand-over" is the kernel that runs today.
"""

import functools
import importlib

import dsa_kernels

from ..version import Version

CASE = "4096 x 32K, 128 heads, random"  # the shape that they are compared on


def _copy(name, q, kv, indices, scale, v_dim):
    """Run the copy in the file `name` beside this one. It is imported here, since Triton's interpreter has no Gluon."""
    copy = importlib.import_module(f"dsa_bench.ladder.sparse_attention.{name}")
    return copy.sparse_attention(q, kv, indices, scale, v_dim)


VERSIONS = {
    "portable": Version(
        "Plain Triton: one program for 64 heads of a query.",
        (287.0, "TFLOP/s"),
        "a study in plain Triton reached it on an H200: both warpgroups compute the same rows of QK^T",
    ),
    "one tile a program": Version(
        "Gluon: one warpgroup gathers, two multiply, each with half of the output.",
        (548.0, "TFLOP/s"),
        "a study in Gluon, with the mask for -1, reached it on an H200",
        call=functools.partial(_copy, "one_tile_a_program"),
    ),
    "persistent": Version(
        "A program walks over many tiles and gathers the next one's keys while it finishes this one.",
        (565.0, "TFLOP/s"),
        "62.1 waves of tiles become one: no half-empty last wave, no start-up between tiles; 3 %",
        call=functools.partial(_copy, "persistent"),
    ),
    "rare rescaling": Version(
        "The output is rescaled only where the running maximum grew by more than a threshold.",
        (575.0, "TFLOP/s"),
        "a guess of 2 %: 256 multiplications a thread and block fewer, where most are hidden already",
        call=functools.partial(_copy, "rare_rescaling"),
    ),
    "early hand-over": Version(
        "Probabilities go to the other warpgroup before one's own product with the values is waited for.",
        (580.0, "TFLOP/s"),
        "a guess of 1 %: some of a wait of a barrier's length each block",
        call=functools.partial(dsa_kernels.sparse_attention, variant="hopper"),
    ),
}
