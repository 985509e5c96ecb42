"""What training's kernels are measured beside: TileLang's kernels, torch's autograd, dense attention's backward.

None is a requirement; what cannot serve raises `Missing`, whose text says why. TileLang's two kernels are not in any
package: their files are looked for in the folder that the environment variable DSA_TILELANG_EXAMPLES names.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import sys
import tempfile

import torch
import torch.nn.functional as F

from dsa_ref import cost

from ..checks import Wrong
from ..peers import Missing
from .checks import check_gradients

FOLDER_VARIABLE = "DSA_TILELANG_EXAMPLES"
EXAMPLE = "sparse_mla_bwd.py"  # of tile-ai/tilelang, examples/deepseek_v32, with utils.py beside it
MILES = "tilelang_sparse_mla_bwd_opt.py"  # of radixark/miles, miles_plugins/models/glm5/ops: made of the one above
CAUSAL, AT_THE_END = "max_kv_i = s_i\n", "max_kv_i = s_i + S_kv - S\n"
CHUNK = 1024  # queries of torch's autograd at once
DENSE = ("dense MHA, cuDNN", "dense MHA, flash")
CHECKED_HEADS = 2
FEW_KEYS_ERROR = 0.3  # of a row: with few keys larger numbers cancel, of which outputs in bf16 leave some


def versions():
    """{package: version} of what is installed, and {file: the start of its SHA-256} of TileLang's kernels."""
    found = {"cudnn": torch.backends.cudnn.version()}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["tilelang"] = importlib.metadata.version("tilelang")
    for name in (EXAMPLE, MILES):
        path = pathlib.Path(os.environ.get(FOLDER_VARIABLE, ""), name)
        if path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return found


@functools.cache
def tilelang_module(name):
    """The module in the file `name` of the folder that FOLDER_VARIABLE names."""
    if not torch.cuda.is_available():
        raise Missing("needs a CUDA GPU")
    folder = os.environ.get(FOLDER_VARIABLE)
    path = pathlib.Path(folder or "", name)
    if not folder or not path.is_file():
        raise Missing(f"no {name} in the folder that {FOLDER_VARIABLE} names, got {folder}")
    try:
        importlib.import_module("tilelang")
        return _imported(path)
    except Exception as error:  # it loads compiled libraries, and its decorators compile
        raise Missing(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:150]}") from error


def _imported(path):
    """The module at path, of which a copy is imported whose queries stand at the end of the keys, as ours do."""
    text = path.read_text()
    if path.name == EXAMPLE:
        if text.count(CAUSAL) != 1:
            raise Missing(f"{path.name} has not one line {CAUSAL.strip()!r}: another version of the example?")
        text = text.replace(CAUSAL, AT_THE_END)
    copy = pathlib.Path(tempfile.mkdtemp(), f"dsa_bench_{path.name}")  # its source is read while it compiles
    copy.write_text(text)
    spec = importlib.util.spec_from_file_location(copy.stem, copy)
    module = sys.modules[copy.stem] = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.path.insert(0, str(path.parent))  # it imports its neighbours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


class TileLang:
    """Sparse attention's backward by one of TileLang's kernels: (dq, dkv), dkv summed by atomics.

    Their log-sum-exp is in base 2, and their tensors have a batch (not those of MILES) and a head of keys.
    """

    def __init__(self, name, q, kv, indices, scale, out, lse, dout):
        base_2 = lse / math.log(2)
        tensors = q, kv[:, None], out, dout, indices[:, None], base_2
        self.name, self.scale = name, scale
        self.tensors = tensors if name == MILES else [tensor[None] for tensor in tensors]

    def __call__(self):
        dq, dkv = tilelang_module(self.name).sparse_mla_bwd(*self.tensors, sm_scale=self.scale)
        return dq.view(self.tensors[0].shape[-3:]), dkv.flatten(0, -2)


class Gathered:
    """Sparse attention's backward by torch's autograd through a gather: (dq, dkv).

    Called, it runs the backward of graphs that were made before, CHUNK queries each; `whole` makes them anew.
    """

    eager = "eager: autograd's graphs were made before"
    bounds = 3e-2, torch.inf  # of all and of a row: autograd has logits and dP in bf16, whose differences are dS

    def __init__(self, q, kv, indices, scale, out, lse, dout):
        self.q = [part.detach().clone().requires_grad_() for part in q.split(CHUNK)]
        self.kv = kv.detach().clone().requires_grad_()
        self.indices, self.scale, self.dout, self.graphs = indices, scale, dout, None

    def _forward(self):
        v_dim, graphs = self.dout.shape[2], []
        with torch.enable_grad():
            for q, indices in zip(self.q, self.indices.split(CHUNK), strict=True):
                rows = F.embedding(indices.clamp(min=0), self.kv)
                logits = (q @ rows.mT * self.scale).masked_fill((indices < 0)[:, None], -torch.inf)
                graphs.append(logits.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ rows[..., :v_dim])
        return graphs

    def _backward(self, graphs, keep):
        dq, dkv = [], torch.zeros_like(self.kv, dtype=torch.float32)
        for q, out, dout in zip(self.q, graphs, self.dout.split(CHUNK), strict=True):
            of_q, of_kv = torch.autograd.grad(out, (q, self.kv), dout, retain_graph=keep)
            dq.append(of_q)
            dkv += of_kv
        return torch.cat(dq), dkv.to(self.kv.dtype)

    def __call__(self):
        if self.graphs is None:
            self.graphs = self._forward()
        return self._backward(self.graphs, keep=True)

    def whole(self):
        return self._backward(self._forward(), keep=False)


