"""A whole layer's decode step: one new token a sequence through `DSALayer.decode`, V3.2's sizes, weights in bf16.

Timed from a CUDA graph and eager, and judged in two parts: the selection by the reference's scores of the step's own
vectors, the output by the same step on the reference's ops with that selection, since scores that differ in their last
bits choose other keys at the threshold. And taken apart: the kernels of one step, how often each is launched and for
how long it runs.
"""

import collections
import dataclasses
import re
import types

import torch

import dsa_kernels
import dsa_ref
from dsa_ref import V32, cost

from . import checks, inputs
from .decode_case import DecodeCase

LAYER_ERROR = 2e-2  # ||out - reference|| / ||reference|| of a token, with the same selection: bf16 throughout
PROFILED = 20
PLACES = ("page_table", "lengths", "positions", "slots")  # what a batch says of its tokens
GROUPS = {  # the parts of a step, by the names of their kernels; the first that matches
    "scores": r"index_scores",
    "selection": r"topk|select|tournament|translate|radix",
    "attention": r"sparse_attention|_merge",
    "norms, RoPE, FP8, cache": r"_append|_rms_norm|_head_weights|_index_queries|_turn_into|_place_tokens|_fused",
    "products": r"gemm|gemv|nvjet|cutlass|cublas|xmma|splitK|dot_kernel",
}


def random_layer(config, device="cuda", seed=0):
    """A layer in bf16 whose products keep the size of what they get."""
    with torch.device(device):
        layer = dsa_ref.DSALayer(config, ops=dsa_kernels).to(torch.bfloat16).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for weight in layer.parameters():
        if weight.dim() == 2:
            weight.copy_(torch.randn(weight.shape, generator=generator, device=device) * weight.shape[1] ** -0.5)
    return layer


def filled_cache(config, B, S, device="cuda"):
    """(cache, batch): a paged cache whose B sequences hold S - 1 random tokens each, and the place of the next."""
    table = dsa_ref.PageTable(B * -(-S // inputs.PAGE), B, S, inputs.PAGE, device=device)
    cache = dsa_ref.PagedCache(table, config, torch.bfloat16, fp8=True)
    sequences = [table.new() for _ in range(B)]
    for sequence in sequences:
        table.reserve(sequence, S - 1)
    table.advance(sequences, S - 1)
    none_free = torch.empty(0, dtype=torch.int64, device=device)
    cache.index_pages.copy_(inputs.index_pages(table.table, none_free, config=config))
    cache.kv_pages.copy_(inputs.kv_pages(table.table, none_free, fp8=True, config=config))
    return cache, table.batch(sequences, 1)


class LayerStep:
    """A decode step of one new token of each of B sequences of S positions, called as `CapturedStep` captures it."""

    def __init__(self, B, S, device="cuda", config=V32):
        config = dataclasses.replace(config, max_seq_len=max(config.max_seq_len, S))
        self.layer = random_layer(config, device)
        self.cache, self.batch = filled_cache(config, B, S, device)
        generator = torch.Generator(device).manual_seed(1)
        self.x = torch.randn(B, 1, config.dim, generator=generator, device=device).to(torch.bfloat16)
        self.rows = torch.arange(B, device=device)

    @torch.no_grad()
    def __call__(self, record=None):
        """The output [B, 1, dim]; where the tokens stand is computed inside."""
        table = self.cache.table
        where = self.layer.ops.place_tokens(table.table, table.lengths, self.rows, 1, table.page_size)
        batch = dataclasses.replace(self.batch, **dict(zip(PLACES, where, strict=True)))
        return self.layer.decode(self.x, self.cache, batch, record)

    def check(self, out, own):
        record, layer, batch = [], self.layer, self.batch
        self(record)
        selection = record[0]["indices"], record[0]["slots"]
        given = record[0]["q_idx"], self.cache.index_pages, record[0]["w"], batch.page_table, batch.lengths
        checks.check_paged_selection(*selection, given, inputs.PAGE, own)
        layer.ops = types.SimpleNamespace(**vars(dsa_ref) | {"paged_select": lambda *_: selection})
        try:
            want = self().float()
        finally:
            layer.ops = dsa_kernels
        error = checks.row_errors(out.flatten(0, 1).float(), want.flatten(0, 1))
        if not (error <= LAYER_ERROR).all():
            raise checks.Wrong(f"relative error {error.nan_to_num(torch.inf).max():.1e} of the reference's step")
        return f"relative error {error.max():.1e} of the reference's step"


def layer_case(B, S, device="cuda", config=V32):
    step = LayerStep(B, S, device, config)
    weights = sum(weight.numel() * weight.element_size() for weight in step.layer.parameters())
    return DecodeCase(
        work=weights + B * cost.decode_bytes(config, S).dsa,
        unit="TB/s",
        ceiling="copy",
        ours={"ours": step, "ours, eager": step},
        check=step.check,
        peers={},
        as_they_are={"ours, eager": "eager"},
        profiled=step,
    )


def replay_of(call):
    """The call as a CUDA graph: what replays it."""
    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def kernels_of(call, count=PROFILED):
    """[{"name", "launches", "us"}] of the kernels of one call, the longest first; microseconds over all launches."""
    activity = torch.profiler.ProfilerActivity.CUDA
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(count):
            call()
        torch.cuda.synchronize()
    found = collections.defaultdict(lambda: [0, 0.0])
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name][0] += 1
            found[event.name][1] += event.device_time_total
    made = [{"name": name, "launches": n / count, "us": us / count} for name, (n, us) in found.items()]
    return sorted(made, key=lambda kernel: -kernel["us"])


def parts_of(kernels):
    """{part: "microseconds in launches"} of what `kernels_of` gives, and their sum."""
    sums = {}
    for kernel in kernels:
        part = next((name for name, names in GROUPS.items() if re.search(names, kernel["name"])), "other")
        launches, us = sums.get(part, (0, 0.0))
        sums[part] = launches + kernel["launches"], us + kernel["us"]
    sums["all kernels"] = tuple(sum(values) for values in zip(*sums.values(), strict=True)) if sums else (0, 0.0)
    return {part: f"{us:.1f} us in {launches:g} launches" for part, (launches, us) in sums.items()}
