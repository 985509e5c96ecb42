"""A few rows of a long context against the reference: selection by its contract, output with that selection.

For one row the layer's step written out runs once more with the reference's ops, on the cache up to that row. What it
computes must be what the layer had: the row's own keys, the scores of all keys so far, and with the layer's selection
the output. The selection itself is judged by the scores of the layer's own vectors, since scores that differ in their
last bits have other keys at the threshold.
"""

import contextlib
import dataclasses
import types
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import dsa_ref

from ..contracts import check_int
from ..index_scores import index_scores
from ..nn import DSALayer, LayerCache
from ..testing import Failed, compare_selection, relative_error

TIED = 1e-3  # of a row's largest score: what two ways of adding may change; FP8 tensor cores add with fewer bits
# Relative errors that are allowed, by the weights' dtype. A number that another sum rounds to the next FP8 value moves
# keys and scores; latent rows in pages, beside weights in bf16, are FP8 themselves.
KEYS = SCORES = {torch.bfloat16: 5e-2, torch.float32: 2e-2}
OUTPUT = {torch.bfloat16: 2e-2, torch.float32: 1e-3}
WRITTEN_OUT = ("rope", "rotate_quantize", "hadamard", "quantize", "sparse_attention")  # no small steps: no fused path


@dataclasses.dataclass(frozen=True)
class Row:
    """What a layer made of one token. position: its own; x, y [dim]: the layer's input and output; q_idx [Hi, Di],
    w fp32 [Hi], indices int32 [k]: as `record` has them; kv [S, D], k_idx [S, Di], k_scale [S]: all keys that it sees,
    its own last, S = position + 1."""

    position: int
    x: Tensor
    y: Tensor
    q_idx: Tensor
    w: Tensor
    indices: Tensor
    kv: Tensor
    k_idx: Tensor
    k_scale: Tensor


def rows_to_check(tokens: int, chunk: int, rows: int, seed: int) -> list[int]:
    """Positions to be checked, ascending: at each power of two up to `tokens`, and at the end, the last row before it
    and rows - 1 random ones, between half of it and it, out of the chunk that it ends in, so that few chunks are run
    again. None for rows = 0.

    Raises: TypeError for what is no int, ValueError for tokens or a chunk below 1, rows or a seed below 0.
    """
    for name, value, least in (("tokens", tokens, 1), ("chunk", chunk, 1), ("rows", rows, 0), ("seed", seed, 0)):
        check_int(name, value, least)
    generator, chosen = torch.Generator().manual_seed(seed), set()
    ends = {1 << n for n in range(tokens.bit_length())} | {tokens}
    for end in sorted(ends) if rows else ():
        first = max(end // 2, (end - 1) // chunk * chunk)
        chosen |= {end - 1, *torch.randint(first, end, (rows - 1,), generator=generator).tolist()}
    return sorted(chosen)


def written_out(layer: DSALayer) -> DSALayer:
    """The layer with the same weights on the reference's ops, and nothing but the written-out step to run.

    Its `lightning_select` gives what `ops.chosen` holds, the selection that is to be judged.
    """
    ops = types.SimpleNamespace(**{name: getattr(dsa_ref, name) for name in WRITTEN_OUT}, chosen=None)
    ops.lightning_select = lambda *_, **__: ops.chosen
    with torch.device("meta"):
        twin = DSALayer(layer.config, ops).to(layer.o_proj.weight.dtype)
    twin.to_empty(device=layer.o_proj.weight.device)
    twin.load_state_dict(layer.state_dict(), assign=True)
    return twin.requires_grad_(False)


@torch.no_grad()
def errors_of_row(twin: DSALayer, row: Row, where: str) -> dict[str, float]:
    """Pass for a right row, and say how far it is from the reference: {"keys", "scores", "output"}: relative errors.

    twin: what `written_out` made of the row's layer; where: what a message calls the row.

    Raises: Failed, whose property is "finite" (NaN or infinity in the keys or in what the row had), "keys" (the row's
    latent or index key is not the reference's), "vectors" (the indexer's query is not: all scores differ), one of
    `compare_selection`'s (the selection is not its contract's), or "output".
    """
    S, dtype = row.position + 1, row.kv.dtype
    scores = index_scores(row.q_idx[None], row.k_idx, row.w[None], row.k_scale)
    for name, tensor in (("kv", row.kv), ("x", row.x), ("y", row.y), ("the scores", scores)):
        if not tensor.isfinite().all():
            raise Failed(f"{where}: got NaN or infinity in {name}", "a value that never was one, or was lost", "finite")
    try:
        compare_selection(row.indices[None], scores, len(row.indices), tolerance=TIED)
    except Failed as failure:
        raise Failed(f"{where}: {failure.what}", failure.cause, failure.property) from None
    cache = LayerCache(twin.config, S, dtype, row.kv.device)
    cache.append(row.kv[:-1], row.k_idx[:-1], row.k_scale[:-1])
    twin.ops.chosen, record = row.indices[None], []
    y = twin(row.x[None], torch.tensor([row.position], device=row.x.device), cache, record=record)[0]
    (step,) = record
    expected = index_scores(step["q_idx"], step["k_idx"], step["w"], step["k_scale"])
    index_keys = (keys["k_idx"][-1].float() * keys["k_scale"][-1] for keys in (vars(row), step))
    errors = {
        "keys": max(relative_error(row.kv[-1], step["kv"][-1]), relative_error(*index_keys)),
        "scores": relative_error(scores, expected),
        "output": relative_error(row.y, y),
    }
    for name, most, broken, cause in (
        ("keys", KEYS[dtype], "keys", "the position, the norm or the rounding of a cached row"),
        ("scores", SCORES[dtype], "vectors", "the position or the rounding of the indexer's query, or its weights"),
        ("output", OUTPUT[dtype], "output", "attention does not take what was selected, or with another scale"),
    ):
        if not errors[name] <= most:
            raise Failed(f"{where}: {name} differ by {errors[name]:.1e}, expected at most {most}", cause, broken)
    return errors


@contextlib.contextmanager
def inputs_and_outputs(layers: Sequence[DSALayer]) -> Iterator[list[dict[str, Tensor]]]:
    """Inside, the input x and output y [T, dim] of each layer's last call, prefill's or decode's: {"x": ..., "y": ...}.

    Taken at the first and the last projection, as hooks on a layer itself do not see `decode`.
    """
    seen, handles = [{} for _ in layers], []
    for layer, own in zip(layers, seen, strict=True):
        handles += [
            layer.q_a_proj.register_forward_pre_hook(lambda _, given, own=own: own.update(x=given[0])),
            layer.o_proj.register_forward_hook(lambda _, __, out, own=own: own.update(y=out)),
        ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
