"""The public kernels that ours are measured beside, behind thin functions with our names for things.

None is a requirement. A function whose library cannot serve here raises `Missing`, whose text says why;
`available()` asks all of them at once. Symbols: T queries, S keys, H heads, k selected keys.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import pathlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SGLANG_K = 2048  # the only k that SGLang's kernel takes
FLASHMLA_HEADS = 64  # FlashMLA takes 64 or 128 heads
FLASHMLA_V = 512


class Missing(Exception):
    """A peer that cannot be used here; the text says why."""


def available():
    """{name: None where the peer can be used, else the reason} for every peer."""
    reasons = {}
    for name, load in LOADERS.items():
        try:
            load()
            reasons[name] = None
        except Missing as reason:
            reasons[name] = str(reason)
    return reasons


def versions():
    """{distribution: version} of the peers' packages that are installed."""
    found = {}
    for name in ("sgl-deep-gemm", "deep-gemm", "sglang-kernel", "sgl-kernel"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def _deep_gemm():
    if not torch.cuda.is_available():
        raise Missing("needs a CUDA GPU")
    try:
        module = importlib.import_module("deep_gemm")
    except Exception as error:  # its import runs a loader of its own, which fails in many ways
        raise Missing(f"import deep_gemm: {type(error).__name__}: {error}") from error
    if not hasattr(module, "fp8_mqa_logits"):
        raise Missing(f"deep_gemm {getattr(module, '__version__', '')} has no fp8_mqa_logits")
    return module


@functools.cache
def _sgl_kernel(library, op):
    """The operator `op` of one compiled library of the package sgl_kernel, without importing the package."""
    if not torch.cuda.is_available():
        raise Missing("needs a CUDA GPU")
    if torch.cuda.get_device_capability() != (9, 0):
        raise Missing("its library is compiled for compute capability 9.0")
    spec = importlib.util.find_spec("sgl_kernel")
    if spec is None:
        raise Missing("no package sgl_kernel (on PyPI: sglang-kernel)")
    for folder in spec.submodule_search_locations:
        path = pathlib.Path(folder, library)
        if path.exists():
            break
    else:
        raise Missing(f"sgl_kernel has no {library}")
    try:
        torch.ops.load_library(str(path))
        return getattr(torch.ops.sgl_kernel, op)
    except (OSError, AttributeError, RuntimeError) as error:
        raise Missing(f"sgl_kernel/{library}: {error}") from error


def _sglang_topk():
    return _sgl_kernel("sm90/common_ops.abi3.so", "fast_topk")


def _flashmla():
    return _sgl_kernel("flashmla_ops.abi3.so", "sparse_prefill_fwd")


def _cudnn():
    if not torch.cuda.is_available():
        raise Missing("needs a CUDA GPU")
    if not torch.backends.cudnn.is_available():
        raise Missing("this torch has no cuDNN")


def _torch():
    if not torch.cuda.is_available():
        raise Missing("needs a CUDA GPU")


LOADERS = {
    "DeepGEMM": _deep_gemm,
    "SGLang": _sglang_topk,
    "FlashMLA": _flashmla,
    "torch": _torch,
    "cuDNN": _cudnn,
}


def deepgemm_scores(q_idx, k_idx, w, k_scale, start, end, clean=False):
    """Index scores by DeepGEMM: fp32 [T, S], a view whose rows are some keys further apart than S.

    q_idx: e4m3 [T, Hi, Di]; k_idx: e4m3 [S, Di]; w: fp32 [T, Hi]; k_scale: fp32 [S]; start, end: int32 [T].
    clean: fill what lies outside of start and end with -inf, in a second kernel. Without it (as serving engines call
    it, whose selection takes the ranges) such places hold scores of invisible keys or old memory.
    """
    logits = _deep_gemm().fp8_mqa_logits(q_idx, (k_idx, k_scale), w, start, end, clean_logits=clean)
    return logits if isinstance(logits, torch.Tensor) else torch.from_dlpack(logits)


def sglang_topk(scores, lengths, k=SGLANG_K):
    """Selection by SGLang: int32 [T, k], where the k largest of scores[t, :lengths[t]] stand, -1 where there are less.

    scores: fp32 [T, S] with any distance between rows; lengths: int32 [T]; k: 2048. It looks at 8 bits of each score
    first and keeps a bounded number of candidates, so that very long rows come out wrong.
    """
    if k != SGLANG_K:
        raise Missing(f"takes k = {SGLANG_K} only, got {k}")
    indices = scores.new_empty(scores.shape[0], k, dtype=torch.int32)
    _sglang_topk()(scores, indices, lengths, None)
    return indices


def flashmla_prefill(q, kv, indices, scale):
    """Sparse attention by FlashMLA: (out bf16 [T, H, 512], lse fp32 [T, H] as it gives it).

    q: bf16 [T, H, 576] with H of 64 or 128; kv: bf16 [S, 576]; indices: int32 [T, k] with -1 for nothing, k a multiple
    of 128. Its documentation gives lse in base 2.
    """
    out, _, lse = _flashmla()(q, kv[:, None], indices[:, None], scale, FLASHMLA_V, None, None)
    return out, lse


def padded_heads(q):
    """q [T, H, D] with zero heads appended up to the 64 or 128 that FlashMLA takes."""
    return F.pad(q, (0, 0, 0, -q.shape[1] % FLASHMLA_HEADS)).contiguous()


def torch_topk(scores, k):
    """Selection by torch.topk, unsorted: int64 [T, k]. It does not promise which of equal scores it keeps.

    scores: fp32 [T, S], -inf where a row may not look.
    """
    return scores.topk(k, sorted=False).indices


def cudnn_attention(q, k, v, scale):
    """Dense causal attention in MHA mode by cuDNN, through torch's SDPA: bf16 [H, T, V].

    q, k: bf16 [H, T, 192]; v: bf16 [H, T, 128]; as many queries as keys.
    """
    _cudnn()
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale)[0]


