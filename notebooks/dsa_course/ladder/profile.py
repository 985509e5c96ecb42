"""Notebook 11's recorded profiles: the kernels of a layer's decode step, and what its chunks of a prefill took."""

from dsa_ref import cost

from .record import read_record

PARTS = {  # of a decode step: texts in the names of its kernels
    "scores": ("index_scores",),
    "selection": ("_select", "_tournament"),
    "attention": ("sparse_attention", "_merge"),
    "norms, RoPE, FP8, cache": ("_append", "_rms_norm", "_head_weights", "_index_queries", "_turn_into", "_place"),
    "products": ("nvjet", "splitKreduce", "gemm"),
}
CASE = "1 x 1, 128K"


def shares(kernels, whole_us, parts) -> dict[str, float]:
    """{part: its share of whole_us} of a profile, with "other", kernels of no part, and "idle", when none ran."""
    found = dict.fromkeys((*parts, "other"), 0.0)
    for name, _, us in kernels:
        part = next((part for part, texts in parts.items() if any(text in name for text in texts)), "other")
        found[part] += us / whole_us
    return found | {"idle": 1 - sum(found.values())}


def decode_profile(how) -> tuple[float, list]:
    """(us of the whole step, [(kernel's name, launches, us of all of them)], the longest first).

    how: "eager", each kernel launched from Python, or "replayed", from a CUDA graph. One text of 128K tokens.

    Raises: ValueError for another how.
    """
    if how == "eager":
        rows = read_record("decode_h200.json")["steps"]["layer_step"]["rows"]
        row = next(row for row in rows if row["case"] == CASE)
        listed, whole = row["kernels"], row["results"]["ours, eager"]["warm_us"]
        listed = listed["eager"] if isinstance(listed, dict) else listed
    elif how == "replayed":
        rows = read_record("layer_h200.json")["steps"]["decode"]["rows"]
        result = next(row["results"]["DSA"] for row in rows if (row["batch"], row["position"]) == (1, 131_072))
        listed, whole = result["kernels"], result["us"]
    else:
        raise ValueError(f"how must be 'eager' or 'replayed', got {how!r}")
    return whole, [(short(kernel["name"]), kernel["launches"], kernel["us"]) for kernel in listed]


def short(name) -> str:
    """A kernel's name without namespaces, template and arguments."""
    name = name.removeprefix("void ").replace("at::native::", "").replace("(anonymous namespace)::", "")
    return name if name.startswith("Mem") else name.partition("<")[0].partition("(")[0]


def chunks(attention) -> dict[int, tuple[int, float]]:
    """{position: (causal pairs, ms)} of a layer's recorded chunks of 4096 tokens that end beyond 8K.

    attention: as the record names it, "DSA" or "dense, heads kept".
    """
    found = {}
    for row in read_record("layer_h200.json")["steps"]["prefill"]["rows"]:
        result = row["results"][attention]
        if row["position"] > 8192 and not result.get("extrapolated"):
            found[row["position"]] = cost.causal_pairs(row["tokens"], row["position"]), result["ms"]
    return found
