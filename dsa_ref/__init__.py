"""The readable reference of DeepSeek Sparse Attention: every step as loops (`*_loops`) and as PyTorch.

`dsa_kernels` exports the same step functions with the same contracts; a layer takes either package as its `ops`.
Docstrings cite `dsa_ref/SPEC.md` as SPEC, by section.
"""

from .append import append_index, append_latents, head_weights, index_queries, place_tokens, rms_norm, turn_into
from .config import TINY, V32, DSAConfig
from .contracts import unchecked_values
from .decode import (
    merge_parts,
    merge_parts_loops,
    paged_index_scores,
    paged_index_scores_loops,
    paged_select,
    paged_select_loops,
    paged_sparse_attention,
    paged_sparse_attention_loops,
)
from .dense_attention import dense_attention, dense_attention_loops, mha_attention
from .hadamard import hadamard, hadamard_loops
from .index_scores import index_scores, index_scores_loops
from .indexer_loss import indexer_loss, indexer_loss_loops
from .lightning_select import lightning_select, lightning_select_loops
from .page_table import PageTable
from .paged import (
    pack_index,
    pack_index_loops,
    pack_kv,
    pack_kv_loops,
    unpack_index,
    unpack_index_loops,
    unpack_kv,
    unpack_kv_loops,
    write_index,
    write_kv,
)
from .paged_cache import PagedCache, SequenceCache
from .quantize import dequantize, quantize, quantize_loops
from .rope import rope, rope_frequencies, rope_loops
from .rotate_quantize import rotate_quantize, rotate_quantize_loops
from .select_topk import select_topk, select_topk_loops
from .sparse_attention import sparse_attention, sparse_attention_loops
from .sparse_attention_backward import sparse_attention_backward, sparse_attention_backward_loops
from .version import __version__ as __version__

# isort: split
from .nn import DSALayer, LayerCache, load_layer  # after the steps: a layer's default ops is this package

__all__ = [
    "TINY", "V32", "DSAConfig", "DSALayer", "LayerCache", "PageTable", "PagedCache", "SequenceCache", "append_index",
    "append_latents", "dense_attention", "dense_attention_loops", "dequantize", "hadamard", "hadamard_loops",
    "head_weights", "index_queries", "index_scores", "index_scores_loops", "indexer_loss", "indexer_loss_loops",
    "lightning_select", "lightning_select_loops", "load_layer", "merge_parts", "merge_parts_loops", "mha_attention",
    "pack_index", "pack_index_loops", "pack_kv", "pack_kv_loops", "paged_index_scores", "paged_index_scores_loops",
    "paged_select", "paged_select_loops", "paged_sparse_attention", "paged_sparse_attention_loops", "place_tokens",
    "quantize", "quantize_loops", "rms_norm", "rope", "rope_frequencies", "rope_loops", "rotate_quantize",
    "rotate_quantize_loops", "select_topk", "select_topk_loops", "sparse_attention", "sparse_attention_backward",
    "sparse_attention_backward_loops", "sparse_attention_loops", "turn_into", "unchecked_values", "unpack_index",
    "unpack_index_loops", "unpack_kv", "unpack_kv_loops", "write_index", "write_kv",
]  # fmt: skip
