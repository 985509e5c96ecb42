"""A chunk of a prefill that ends at each position, with DSA and with dense attention: judged, timed together, priced.

The cache holds random rows up to the chunk, and every position has a chunk of its own, since keys that stand in the
cache many times have equal scores. Calls are timed as they are made, from Python, not from a CUDA graph: what the host
takes is part of a layer's time.
"""

import contextlib
import time

import torch
import triton

import dsa_kernels
import dsa_ref
from dsa_ref import cost
from dsa_ref.testing import Failed, compare_selection

from .. import checks, decode, decode_layer, measure
from ..inputs import causal_ranges
from ..run import free, judge
from . import account, dense

CHUNK = 4096
REPEATS = 3
PROFILED_MS = 200.0  # of calls in a row, most of them at the clock that the card settles on
LONGEST_MS = 2000.0  # a chunk that is expected to take longer is extrapolated
SPARE_BYTES = 12 << 30  # left for a call's temporaries where heads are kept
ROW_ERROR = 2e-2  # of an output row, and of a latent row: bf16
INDEX_ERROR = 5e-2  # of a dequantised index key: FP8, whose codes flip where bf16 differs
FILLED = 1 << 16  # rows at once
DSA, MADE, KEPT = "DSA", "dense, heads made", "dense, heads kept"


def filled_cache(config, capacity, generator):
    """A LayerCache of normal rows, as long as it can be: callers set its length."""
    cache, device = dsa_ref.LayerCache(config, capacity, torch.bfloat16, generator.device), generator.device
    for first in range(0, capacity, FILLED):
        rows = slice(first, min(capacity, first + FILLED))
        for part in (cache.kv, cache.k_idx):
            part[rows].copy_(torch.randn(part[rows].shape, generator=generator, device=device))
    return cache


class Chunk:
    """The chunk that ends at `position`, and its calls. layer, cache and kept heads are shared by all positions.

    tokens: at most as many as there are positions. kept: (keys, values) of each head up to this position or further,
    of all rows of the cache before the chunk; None where memory does not hold them.
    """

    def __init__(self, layer, cache, position, kept=None, tokens=CHUNK, attend=dense.cudnn):
        self.layer, self.cache, self.position, self.kept, self.attend = layer, cache, position, kept, attend
        T = min(tokens, position)
        device = cache.kv.device
        generator = torch.Generator(device).manual_seed(position)
        self.x = torch.randn(T, layer.config.dim, generator=generator, device=device).to(torch.bfloat16)
        self.positions = torch.arange(position - T, position, device=device)

    def dsa(self, record=None):
        """One call of the layer; the cache is as long as before it."""
        self.cache.length = self.position - len(self.x)
        with dsa_ref.unchecked_values():
            return self.layer(self.x, self.positions, self.cache, record=record)

    def made(self):
        """Dense attention over heads made from the latent rows."""
        return dense.prefill_step(self.layer, self.x, self.cache.kv[: self.position], None, self.attend)

    def with_kept(self):
        """Dense attention over heads that are kept."""
        kept = [part[: self.position] for part in self.kept]
        return dense.prefill_step(self.layer, self.x, self.cache.kv[: self.position], kept, self.attend)

    def check(self, out, who):
        """Sampled rows of an output, and all rows that the call wrote, against the reference; DSA's selection too."""
        own = dense.latent_rows(self.layer, self.x, self.positions)
        kv = self.cache.kv[: self.position].float()
        _near("a latent row of the cache", kv[len(kv) - len(own) :], own, ROW_ERROR)
        rows, indices = checks.sampled_rows(len(self.x), self.x.device), None
        if who == DSA:
            indices = self.check_selection(out, rows)[rows]
        want = dense.reference(self.layer, self.x[rows], self.positions[rows], kv, indices)
        if not out.isfinite().all():
            raise checks.Wrong("the output is not finite")
        return f"relative error {_near('an output row', out[rows].float(), want.float(), ROW_ERROR):.1e}"

    def check_selection(self, out, rows):
        """The selection [T, k] of a second call, whose output must have the bits of `out`, judged on some rows."""
        record = []
        if not torch.equal(decode.bits(self.dsa(record)), decode.bits(out)):
            raise checks.Wrong("the output of a recorded call has other bits")
        step, layer = record[0], self.layer
        latent = layer.q_a_layernorm(layer.q_a_proj(self.x))
        q, k, w = layer.indexer(self.x, latent)
        k, scale = dsa_ref.rotate_quantize(k, self.positions, layer.freqs)
        T, S = len(k), self.position
        got = step["k_idx"][S - T :].float() * step["k_scale"][S - T :, None]
        _near("an index key of the cache", got, k.float() * scale[:, None], INDEX_ERROR)
        q, scale = dsa_ref.rotate_quantize(q[rows], self.positions[rows], layer.freqs)
        queries = step["q_idx"].view(torch.uint8)[rows].view(q.dtype)
        _near("an indexer's query", queries.float(), q.float(), INDEX_ERROR)
        _near("the heads' weights", step["w"][rows], w[rows] * scale, INDEX_ERROR)
        start, end = (bound[rows] for bound in causal_ranges(T, S, self.x.device))
        want = dsa_ref.index_scores(queries, step["k_idx"], step["w"][rows], step["k_scale"], start, end)
        try:
            most = min(layer.config.index_topk, S)
            compare_selection(step["indices"][rows], want, most, start, end, tolerance=checks.SCORE_ERROR)
        except Failed as failure:
            raise checks.Wrong(str(failure)) from failure
        return step["indices"]