def fp8_matmul(a, b):
    """a [M, K] times b [N, K] transposed, e4m3 to bf16, as fast as cuBLAS does it (fast accumulation)."""
    _torch()
    one = torch.ones((), device=a.device)
    return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


class PagedScores:
    """A decode step's index scores by DeepGEMM: fp32 [B · N, S], not cleaned, from the same pages as ours.

    q_idx: e4m3 [B, N, Hi, Di]; index_pages: uint8 [pages, 64 · (Di + 4)]; w: fp32 [B, N, Hi]; page_table: int32 [B, P];
    seen: int32 [B, N], what each query sees. Its plan, a function of `seen`, is made at the first call.
    """

    def __init__(self, q_idx, index_pages, w, page_table, seen):
        Di = q_idx.shape[3]
        self.page = index_pages.shape[1] // (Di + 4)
        self.pages = index_pages.view(len(index_pages), self.page, 1, Di + 4)
        self.q_idx, self.w, self.page_table, self.seen = q_idx, w.flatten(0, 1), page_table, seen
        self.plan = None

    def __call__(self):
        library = _deep_gemm()
        if not hasattr(library, "fp8_paged_mqa_logits"):
            raise Missing(f"deep_gemm {getattr(library, '__version__', '')} has no fp8_paged_mqa_logits")
        if self.plan is None:
            self.plan = library.get_paged_mqa_logits_metadata(self.seen, self.page, library.get_num_sms())
        width = self.page_table.shape[1] * self.page
        logits = library.fp8_paged_mqa_logits(
            self.q_idx, self.pages, self.w, self.seen, self.page_table, self.plan, width, False
        )
        return logits if isinstance(logits, torch.Tensor) else torch.from_dlpack(logits)


def apart(q_idx, index_pages, w, page_table, seen):
    """PagedScores with each query as a sequence of its own, for the N that DeepGEMM does not take."""
    N = q_idx.shape[1]
    one = q_idx.flatten(0, 1)[:, None], w.flatten(0, 1)[:, None], page_table.repeat_interleave(N, dim=0)
    return PagedScores(one[0], index_pages, one[1], one[2], seen.flatten()[:, None].contiguous())


class SlotSelection:
    """Selection by SGLang that gives physical slots, translated in its kernel: int32 [B · N, 2048].

    page_table: int32 [B, P] of pages of `page` tokens; seen: int32 [B, N]. It reads a table with an entry a token,
    which is made here, outside of what is timed.
    """

    def __init__(self, page_table, seen, page):
        B, N = seen.shape
        within = torch.arange(page, dtype=torch.int32, device=page_table.device)
        self.tokens = (page_table[:, :, None] * page + within).flatten(1).contiguous()
        self.starts = torch.arange(0, B * N + 1, N, dtype=torch.int32, device=page_table.device)
        self.lengths = seen.flatten()

    def __call__(self, scores):
        select = _sgl_kernel("sm90/common_ops.abi3.so", "fast_topk_transform_fused")
        slots = scores.new_empty(scores.shape[0], SGLANG_K, dtype=torch.int32)
        select(scores, self.lengths, slots, self.tokens, self.starts, None)
        return slots


class _Planned:
    """A decode kernel of FlashMLA, whose plan is made by its first call and given to those that follow."""

    op = ""

    def __init__(self):
        self.plan = None, None

    def call(self, *before, after):
        """(out, lse [B, N, H]) of the operator, its plan between the arguments before and after."""
        out, lse, *plan = _sgl_kernel("flashmla_ops.abi3.so", self.op).default(*before, *self.plan, *after)
        self.plan = tuple(plan)
        return out, lse.transpose(1, 2)


class FlashMLADecode(_Planned):
    """Sparse attention of a decode step by FlashMLA on FP8 rows: (out bf16 [B, N, H, 512], lse fp32 [B, N, H]).

    q: bf16 [B, N, H, 576], padded here to the heads that it takes; kv_pages: uint8 [pages, 64, 656].
    """

    op = "sparse_decode_fwd"

    def __init__(self, q, kv_pages, scale):
        super().__init__()
        self.q = F.pad(q, (0, 0, 0, -q.shape[2] % FLASHMLA_HEADS)).contiguous()
        self.rows, self.scale = kv_pages.view(torch.float8_e4m3fn).unsqueeze(2), scale

    def __call__(self, slots):
        """slots: int32 [B, N, k], -1 for nothing, k a multiple of 64."""
        nothing = None, None, None
        return self.call(self.q, self.rows, slots, None, None, after=(*nothing, FLASHMLA_V, self.scale))


class FlashMLADense(_Planned):
    """Dense attention of a decode step by FlashMLA on bf16 rows, which see all: (out [B, N, H, 512], lse [B, N, H]).

    q: bf16 [B, N, H, 576]; kv_pages: bf16 [pages, 64, 576]; page_table: int32 [B, P]; lengths: int32 [B].
    """

    op = "dense_decode_fwd"

    def __init__(self, q, kv_pages, page_table, lengths, scale):
        super().__init__()
        self.before = q, kv_pages.unsqueeze(2), FLASHMLA_V, lengths, page_table, scale, False

    def __call__(self, q=None):
        """q: other queries of the same shape than those given first."""
        first, *rest = self.before
        return self.call(first if q is None else q, *rest, after=())
