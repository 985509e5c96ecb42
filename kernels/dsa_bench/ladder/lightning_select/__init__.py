"""The versions of `lightning_select`, in the order in which they were made.

Both are in use: "portable" is `dsa_kernels/lightning_select.py` with portable kernels in both its steps, "hopper" is
`dsa_kernels/hopper/lightning_select.py`.
"""

from ..version import Version

CASE = "4096 x 128K"  # the shape that they are compared on


VERSIONS = {
    "portable": Version(
        "Scores of some rows to memory, then select_topk; two kernels that meet in 1 GiB.",
        (11.9, "ms"),
        "the sum of portable index_scores and select_topk, 9.9 and 2.0 ms on an H100",
    ),
    "hopper": Version(
        "A sampled bound; the scan appends what reaches it to 64 lists a row; no score matrix.",
        (9.0, "ms"),
        "index_scores in 8.2 ms, 1/32 of it for the sample, and half a millisecond for the choice",
    ),
}
