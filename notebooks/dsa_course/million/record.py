"""Notebook 14 reads the bill here: figures/layer_h200.json, and what `dsa_ref.bill` predicts for the same points."""

import functools

from dsa_ref import V32, bill
from dsa_ref.records import read

STEPS = ("prefill", "prompt", "decode", "bill")


@functools.cache
def step(name) -> dict:
    """One step of the record as it stands in the file. Raises: ValueError for another name."""
    if name not in STEPS:
        raise ValueError(f"name must be one of {', '.join(STEPS)}, got {name!r}")
    return read("layer_h200.json")["steps"][name]


def points(phase, config=V32, card=bill.H200) -> list[dict]:
    """Every right result of a phase, "prefill" or "decode", measured or extrapolated, and what the model says of it.

    Keys: position; tokens (that the call makes: the chunk's, or the batch's); attention (as `dsa_ref.bill` names it);
    ms, of the call; predicted, ms; extrapolated, whether ms is. Of decode's dense kernels the fastest one counts.
    """
    found = []
    for row in step(phase)["rows"]:
        tokens, results = row["tokens"] if phase == "prefill" else row["batch"], row["results"]
        if phase == "decode":
            results = {"DSA": results["DSA"], "dense": results.get(row["dense"], {})}
        for attention, result in results.items():
            if result.get("verdict") == "right":
                predict = bill.prefill_seconds if phase == "prefill" else bill.decode_seconds
                parts = predict(config, tokens, row["position"], attention, card)
                ms = result["ms"] if phase == "prefill" else result["us"] / 1e3
                found.append(
                    {
                        "position": row["position"], "tokens": tokens, "attention": attention, "ms": ms,
                        "predicted": 1e3 * sum(parts.values()), "extrapolated": result.get("extrapolated", False),
                    }
                )  # fmt: skip
    return found


def parts(position) -> dict[str, float]:
    """{part: ms} of DSA's recorded chunk that ends at `position`, the longest first.

    Raises: ValueError for a position that is not in the record.
    """
    rows = {row["position"]: row["results"]["DSA"].get("parts") for row in step("prefill")["rows"]}
    if not rows.get(position):
        raise ValueError(f"position must be one of {', '.join(map(str, rows))}, got {position!r}")
    found = {name: part["us"] / 1e3 for name, part in rows[position].items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))
