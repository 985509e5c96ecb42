"""The versions of `select_topk`, in the order in which they were made.

All are in use, so none is a copy in this folder: "radix", "sampled" and "listed" are the files of those names in
`dsa_kernels/topk/`, "hopper" is `dsa_kernels/hopper/select_topk.py`. `kernels/book/select_topk.md` tells their history.
"""

from ..version import Version

CASE = "4096 x 128K independent"  # the shape that they are compared on


VERSIONS = {
    "radix": Version(
        "Four passes with a histogram a byte, and one that writes.",
        (4.5, "ms"),
        "five reads of the scores at the copy ceiling of an H100, 2.37 TB/s, if histograms were free",
    ),
    "sampled": Version(
        "A bound from a sample, one read into a list, an exact choice from the list.",
        (1.2, "ms"),
        "one read and a sample at the copy ceiling, and as much again for list and choice",
    ),
    "listed": Version(
        "Three kernels: bound, scan into one list a thread, choice; the scan needs few registers.",
        (1.55, "ms"),
        "bound 0.13 and choice 0.46 ms, as measured in the fused kernel, and a scan at the copy ceiling",
    ),
    "hopper": Version(
        "Gluon: bound, scan and choice of a row in one program, four on a multiprocessor, so that reads go on.",
        (1.2, "ms"),
        "the scan of listed, 1.08 ms, and the sample's bytes, 0.1; the choice is hidden",
    ),
}