def _near(what, got, want, most):
    """The largest relative error of a row, which must not be above `most`."""
    error = checks.row_errors(got, want)
    if not (error <= most).all():
        raise checks.Wrong(f"{what} is off by {error.nan_to_num(torch.inf).max():.1e}, more than {most}")
    return error.max().item()


def kept_heads(layer, cache, most):
    """(keys, values) of the first tokens of the cache, at most `most`, as many as memory holds in powers of two."""
    c = layer.config
    each = 2 * c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    while most > CHUNK and most * each + SPARE_BYTES > torch.cuda.mem_get_info()[0]:
        most //= 2
    kept = dense.new_heads(c, most, cache.kv)
    for first in range(0, most, FILLED):
        rows = slice(first, min(most, first + FILLED))
        dense.make_heads(layer, cache.kv[rows], *(part[rows] for part in kept))
    return kept


def row_of(chunk, rounds, expected_ms, repeats=REPEATS):
    """One position's record. expected_ms: {dense call: ms}, of which those above LONGEST_MS are not made."""
    T, S, calls = len(chunk.x), chunk.position, {DSA: chunk.dsa, MADE: chunk.made}
    if chunk.kept is not None and len(chunk.kept[0]) >= S:
        calls[KEPT] = chunk.with_kept
    calls = {who: call for who, call in calls.items() if expected_ms.get(who, 0) <= LONGEST_MS}
    results = {who: judge(call, chunk.check, who) for who, call in calls.items()}
    if results[DSA]["verdict"] == "right":
        results[DSA] |= {"repeats": repeats} | decode.repeated(chunk.dsa, count=repeats)
    running = {who: calls[who] for who, result in results.items() if result["verdict"] == "right"}
    timings = measure.time_calls(running, rounds)
    for who, timing in timings.items():
        low, high = timing.spread()
        kernels = decode_layer.kernels_of(calls[who], max(2, round(PROFILED_MS / timing.ms)))
        results[who] |= {"ms": timing.ms, "ms_10": low, "ms_90": high, "timed": timing.how}
        results[who] |= {"peak_gib": peak_gib(chunk, who, calls[who])} | account.parts(kernels)
        if who == DSA:
            results[who] |= account.ratio(timing.ms, results[who]["parts"])
            continue
        flops = account.dense_flops(chunk.layer.config, T, S, who == KEPT)
        results[who] |= {"flops": flops, "rate": flops / timing.ms / 1e9, "extrapolated": False}
        if DSA in timings:
            speed, low, high = timings[DSA].speed_over(timing)
            results[who] |= {"speed": speed, "speed_10": low, "speed_90": high}
    return {"position": S, "tokens": T, "results": results}


