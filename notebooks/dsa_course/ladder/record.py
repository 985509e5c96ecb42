"""Notebook 11 reads its figures here: figures/ladder.json and figures/h200.json, every version in milliseconds."""

import functools

from dsa_ref import V32, cost
from dsa_ref.records import read

STEPS = ("index_scores", "select_topk", "lightning_select", "sparse_attention")
OUT_BYTES = 2 * V32.kv_lora_rank  # of a head's output, bf16
SCORE_BYTES = 4


@functools.cache
def read_record(name):
    return read(name)


def versions(step) -> list[dict]:
    """The versions of a step, in the order in which they were made.

    Keys: version, what, because, kept; predicted, ms, low and high (10th and 90th percentile), all in ms; peer and
    peer_ms, measured in the same rounds; miss, measured / predicted time.

    Raises: ValueError for a step without versions.
    """
    if step not in STEPS:
        raise ValueError(f"step must be one of {', '.join(STEPS)}, got {step!r}")
    found = []
    for entry in read_record("ladder.json")["entries"]:
        if entry["step"] == step:
            measured, predicted = entry["measured"], entry["predicted"]
            in_ms = predicted["value"]
            if predicted["unit"] != "ms":  # a rate: the work is the same, so times are as rates inverted
                in_ms = measured["ms"] * measured["value"] / predicted["value"]
            found.append(
                {
                    "version": entry["version"], "what": entry["what"], "because": entry["predicted_because"],
                    "kept": entry["kept"], "case": entry["case"], "predicted": in_ms, "ms": measured["ms"],
                    "low": measured["ms_10"], "high": measured["ms_90"], "miss": measured["ms"] / in_ms,
                    "peer": entry["peer"], "peer_ms": measured["ms"] * entry["peer_ratio"],
                }
            )  # fmt: skip
    return found


def ceilings(card="h200") -> dict:
    """What a card of the records reaches: {"bf16", "fp8": FLOPs a second, "copy": bytes a second, read and written}."""
    found = read_record(f"{card}.json")["steps"]["ceilings"]["ceilings"]
    return {name: 1e12 * value for name, value in found.items()}


def row(step, case) -> dict:
    """One shape of a step in figures/h200.json: {"work": FLOPs or bytes, "unit", "ms": {name: ms}}.

    Raises: KeyError for an unknown step, ValueError for a shape that is not in the record.
    """
    rows = read_record("h200.json")["steps"][step]["rows"]
    for found in rows:
        if found["case"] == case:
            times = {name: result["ms"] for name, result in found["results"].items()}
            return {"work": found["work"], "unit": found["unit"], "ms": times}
    raise ValueError(f"case must be one of {', '.join(r['case'] for r in rows)}, got {case!r}")


def least_work(step, T, S) -> tuple[int, int]:
    """(FLOPs, bytes of memory) of T queries at the end of S positions, V3.2's sizes, everything moved once.

    index_scores: FP8 queries, their weights and all keys are read, a score a pair is written. sparse_attention: as
    many rows as are there, at most T · k, the queries and the outputs of 128 heads, in bf16.

    Raises: ValueError for another step.
    """
    if step == "index_scores":
        pairs = cost.causal_pairs(T, S)
        queries = T * V32.index_n_heads * (V32.index_head_dim + SCORE_BYTES)
        return (
            cost.index_flops_per_pair(V32) * pairs,
            cost.index_bytes_per_token(V32) * S + queries + SCORE_BYTES * pairs,
        )
    if step == "sparse_attention":
        k, row_bytes = V32.index_topk, cost.bf16_kv_bytes_per_token(V32)
        pairs = cost.causal_pairs(T, S, k)
        return (
            cost.mqa_flops_per_pair(V32) * pairs,
            row_bytes * min(pairs, S) + T * V32.n_heads * (row_bytes + OUT_BYTES),
        )
    raise ValueError(f"step must be 'index_scores' or 'sparse_attention', got {step!r}")
