"""The three rungs of the ladder under one set of names: NumPy loops, the PyTorch reference, the Triton kernels."""

import importlib.util
import types

import torch

import dsa_ref

if importlib.util.find_spec("triton"):
    import dsa_kernels  # before any test can import triton (transformers does): it decides whether to interpret

NAMES = ("loops", "reference", "kernels")


class NoTriton(Exception):
    """Triton cannot be imported on this platform."""


def has_triton():
    return importlib.util.find_spec("triton") is not None


def load(name):
    """The namespace of a rung. Raises NoTriton for "kernels" where there is no triton."""
    if name == "kernels":
        if not has_triton():
            raise NoTriton
        return dsa_kernels
    return {"loops": LOOPS, "reference": dsa_ref}[name]


def _array(x):
    """What a loop form eats: float64 for floats, integers as they are, anything else untouched."""
    if not isinstance(x, torch.Tensor):
        return x
    return x.detach().cpu().double().numpy() if x.is_floating_point() else x.cpu().numpy()


def _call(loops, *args, **kwargs):
    return loops(*(_array(x) for x in args), **{name: _array(x) for name, x in kwargs.items()})


def _back(array, like, dtype=torch.float32):
    return torch.tensor(array).to(device=like.device, dtype=dtype)


def _rope(x, positions, freqs, layout):
    wide = x if x.dim() == 3 else x[:, None]
    return _back(_call(dsa_ref.rope_loops, wide, positions, freqs, layout), x, x.dtype).reshape(x.shape)


def _hadamard(x):
    return _back(_call(dsa_ref.hadamard_loops, x.reshape(-1, x.shape[-1])), x, x.dtype).reshape(x.shape)


def _quantize(x):
    values, scale = _call(dsa_ref.quantize_loops, x.reshape(-1, x.shape[-1]))
    return _back(values, x, torch.float8_e4m3fn).reshape(x.shape), _back(scale, x).reshape(x.shape[:-1])


def _rotate_quantize(x, positions, freqs):
    wide = x if x.dim() == 3 else x[:, None]
    values, scale = _call(dsa_ref.rotate_quantize_loops, wide, positions, freqs)
    return _back(values, x, torch.float8_e4m3fn).reshape(x.shape), _back(scale, x).reshape(x.shape[:-1])


def _index_scores(q_idx, k_idx, w, k_scale=None, start=None, end=None):
    return _back(_call(dsa_ref.index_scores_loops, q_idx, k_idx, w, k_scale, start, end), q_idx)


def _select_topk(scores, k, start=None, end=None):
    return _back(_call(dsa_ref.select_topk_loops, scores, k, start, end), scores, torch.int32)


def _lightning_select(q_idx, k_idx, w, k, k_scale=None, start=None, end=None):
    return _back(_call(dsa_ref.lightning_select_loops, q_idx, k_idx, w, k, k_scale, start, end), q_idx, torch.int32)


def _sparse_attention(q, kv, indices, scale, v_dim):
    out, lse = _call(dsa_ref.sparse_attention_loops, q, kv, indices, scale, v_dim)
    return _back(out, q, q.dtype), _back(lse, q)


def _sparse_attention_backward(q, kv, indices, scale, v_dim, out, lse, dout, dlse=None, sums="sorted"):
    """There is one order of a sum in loops, whatever `sums` says."""
    dq, dkv, target = _call(dsa_ref.sparse_attention_backward_loops, q, kv, indices, scale, v_dim, out, lse, dout, dlse)
    return _back(dq, q, q.dtype), _back(dkv, q, q.dtype), _back(target, q)


def _dense_attention(q, kv, scale, v_dim, start=None, end=None):
    out, lse = _call(dsa_ref.dense_attention_loops, q, kv, scale, v_dim, start, end)
    return _back(out, q, q.dtype), _back(lse, q)


def _indexer_loss(
    q_idx, k_idx, w, q, kv, scale, indices=None, start=None, end=None, lse=None, target=None, reduction="mean"
):
    given = (q_idx, k_idx, w, q, kv, scale, indices, start, end, lse, target, reduction)
    return torch.tensor(_call(dsa_ref.indexer_loss_loops, *given))


def _paged_index_scores(q_idx, index_pages, w, page_table, lengths):
    return _back(_call(dsa_ref.paged_index_scores_loops, q_idx, index_pages, w, page_table, lengths), q_idx)


def _paged_select(q_idx, index_pages, w, k, page_table, lengths):
    chosen = _call(dsa_ref.paged_select_loops, q_idx, index_pages, w, k, page_table, lengths)
    return tuple(_back(x, q_idx, torch.int32) for x in chosen)


def _paged_sparse_attention(q, kv_pages, slots, scale, v_dim, splits=None):
    """One softmax, so in as many parts as one likes."""
    out, lse = _call(dsa_ref.paged_sparse_attention_loops, q, kv_pages, slots, scale, v_dim)
    return _back(out, q, q.dtype), _back(lse, q)


def _merge_parts(outs, lses):
    return tuple(_back(x, outs) for x in _call(dsa_ref.merge_parts_loops, outs, lses))


LOOPS = types.SimpleNamespace(
    __name__="loops",
    rope=_rope,
    hadamard=_hadamard,
    quantize=_quantize,
    rotate_quantize=_rotate_quantize,
    index_scores=_index_scores,
    select_topk=_select_topk,
    lightning_select=_lightning_select,
    sparse_attention=_sparse_attention,
    sparse_attention_backward=_sparse_attention_backward,
    dense_attention=_dense_attention,
    indexer_loss=_indexer_loss,
    paged_index_scores=_paged_index_scores,
    paged_select=_paged_select,
    paged_sparse_attention=_paged_sparse_attention,
    merge_parts=_merge_parts,
)