def peak_gib(chunk, who, call):
    """GiB of the weights, of what a cache of this position's tokens takes, and of what the call asks for meanwhile."""
    c, before = chunk.layer.config, torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    held = sum(weight.numel() * weight.element_size() for weight in chunk.layer.parameters())
    row = {
        DSA: cost.bf16_kv_bytes_per_token(c) + cost.index_bytes_per_token(c),
        MADE: cost.bf16_kv_bytes_per_token(c),
        KEPT: 2 * c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim),
    }[who]
    return (torch.cuda.max_memory_allocated() - before + held + row * chunk.position) / 2**30


def launch_us(rounds):
    """Microseconds from one launch of Python's to the next, of a kernel that does next to nothing."""
    one = torch.zeros(1, device="cuda")

    def many():
        for _ in range(100):
            one.add_(1)

    return 10 * measure.time_calls({"launch": many}, rounds)["launch"].ms


def measure_rows(layer, cache, positions, rounds, done):
    """Measure each position; done(rows so far) is called after each, with what is extrapolated. The rows."""
    kept, rows = kept_heads(layer, cache, max(positions)), []
    for position in positions:
        chunk = Chunk(layer, cache, position, kept)
        guesses = {
            who: account.extrapolated(rows, layer.config, len(chunk.x), position, who, who == KEPT)
            for who in (MADE, KEPT)
        }
        guesses = {who: guess for who, guess in guesses.items() if guess}
        row = row_of(chunk, rounds, {who: guess["ms"] for who, guess in guesses.items()})
        for who, guess in guesses.items():
            if who not in row["results"]:
                row["results"][who] = guess
                if "ms" in row["results"][DSA]:
                    guess["speed"] = guess["ms"] / row["results"][DSA]["ms"]
        rows.append(row)
        done(rows)
    return rows


@contextlib.contextmanager
def compilations(names):
    """Inside, the names of kernels that Triton compiles, or loads from its cache on disk, are appended to `names`."""
    kept = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = lambda **said: names.append(said["src"].name)
    try:
        yield
    finally:
        triton.knobs.compilation.listener = kept


def whole_prompt(layer, tokens, chunk=CHUNK, seed=9):
    """A prompt of so many tokens, each chunk of fresh rows: {"chunk", "chunks_ms", "total_ms", "worst", "peak_gib",
    "warm_s", "compiled"}: the seconds that `warm` takes before, and the kernels that were compiled or loaded all the
    same, [{"chunk", "kernel"}]."""
    free()
    device, began = layer.q_a_proj.weight.device, time.perf_counter()
    dsa_kernels.warm(layer.config, tokens, chunk, batches=(), device=device)
    warm_s = time.perf_counter() - began
    free()
    generator = torch.Generator(device).manual_seed(seed)
    torch.cuda.reset_peak_memory_stats()
    cache = dsa_ref.LayerCache(layer.config, tokens, torch.bfloat16, device)
    pairs, names, compiled = [], [], []
    with compilations(names), dsa_ref.unchecked_values():
        for first in range(0, tokens, chunk):
            positions = torch.arange(first, min(tokens, first + chunk), device=device)
            x = torch.randn(len(positions), layer.config.dim, generator=generator, device=device).to(torch.bfloat16)
            pairs.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            pairs[-1][0].record()
            layer(x, positions, cache)
            pairs[-1][1].record()
            compiled += [{"chunk": first // chunk, "kernel": name} for name in names]
            names.clear()
    torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in pairs]
    peak = torch.cuda.max_memory_allocated() / 2**30
    facts = {"total_ms": sum(times), "worst": account.worst(times), "peak_gib": peak}
    facts |= {"warm_s": warm_s, "compiled": compiled}
    return {"chunk": chunk, "chunks_ms": times} | facts
