"""Every step measured on a GPU, beside the public kernels that are installed: `python -m dsa_bench --help`.

A case is first checked against the reference, then timed: ours and its peers on the same inputs, in the same run,
interleaved. `cases` holds the shapes, `peers` the other implementations (none is required), `ladder` the versions of
each step that were tried on the way.
"""
