"""One whole attention layer of V3.2: MLA, its lightning indexer and the selection.

Submodules carry the names of the Hugging Face checkpoint (`model.layers.{i}.self_attn.*`). The steps come from the
package passed as `ops`: `DSALayer(config)` runs the reference, `DSALayer(config, ops=dsa_kernels)` the Triton kernels.

Source: DeepSeek-V3.2-Exp report, section 2 and appendix A; SPEC sections 2, 3 and 7.
"""

import contextlib
import functools
import importlib
import sys
import types
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

import dsa_ref  # the default of `ops`: its steps are loaded before this module

from ..config import DSAConfig
from ..contracts import E4M3, check_dtype, check_shapes, unchecked_values, values_readable
from ..dense_attention import dense_attention, mha_attention
from ..hadamard import hadamard
from ..page_table import Batch
from ..paged_cache import PagedCache, SequenceCache
from ..precision import autocast_on
from ..quantize import quantize
from ..rope import rope_frequencies
from .cache import LayerCache, all_or_nothing
from .checkpointing import (
    CACHE_REPEATED,
    NEEDS_NON_REENTRANT,
    inside_reentrant_checkpoint,
    recorded_before,
    selected_once,
    will_be_repeated,
)
from .decode import check_decode, decode_step, recorded
from .parts import Indexer, RMSNorm
from .prefill import prefill_step, row_starts, serves
from .probe import probe_of
from .wrapped import matrix

STEPS = ("rope", "rotate_quantize", "lightning_select", "sparse_attention")  # of `ops`
ATTENTION = ("sparse", "mha", "dense")
RECORDED = "q_idx k_idx w k_scale q q_heads kv start end indices lse probe".split()  # in this order


class Ops(Protocol):
    """What a layer runs: a package, or any namespace, that has these steps with `dsa_ref`'s contracts.

    Where it has `hadamard` and `quantize` as well, a layer with index_rope="interleaved" runs those.
    """

    rope: Callable
    rotate_quantize: Callable
    lightning_select: Callable
    sparse_attention: Callable


