"""A layer's decode step at each position, with DSA and with dense attention over all keys, replayed from a CUDA graph.

Both layers have the same products and small steps; the dense one has no indexer. Dense attention runs as our paged
kernel over all slots of FP8 rows, with several numbers of splits, and as FlashMLA's on bf16 rows; the fastest counts.
"""

import traceback

import torch

import dsa_kernels
import dsa_ref

from .. import checks, decode_layer, measure, peers
from ..decode import repeated
from ..run import free, judge
from . import account, dense
from .prefill import DSA, ROW_ERROR

SPLITS = {1: (16, 64, 128), 8: (4, 16, 64), 64: (1, 4, 16)}  # of our kernel over all slots, by batch
FP8_ROW_ERROR = 5e-2  # of a latent row in FP8
REPEATS = 3
FLASHMLA = "dense, FlashMLA, bf16"


def dense_calls(mine, S, with_peers, splits):
    """{who: a dense step} on the layer and the sequences of DSA's LayerStep, and {who: the pages that it reads}."""
    cache, layer, x, B = mine.cache, mine.layer, mine.x, len(mine.x)
    c, table = layer.config, cache.table
    page = table.page_size
    where = table.table[:B]
    place = torch.arange(page, dtype=torch.int32, device=x.device)
    every = (where[:, :, None] * page + place).flatten(1)[:, None, :S].contiguous()
    pages, calls = {}, {}

    def add(who, held, attend):
        def step():
            places = dsa_kernels.place_tokens(table.table, table.lengths, mine.rows, 1, page)
            return dense.decode_step(layer, x, held, places, attend)

        pages[who], calls[who] = held, step

    for count in splits:

        def ours(q, count=count):
            return dsa_kernels.paged_sparse_attention(
                q, cache.kv_pages, every, c.softmax_scale, c.kv_lora_rank, splits=count
            )

        add(f"dense, {count} splits", cache.kv_pages, ours)
    if with_peers:
        wide = unpacked(cache.kv_pages, c)
        lengths = torch.full((B,), S, dtype=torch.int32, device=x.device)
        q = x.new_zeros(B, 1, c.n_heads, c.latent_dim)
        theirs = peers.FlashMLADense(q, wide, where.contiguous(), lengths, c.softmax_scale)
        add(FLASHMLA, wide, theirs)
    return calls, pages


def unpacked(pages, config):
    """FP8 rows as bf16 pages, exactly: three bits of mantissa, and scales that are powers of two."""
    wide = torch.empty(*pages.shape[:2], config.latent_dim, dtype=torch.bfloat16, device=pages.device)
    for first in range(0, len(pages), 1 << 12):
        part = slice(first, first + (1 << 12))
        wide[part] = dsa_ref.unpack_kv(pages[part], config.kv_lora_rank, torch.bfloat16)
    return wide


def check_dense(mine, pages, out):
    """The outputs of sampled sequences, and the latent row that the step wrote, against the reference in fp32."""
    layer, table, errors = mine.layer, mine.cache.table, [0.0]
    S = table.length(0) + 1
    positions = torch.tensor([S - 1], device=out.device)
    if not out.isfinite().all():
        raise checks.Wrong("the output is not finite")
    for b in checks.sampled_rows(len(out), out.device, checks.SEQUENCES).tolist():
        held = pages[table.table[b].long()].flatten(0, 1)[:S]
        kv = dsa_ref.unpack_kv(held, layer.config.kv_lora_rank) if held.dtype == torch.uint8 else held.float()
        own = dense.latent_rows(layer, mine.x[b], positions)
        off = checks.row_errors(kv[-1:], own).item()
        if not off <= FP8_ROW_ERROR:
            raise checks.Wrong(f"the new token's latent row is off by {off:.1e}")
        want = dense.reference(layer, mine.x[b], positions, kv)
        errors.append(checks.row_errors(out[b].float(), want.float()).item())
        if not errors[-1] <= ROW_ERROR:
            raise checks.Wrong(f"relative error {errors[-1]:.1e} of sequence {b}")
    return f"relative error {max(errors):.1e}"


def row_of(B, S, with_peers, rounds, device="cuda", config=dsa_ref.V32):
    """One batch and position as a record, see figures/README; `results` has DSA first."""
    step = decode_layer.LayerStep(B, S, device, config)
    theirs, pages = dense_calls(step, S, with_peers, SPLITS[B])
    results = {DSA: judge(step, lambda out, _: step.check(out, True), DSA)}
    if results[DSA]["verdict"] == "right":
        results[DSA] |= {"repeats": REPEATS} | repeated(step, count=REPEATS)
    for who, call in theirs.items():
        results[who] = judge(call, lambda out, _, who=who: check_dense(step, pages[who], out), who)
    calls = {DSA: step} | theirs
    running = {who: calls[who] for who, result in results.items() if result["verdict"] == "right"}
    timings = {who: both["warm"] for who, both in measure.time_decode(running, rounds).items()}
    for who, timing in timings.items():
        low, high = timing.spread()
        results[who] |= {"us": 1e3 * timing.ms, "us_10": 1e3 * low, "us_90": 1e3 * high, "timed": timing.how}
        if who != DSA and DSA in timings:
            speed, low, high = timings[DSA].speed_over(timing)
            results[who] |= {"speed": speed, "speed_10": low, "speed_90": high}
    best = account.fastest(results, "us")
    for who in (DSA, best):
        if who in running:
            results[who] |= account.parts(decode_layer.kernels_of(decode_layer.replay_of(calls[who]), 10))
    return {"batch": B, "position": S, "results": results, "dense": best}


def measure_rows(shapes, with_peers, rounds, done):
    """Measure each (batch, position); done(rows so far) is called after each. The rows."""
    rows = []
    for B, S in shapes:
        try:
            rows.append(row_of(B, S, with_peers, rounds))
        except Exception as error:  # the others are still to be measured
            traceback.print_exc()
            failed = {"verdict": "failed", "note": f"{type(error).__name__}: {error}"[:300]}
            rows.append({"batch": B, "position": S, "results": {DSA: failed}, "dense": None})
        free()
        done(rows)
    return rows
