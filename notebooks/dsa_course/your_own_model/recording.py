"""The steps of `dsa_ref`, which also note what they attended to: `make_sparse(model, ops=recording)`.

`make_sparse` takes any module that has the four steps and can be imported by its name. This is one.
"""

import contextlib
from collections.abc import Iterator

import dsa_ref
from dsa_ref import hadamard as hadamard
from dsa_ref import lightning_select as lightning_select
from dsa_ref import quantize as quantize

_notes = []  # where calls are noted: the lists of all `steps` that are open


@contextlib.contextmanager
def steps() -> Iterator[list[dict]]:
    """A list that gets one dict for each call of `sparse_attention` inside: "q", "kv", "indices" and "lse", on the CPU.

    One forward pass over one text makes one call a layer, in order, if it has more than index_topk tokens and is not so
    long that a layer works on it in parts.
    """
    noted = []
    _notes.append(noted)
    try:
        yield noted
    finally:
        _notes[:] = [other for other in _notes if other is not noted]


def sparse_attention(q, kv, indices, scale, v_dim):
    """As `dsa_ref.sparse_attention`, noted."""
    out, lse = dsa_ref.sparse_attention(q, kv, indices, scale, v_dim)
    for noted in _notes:
        given = {"q": q, "kv": kv, "indices": indices, "lse": lse}
        noted.append({name: value.detach().cpu() for name, value in given.items()})
    return out, lse