def dense_backwards(T, S, H, config, device):
    """{who: DenseBackward}."""
    backends = zip(DENSE, ("cudnn", "flash"), strict=True)
    return {who: DenseBackward(backend, T, S, H, config, device) for who, backend in backends}


class DenseBackward:
    """The backward of dense attention in MHA mode for T queries at the end of S keys: (dq, dk, dv), [H, tokens, width].

    backend: "cudnn" or "flash", by the operators that torch's scaled_dot_product_attention runs. Their "causal" aligns
    the first query with the first key: the keys before the queries are a call of their own, whose log-sum-exp and
    output are those of both, and dq is their sum. flash wants one width: its values are padded.
    The forward pass is the first call's, not timed. work: its FLOPs.
    """

    def __init__(self, backend, T, S, H, config, device="cuda", seed=3):
        self.backend, self.sizes, self.config, self.device, self.seed = backend, (T, S, H), config, device, seed
        head = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.work = 2 * H * (3 * head + 2 * config.v_head_dim) * cost.causal_pairs(T, S)
        self.parts = None

    def _make(self):
        (T, S, H), c = self.sizes, self.config
        generator = torch.Generator(self.device).manual_seed(self.seed)
        head = c.qk_nope_head_dim + c.qk_rope_head_dim

        def normal(tokens, width):
            return torch.randn(1, H, tokens, width, generator=generator, device=self.device).bfloat16()

        self.q, self.k = normal(T, head), normal(S, head)
        self.v, self.dout = normal(S, c.v_head_dim), normal(T, c.v_head_dim)
        pad = (0, head - c.v_head_dim) if self.backend == "flash" else (0, 0)
        v, self.padded_dout = F.pad(self.v, pad), F.pad(self.dout, pad)
        spans = [(slice(0, S - T), False), (slice(S - T, S), True)] if S > T else [(slice(0, S), True)]
        found = [
            (self.k[:, :, keys], v[:, :, keys], causal, self._forward(self.k[:, :, keys], v[:, :, keys], causal))
            for keys, causal in spans
        ]
        lses = [made[1].reshape(1, H, T, 1) for *_, made in found]
        lse = functools.reduce(torch.logaddexp, lses)
        out = sum(made[0].float() * (part - lse).exp() for (*_, made), part in zip(found, lses, strict=True))
        self.out, self.lse = out.bfloat16(), lse.view_as(found[0][3][1])
        self.parts = [(k, v, causal, made[2:]) for k, v, causal, made in found]

    def _forward(self, k, v, causal):
        scale = self.config.softmax_scale
        if self.backend == "cudnn":
            return torch.ops.aten._scaled_dot_product_cudnn_attention(
                self.q, k, v, None, True, 0.0, causal, scale=scale
            )
        return torch.ops.aten._scaled_dot_product_flash_attention(self.q, k, v, 0.0, causal, scale=scale)

    def _backward(self, k, v, causal, made):
        cum_q, cum_k, max_q, max_k, seed, offset = made[:6]
        scale, given = self.config.softmax_scale, (self.padded_dout, self.q, k, v, self.out, self.lse)
        if self.backend == "cudnn":
            return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                *given, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, causal, scale=scale
            )
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *given, cum_q, cum_k, max_q, max_k, 0.0, causal, seed, offset, scale=scale
        )

    def __call__(self):
        if not torch.cuda.is_available():
            raise Missing("needs a CUDA GPU")
        if self.parts is None:
            self._make()
        dq, dk, dv = zip(*(self._backward(*part) for part in self.parts), strict=True)
        joined = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2) for parts in (dk, dv))
        return functools.reduce(torch.add, dq)[0], *(part[0] for part in joined)

    def check(self, result):
        """CHECKED_HEADS heads against autograd in fp32."""
        T, S, _ = self.sizes
        some = slice(0, CHECKED_HEADS)
        q, k, v = (tensor[0, some].float().requires_grad_() for tensor in (self.q, self.k, self.v))
        hidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
        with torch.enable_grad():
            p = (q @ k.mT * self.config.softmax_scale).masked_fill(hidden, -torch.inf).softmax(dim=-1)
            wanted = torch.autograd.grad(p @ v, (q, k, v), self.dout[0, some].float())
        dq, dk, dv = (part[some] for part in result)
        if dv.shape[-1] > v.shape[-1] and dv[..., v.shape[-1] :].any():
            raise Wrong("a padded value has a gradient")
        got = dq, dk, dv[..., : v.shape[-1]]
        wanted = dict(zip(("dq", "dk", "dv"), wanted, strict=True))
        return check_gradients(got, wanted, row_error=FEW_KEYS_ERROR)
