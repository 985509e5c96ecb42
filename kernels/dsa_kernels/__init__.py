"""The steps of DSA as Triton kernels, with the names, signatures and contracts of `dsa_ref`, only faster.

What takes part in training is differentiable, once: `sparse_attention`, `mha_attention`, `indexer_loss`, `rope` and
`hadamard`. These steps, the selection and the quantisation are operators of torch.library, too: see `autograd`.

`warm` compiles beforehand what a layer can need.

`dense_attention` has no kernel: `mha_attention` computes the same from decompressed heads.

Compiled on a GPU of compute capability 8.0 or newer, interpreted on a CPU; `mode()` says which.

Steps with more than one implementation take `variant`. "portable" and "hopper" name where the code comes from, this
package or `dsa_kernels.hopper`; `select_topk` also takes the names of its portable algorithms, and steps on FP8 take
"widened", which is portable and reads FP8 as cards without it do. A variant that is asked for holds in every step
inside the step: "portable" runs no code of `hopper`, and "hopper" runs it wherever there is some, but that rows which a
fast kernel flags are always redone by portable ones. None chooses, in each step by itself. What cannot serve the inputs
raises ValueError and says why.
"""

from .runtime import mode  # first: it decides how triton is imported

# isort: split
from dsa_ref.version import __version__ as __version__

from .append import append_index, append_latents, index_queries, place_tokens, rms_norm, turn_into
from .head_weights import head_weights
from .index_scores import index_scores
from .indexer_loss import indexer_loss
from .lightning_select import lightning_select
from .mha_attention import mha_attention
from .paged_index_scores import paged_index_scores
from .paged_select import paged_select
from .paged_sparse_attention import merge_parts, paged_sparse_attention
from .rotate_quantize import hadamard, quantize, rope, rotate_quantize
from .select_topk import select_topk
from .sparse_attention import sparse_attention
from .sparse_attention_backward import sparse_attention_backward
from .warm import warm

# isort: split
from . import autograd as autograd  # last: it makes operators of the steps

__all__ = [
    "append_index",
    "append_latents",
    "hadamard",
    "head_weights",
    "index_queries",
    "index_scores",
    "indexer_loss",
    "lightning_select",
    "merge_parts",
    "mha_attention",
    "mode",
    "paged_index_scores",
    "paged_select",
    "paged_sparse_attention",
    "place_tokens",
    "quantize",
    "rms_norm",
    "rope",
    "rotate_quantize",
    "select_topk",
    "sparse_attention",
    "sparse_attention_backward",
    "turn_into",
    "warm",
]
