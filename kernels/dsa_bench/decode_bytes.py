"""What DSA saves in a decode step against dense attention: bytes as counted, time as measured and as the model says.

One query of 128 heads. DSA reads 132 bytes of each token and 656 of a selected one; dense attention 656 of each. Dense
attention is measured as our own kernel on all tokens, which also reads four bytes of slot a token, with the number of
splits that is fastest, and as FlashMLA's on bf16 rows, 1152 bytes a token, which are the same numbers: it has no dense
kernel for FP8 rows. The model: each part takes the longer of its FLOPs and its bytes at this card's measured ceilings.
"""

import dataclasses

import torch

import dsa_kernels
import dsa_ref
from dsa_ref import V32, cost

from . import checks, decode, inputs, peers, records
from .cases import SIZES
from .decode_case import DecodeCase
from .decode_cases import chain, indexer

CONTEXTS = ("4K", "8K", "16K", "32K", "64K", "128K", "256K", "512K", "1M")
SPLITS = (16, 64, 128)  # of dense attention by our kernel


def case(S, device="cuda", config=V32, splits=SPLITS):
    """Ours on S tokens: the chain, and dense attention as attention over all slots. All give what they promise."""
    given, free = indexer(1, 1, S, device, config)
    _, _, _, table, lengths = given
    kv_pages = inputs.kv_pages(table, free, fp8=True, config=config)
    _, _, q = inputs.paged_queries(1, 1, config.n_heads, device=device, config=config)
    k, v_dim, scale = config.index_topk, config.kv_lora_rank, config.softmax_scale
    place = torch.arange(inputs.PAGE, dtype=torch.int32, device=table.device)
    every = (table[:, :, None] * inputs.PAGE + place).flatten(1)[:, None, :S].contiguous()

    def attend_all(splits):
        return lambda: dsa_kernels.paged_sparse_attention(q, kv_pages, every, scale, v_dim, splits=splits)

    def check(result, own):
        *selection, out, lse = result
        if selection:
            checks.check_paged_selection(*selection, given, inputs.PAGE, own)
        slots = selection[1] if selection else every
        return checks.check_paged_attention((out, lse), q, kv_pages, slots, scale, v_dim)

    wide = dsa_ref.unpack_kv(kv_pages, v_dim, torch.bfloat16)  # exact: three bits of mantissa, scales powers of two
    return DecodeCase(
        work=cost.decode_bytes(config, S).dsa,
        unit="TB/s",
        ceiling="copy",
        ours={"DSA": lambda: chain(given, k, q, kv_pages, scale, v_dim)}
        | {f"dense, ours, {count} splits": attend_all(count) for count in splits},
        check=check,
        peers={"dense, FlashMLA, bf16": peers.FlashMLADense(q, wide, table, lengths, scale)},
    )


def predicted(config, S, ceilings):
    """{"dsa_us", "dense_us"}: least microseconds at the measured ceilings, None without FP8 on the card."""
    if not ceilings.get("fp8"):
        return None
    read, pairs = cost.decode_bytes(config, S), min(config.index_topk, S)
    flops, per_second = cost.mqa_flops_per_pair(config), 1e12 * ceilings["copy"]

    def us(work, moved, peak):
        return 1e6 * cost.roofline_seconds(work, moved, 1e12 * peak, per_second)

    scan = us(cost.index_flops_per_pair(config) * S, read.index, ceilings["fp8"])
    return {
        "dsa_us": scan + us(flops * pairs, read.selected, ceilings["bf16"]),
        "dense_us": us(flops * S, read.dense, ceilings["bf16"]),
    }


def row_of(name, made, ceilings, config=V32):
    """A measured case's record with the bytes, the model's prediction and what was saved."""
    S = SIZES[name]
    read, results = cost.decode_bytes(config, S), made["results"]
    row = made | {"context": S, "bytes": dataclasses.asdict(read) | {"dsa": read.dsa, "times": read.dense / read.dsa}}
    row["predicted"] = predicted(config, S, ceilings)
    for kind in ("warm_us", "cold_us"):
        dense = {who: r[kind] for who, r in results.items() if who != "DSA" and kind in r and r["verdict"] == "right"}
        if dense and kind in results.get("DSA", {}):
            best = min(dense, key=dense.get)
            saved = {"dense": best, "dense_us": dense[best], "times": dense[best] / results["DSA"][kind]}
            row.setdefault("saved", {})[kind.removesuffix("_us")] = saved
    return row


def lines(row):
    """One context as lines of at most 120 columns."""
    read, model = row["bytes"], row["predicted"]
    text = f"{row['case']:>5} bytes {read['dsa'] / 1e6:7.2f} / {read['dense'] / 1e6:7.2f} MB = {read['times']:.2f}x"
    if model:
        times = model["dense_us"] / model["dsa_us"]
        text += f" | model {model['dsa_us']:6.1f} / {model['dense_us']:7.1f} us = {times:.2f}x"
    found = [text[:120]]
    for kind, saved in row.get("saved", {}).items():
        mine = row["results"]["DSA"][f"{kind}_us"]
        said = f"{kind}: DSA {mine:.1f} us, dense {saved['dense_us']:.1f} ({saved['dense']}) = {saved['times']:.2f}x"
        found.append(f"      {said}"[:120])
    for who, result in row["results"].items():
        if result["verdict"] != "right":
            found.append(f"      {who}: {result['verdict']}: {result['note']}"[:120])
    return found


def measure(options, log, provenance, ceilings, missing) -> int:
    """Measure all contexts, print, write. 1 if something of ours is wrong or failed."""
    print("bytes: DSA / dense, one token of one layer, 128 heads")
    rows = []
    for name in CONTEXTS:
        if options.only in name:
            made = decode.measure_case(lambda S=SIZES[name]: case(S), name, ceilings, options.peers, options.rounds)
            rows.append(row_of(name, made, ceilings))
            print(*lines(rows[-1]), sep="\n", flush=True)
    if log:
        records.merge(log, {"bytes": {"provenance": provenance, "missing": missing, "rows": rows}}, ceilings)
    return int(any(records.any_of_ours_wrong(row) for row in rows))
