"""The readable reference of DeepSeek Sparse Attention: every step as loops (`*_loops`) and as PyTorch.

`dsa_kernels` exports the same step functions with the same contracts; a layer takes either package as its `ops`.
Docstrings cite `dsa_ref/SPEC.md` as SPEC, by section.
"""

from .config import TINY, V32, DSAConfig
from .contracts import unchecked_values
from .dense_attention import dense_attention, dense_attention_loops, mha_attention
from .hadamard import hadamard, hadamard_loops
from .index_scores import index_scores, index_scores_loops
from .indexer_loss import indexer_loss, indexer_loss_loops
from .lightning_select import lightning_select, lightning_select_loops
from .quantize import dequantize, quantize, quantize_loops
from .rope import rope, rope_frequencies, rope_loops
from .rotate_quantize import rotate_quantize, rotate_quantize_loops
from .select_topk import select_topk, select_topk_loops
from .sparse_attention import sparse_attention, sparse_attention_loops
from .version import __version__ as __version__

# isort: split
from .nn import DSALayer, LayerCache, load_layer  # after the steps: a layer's default ops is this package

__all__ = [
    "TINY", "V32", "DSAConfig", "DSALayer", "LayerCache", "dense_attention", "dense_attention_loops", "dequantize",
    "hadamard", "hadamard_loops", "index_scores", "index_scores_loops", "indexer_loss", "indexer_loss_loops",
    "lightning_select", "lightning_select_loops", "load_layer", "mha_attention", "quantize", "quantize_loops",
    "rope", "rope_frequencies", "rope_loops", "rotate_quantize", "rotate_quantize_loops", "select_topk",
    "select_topk_loops", "sparse_attention", "sparse_attention_loops", "unchecked_values",
]  # fmt: skip