class DSALayer(nn.Module):
    """V3.2's attention layer on packed tokens [T, dim].

    ops: the package whose `rope`, `rotate_quantize`, `lightning_select` and `sparse_attention` run (`dsa_ref` or
    `dsa_kernels`, which both train); what has no kernel always runs in the reference. "dense" runs `mha_attention` of
    an ops that has it and no `dense_attention`, which takes fewer FLOPs. Where ops also has the small steps of
    `decode`, they run in calls that keep no gradient: see `prefill`.
    Under torch's activation checkpointing, of either kind, keys are selected once.
    indexer: False for a layer that shares another layer's selection and has no indexer (`DSAConfig.has_indexer`).

    Submodules may be wrapped (adapters, hooks, shards) as long as kv_b_proj stays linear without a bias: see `wrapped`.
    """

    rows_are_last = True  # a call's tokens are the last of those that they may see; in `dsa_ref.parallel` some are not

    def __init__(self, config: DSAConfig, ops: Ops = dsa_ref, indexer: bool = True) -> None:
        super().__init__()
        if lacking := [name for name in STEPS if not hasattr(ops, name)]:
            raise TypeError(f"ops must be a package or namespace with {', '.join(STEPS)}, got none of {lacking}")
        if not isinstance(indexer, bool):
            raise TypeError(f"indexer must be a bool, got {indexer!r}")
        self.config, self.ops = config, ops
        c, head = config, config.qk_nope_head_dim + config.qk_rope_head_dim
        self.q_a_proj = nn.Linear(c.dim, c.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(c.q_lora_rank, c.norm_eps)
        self.q_b_proj = nn.Linear(c.q_lora_rank, c.n_heads * head, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.dim, c.latent_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, c.norm_eps)
        self.kv_b_proj = nn.Linear(c.kv_lora_rank, c.n_heads * (c.qk_nope_head_dim + c.v_head_dim), bias=False)
        self.o_proj = nn.Linear(c.n_heads * c.v_head_dim, c.dim, bias=False)
        self.indexer = Indexer(c) if indexer else None
        self.register_buffer("freqs", self.frequencies(), persistent=False)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cache: LayerCache | SequenceCache | None = None,
        attention: str = "sparse",
        record: list[dict] | None = None,
        indices: Tensor | None = None,
    ) -> Tensor:
        """Attend and return [T, dim] in x.dtype; inside autocast in autocast's dtype, as a linear layer does.

        x: [T, dim] in the weights' dtype, inside autocast in any that it takes. positions: int [T], each token's place
        in its own sequence; packed sequences are runs that start at 0, and a token sees its own run up to itself.
        cache: a LayerCache of one sequence, whose next tokens x holds; where the call fails, cache and record are what
        they were, but a hook on the layer itself comes later and undoes nothing. It takes no token whose rows are NaN
        or infinite, and no step that activation checkpointing repeats.
        attention: "sparse" (selected keys, MQA mode), "mha" (the same selection as a mask over decompressed heads) or
        "dense" (every visible key, no selection).

        record: a list that receives one dict of the steps' inputs and outputs: "q_idx", "k_idx", "w" (with the query's
        scale), "k_scale" (or None), "kv" and "start" as `lightning_select` and `sparse_attention` take them; "indices"
        [T, min(index_topk, keys so far)] but for "dense"; "q", the absorbed query [T, H, D], or for "mha" in its place
        "q_heads" [T, H, nope + rope]; "lse" [T, H]; in a sparse step that gradients pass through, "probe", fp32 like
        indices, whose .grad holds after the language loss's backward pass the target that `indexer_loss` takes (where
        `ops.sparse_attention` has a probe). A layer without an indexer leaves out the first four. Under activation
        checkpointing, which runs the layer again for the gradients, a step is recorded once; it needs
        use_reentrant=False. Tensors of FP8 cannot be unpickled, which is torch's own limit: pickle their
        `.view(torch.uint8)`, or use torch.save.

        indices: int32 [T, k], for a layer without an indexer and for no other: the selection of the nearest layer
        before it that has one, for the same tokens, out of that layer's record.

        Raises: ValueError for wrong shapes, positions, indices, a cache that is full or of another layer's sizes, an
        unknown attention, NaN or infinity that the indexer or the cache meets, or a record under reentrant
        checkpointing, TypeError for dtypes.
        """
        self._check(x, positions, cache, attention, record)
        self._check_shared(indices, positions, cache, attention)
        with all_or_nothing([] if cache is None else [cache], record):
            if serves(self, x, attention):
                y, step = prefill_step(self, x, positions, cache, indices, record is not None)
            else:
                y, step = self._attend(x, positions, cache, attention, indices, record is not None)
            if cache is not None and will_be_repeated(y):
                raise ValueError(CACHE_REPEATED)
            if record is not None and not recorded_before(record, step):
                record.append({name: step[name] for name in RECORDED if name in step})
        return y

    def decode(
        self,
        x: Tensor,
        cache: PagedCache,
        batch: Batch,
        record: list[dict] | None = None,
        indices: Tensor | None = None,
    ) -> Tensor:
        """Attend from the N newest tokens of each of B sequences, and return [B, N, dim] as `forward` does.

        x: [B, N, dim], N at most 4; cache: the layer's PagedCache; batch: `cache.table.batch(sequences, N)`, made once
        and shared by all layers. The tokens' rows are written to the pages and attended to, but the sequences are as
        long as before until `table.advance(sequences, N)`, after the last layer; where the call fails, nothing that
        anyone reads has changed. Needs a config with index_fp8, and `ops` with `paged_select` and
        `paged_sparse_attention`.

        record: a list that receives one dict: "q_idx" [B, N, Hi, Di] and "w" [B, N, Hi] as `paged_select` takes them,
        "q" [B, N, H, D], "indices" and "slots" int32 [B, N, k], "lse" [B, N, H]; a layer without an indexer leaves out
        the first two. indices: int32 [B, N, k], for a layer without an indexer and for no other: the positions that the
        nearest layer before it that has one selected for the same tokens, out of that layer's record.

        Raises: ValueError for other shapes, N above 4, a batch of another table or from before the table changed, a
        cache of another layer's sizes or without all tokens before these, indices, gradients; TypeError for dtypes.
        """
        check_decode(self, x, cache, batch, record, indices)
        with torch.no_grad(), all_or_nothing([], record):
            y, step = decode_step(self, x, cache, batch, indices)
            if record is not None:
                record.append(recorded(step))
        return y

    def _attend(self, x, positions, cache, attention, indices, recording) -> tuple[Tensor, dict]:
        """`forward` on checked arguments: the output, and the step as `record` gets it."""
        c, ranges = self.config, self._ranges(positions, cache)
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        q_heads, kv = self._queries(q_latent, positions), self._latents(x, positions)
        indexing = self.indexer is not None and (attention != "dense" or recording or cache is not None)
        q_idx, k_idx, w, q_scale, k_scale = self._index(x, q_latent, positions) if indexing else [None] * 5
        kv, k_idx, k_scale = self._all_rows(cache, kv, k_idx, k_scale)
        if cache is not None and q_idx is not None:
            q_idx = q_idx.to(k_idx.dtype)  # wider only inside autocast
        step = {"kv": kv} | ranges
        if indexing:
            weights = w if q_scale is None else w * q_scale  # a positive scale may cross the relu
            step |= {"q_idx": q_idx, "k_idx": k_idx, "w": weights, "k_scale": k_scale}
        if attention != "dense" and self.indexer is not None:
            scored = (tensor.detach() for tensor in (q_idx, k_idx, weights))
            k = min(c.index_topk, len(k_idx))  # a list has no more places than there are keys
            select = functools.partial(self.ops.lightning_select, *scored, k, k_scale=k_scale, **ranges)
            step["indices"] = selected_once(select)
        elif attention != "dense":
            step["indices"] = indices
        # What was made here needs no check; of shared indices nobody has looked yet whether one stands twice in a row.
        known = unchecked_values() if indices is None else contextlib.nullcontext()
        if attention == "mha":
            step["q_heads"] = q_heads
            q, k, v = self._decompressed(q_heads, kv)
            with known:
                out, step["lse"] = mha_attention(q, k, v, c.softmax_scale, step["indices"], **ranges)
        elif attention == "dense" and hasattr(self.ops, "mha_attention") and not hasattr(self.ops, "dense_attention"):
            q, k, v = self._decompressed(q_heads, kv)
            # A cache holds one sequence: causal is all there is. Values of start are read, as they save a mask.
            seen = {} if cache is not None and self.rows_are_last else ranges
            out, step["lse"] = self.ops.mha_attention(q, k, v, c.softmax_scale, None, **seen)
            if recording:  # for the indexer's target alone, which is a constant
                with torch.no_grad():
                    step["q"] = self._absorbed(q_heads, self._up_projections(kv)[0], kv.dtype)
        else:
            W_UK, W_UV = self._up_projections(kv)
            scale, v_dim = c.softmax_scale, c.kv_lora_rank
            step["q"] = self._absorbed(q_heads, W_UK, kv.dtype)
            with known:
                if attention == "dense":
                    u, step["lse"] = dense_attention(step["q"], kv, scale, v_dim, **ranges)
                else:
                    attend = self.ops.sparse_attention
                    probe = probe_of(attend, step["q"], kv, step["indices"]) if recording else {}
                    u, step["lse"] = attend(step["q"], kv, step["indices"], scale, v_dim, **probe)
                    step |= probe
            out = torch.einsum("thc,hvc->thv", u, W_UV)
        return self.o_proj(out.flatten(1)), step

    def _absorbed(self, q_heads, W_UK, dtype) -> Tensor:
        """MQA mode's queries [T, H, D]: their nope part in the latents' space."""
        nope, turned = q_heads.split((self.config.qk_nope_head_dim, self.config.qk_rope_head_dim), dim=-1)
        return torch.cat((torch.einsum("thn,hnc->thc", nope, W_UK), turned), dim=-1).to(dtype)

    def _apply(self, fn, recurse=True):
        """Move or cast the weights; RoPE's frequencies follow to the device but stay fp32, whatever the weights are."""
        super()._apply(fn, recurse)
        self.freqs = self.frequencies()
        return self

    def frequencies(self) -> Tensor:
        """RoPE's frequencies beside the weights, with the CPU's bits everywhere."""
        return rope_frequencies(self.config, "cpu").to(self._weight().device)

    def _weight(self) -> Tensor:
        """A weight that stands for the layer's dtype and device; by no name, since its module may be wrapped."""
        return next(weight for weight in self.parameters() if weight.is_floating_point())

    def __getstate__(self) -> dict:
        """What is copied and pickled. A Python module can be neither, so a package is put down by its name."""
        state, ops = super().__getstate__(), self.ops
        if isinstance(ops, types.ModuleType):
            if sys.modules.get(ops.__name__) is not ops:
                raise TypeError(f"ops must be importable by its name to be copied or pickled, got {ops.__name__!r}")
            state["ops"] = ops.__name__
        return state

    def __setstate__(self, state: dict) -> None:
        if isinstance(state["ops"], str):
            state = state | {"ops": importlib.import_module(state["ops"])}
        super().__setstate__(state)

    def _queries(self, q_latent: Tensor, positions: Tensor) -> Tensor:
        """[T, H, nope | rope], the rope part turned, interleaved."""
        c = self.config
        q = self.q_b_proj(q_latent).unflatten(-1, (c.n_heads, -1))
        nope, turning = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
        return torch.cat((nope, self.ops.rope(turning, positions, self.freqs, "interleaved")), dim=-1)

    def _latents(self, x: Tensor, positions: Tensor) -> Tensor:
        """The cached row of each token, [T, D]: normed latent | turned rope key."""
        c = self.config
        latent, turning = self.kv_a_proj_with_mqa(x).split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        turned = self.ops.rope(turning, positions, self.freqs, "interleaved")
        return torch.cat((self.kv_a_layernorm(latent), turned), dim=-1)

    def _index(self, x, q_latent, positions):
        """The indexer's q, k, w as they are scored: FP8 with scales, or turned floats with None for both scales."""
        q, k, w = self.indexer(x, q_latent)
        layout = self.config.index_rope
        if not self.config.index_fp8:
            q, k = (self.ops.rope(tensor, positions, self.freqs, layout) for tensor in (q, k))
            return q, k, w, None, None
        if layout == "half":
            quantized = [self.ops.rotate_quantize(tensor.detach(), positions, self.freqs) for tensor in (q, k)]
        else:  # `rotate_quantize` turns half-split pairs only: its three steps one by one
            turned = [self.ops.rope(tensor.detach(), positions, self.freqs, layout) for tensor in (q, k)]
            rotate, narrow = getattr(self.ops, "hadamard", hadamard), getattr(self.ops, "quantize", quantize)
            quantized = [narrow(rotate(tensor)) for tensor in turned]
        (q_idx, q_scale), (k_idx, k_scale) = quantized
        return q_idx, k_idx, w, q_scale, k_scale

    def _up_projections(self, kv) -> tuple[Tensor, Tensor]:
        """W_UK [H, nope, latent] and W_UV [H, v, latent], the two halves of kv_b_proj."""
        c = self.config
        both = matrix("kv_b_proj", self.kv_b_proj, c.kv_lora_rank, kv.dtype, kv.device).unflatten(0, (c.n_heads, -1))
        return both.split((c.qk_nope_head_dim, c.v_head_dim), dim=1)

    def _decompressed(self, q, kv) -> tuple[Tensor, Tensor, Tensor]:
        """MHA mode: queries, and a key and a value for every head from each latent row, in one dtype."""
        c = self.config
        latent, turned = kv.split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        both = self.kv_b_proj(latent).unflatten(-1, (c.n_heads, -1))
        k_nope, v = both.split((c.qk_nope_head_dim, c.v_head_dim), dim=-1)
        k = torch.cat((k_nope, turned[:, None].expand(-1, c.n_heads, -1)), dim=-1)
        return q.to(k.dtype), k, v.to(k.dtype)  # inside autocast, what a wider cache keeps is wider

    def _ranges(self, positions: Tensor, cache) -> dict[str, Tensor]:
        """Which of all rows each token sees, as the steps take it: its first one, int32 [T]; the last is its own."""
        return {"start": row_starts(positions, cache)}

    def _all_rows(self, cache, kv, k_idx, k_scale) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The rows of all tokens that these may see, after those of the cache. `dsa_ref.parallel` has other ranks'."""
        return (kv, k_idx, k_scale) if cache is None else cache.append(kv, k_idx, k_scale)

    @staticmethod
    def _row_starts(positions: Tensor, cache: LayerCache | SequenceCache | None) -> Tensor:
        """Each row's first visible key, int64 [T]: where its sequence begins among the cached and the new tokens."""
        before = 0 if cache is None else cache.length
        return torch.arange(before, before + len(positions), device=positions.device) - positions

    def _check_shared(self, indices, positions, cache, attention) -> None:
        """indices where the layer shares a selection, None where it makes one or needs none."""
        wanted = self.indexer is None and attention != "dense"
        if indices is None and wanted:
            raise ValueError("indices must be given to a layer without an indexer: another layer's selection, got None")
        if indices is not None and not wanted:
            why = "has an indexer of its own" if self.indexer is not None else "attends to every key"
            raise ValueError(f"indices must be None in a layer that {why}, got {type(indices).__name__}")
        if indices is None:
            return
        check_shapes(positions=(positions, "T"), indices=(indices, "T k"))
        check_dtype("indices", indices, (torch.int32,))
        if len(positions) and values_readable(indices):
            start = self._row_starts(positions, cache)
            hidden = (indices < start[:, None]) & (indices != -1) | (indices > (start + positions)[:, None])
            if hidden.any():
                t, n = (int(place) for place in hidden.nonzero()[0])
                raise ValueError(f"indices must hold keys that each row may see, or -1, got {indices[t, n]} in row {t}")

    def _check(self, x, positions, cache, attention, record) -> None:
        check_shapes(x=(x, "T dim"), positions=(positions, "T"))
        check_dtype("positions", positions, (torch.int32, torch.int64))
        self._check_input(x)
        if attention not in ATTENTION:
            raise ValueError(f"attention must be one of {ATTENTION}, got {attention!r}")
        if record is not None:
            self._check_record(record)
        if cache is not None:
            self._check_cache(cache, x)
        self._check_positions(positions, cache)

    def _check_positions(self, positions, cache) -> None:
        """Tokens that count on from the cache, or packed runs that count up from 0, with room in the cache."""
        T, before = len(positions), 0 if cache is None else cache.length
        if T + before == 0:
            raise ValueError("x must hold at least one token where no earlier one is cached, got none")
        if T and values_readable(positions):
            # A run of consecutive positions has one start; a new run may only begin at position 0.
            start = self._row_starts(positions, cache)
            known = torch.cat((start.new_zeros(1), start[:-1]))
            bad = (start != known) & ((positions != 0) | (cache is not None))
            if bad.any():
                t = int(bad.nonzero()[0])
                if cache is not None and torch._C._current_graph_task_id() != -1:  # in a backward pass: a repeated step
                    raise ValueError(CACHE_REPEATED)
                wanted = "continue the cache" if cache is not None else "count up from 0 in each packed sequence"
                raise ValueError(f"positions must {wanted}, got {int(positions[t])} for token {before + t}")
        if cache is not None:
            cache.check_room(T)

    def _check_input(self, x) -> None:
        """x [..., dim] in a dtype that the weights take, beside them."""
        weight = self._weight()
        casts = autocast_on(weight.device) and weight.dtype != torch.float64
        check_dtype("x", x, (torch.float32, torch.bfloat16, torch.float16) if casts else (weight.dtype,))
        if x.device != weight.device:
            raise ValueError(f"x must be on {weight.device} like the layer's weights, got {x.device}")
        if x.shape[-1] != self.config.dim:
            wanted = "[T, dim]" if x.dim() == 2 else "[B, N, dim]"
            raise ValueError(f"x must have shape {wanted} with dim = {self.config.dim}, got {list(x.shape)}")

    def _check_cache(self, cache, x) -> None:
        """A cache of these sizes, on this device, with room for the tokens of x."""
        if not isinstance(cache, (LayerCache, SequenceCache)):
            raise TypeError(f"cache must be a LayerCache, got {type(cache).__name__}")
        c = self.config
        if (cache.k_idx is None) != (self.indexer is None):
            kind = "a layer with" if cache.k_idx is not None else "a layer without"
            raise ValueError(
                f"cache must be made with indexer={self.indexer is not None}, got one of {kind} an indexer"
            )
        wanted, got = (c.latent_dim, c.index_head_dim), (cache.kv.shape[1], c.index_head_dim)
        if cache.k_idx is not None:
            got = (cache.kv.shape[1], cache.k_idx.shape[1])
        if wanted != got:
            raise ValueError(f"cache must have rows of {wanted} for this layer's latents and index keys, got {got}")
        if cache.kv.device != x.device:
            raise ValueError(f"cache must be on {x.device} like x, got {cache.kv.device}")
        if cache.k_idx is not None and (cache.k_idx.dtype == E4M3) != c.index_fp8:
            raise TypeError(f"cache must be made for index_fp8 = {c.index_fp8}, got keys of {cache.k_idx.dtype}")

    def _check_record(self, record) -> None:
        """A list, and not filled where nothing in it could teach the indexer though it is being trained."""
        if not isinstance(record, list):
            raise TypeError(f"record must be a list, got {type(record).__name__}")
        trained = self.indexer is not None and any(weight.requires_grad for weight in self.indexer.parameters())
        if trained and not torch.is_grad_enabled() and inside_reentrant_checkpoint():
            raise ValueError(NEEDS_NON_REENTRANT)
