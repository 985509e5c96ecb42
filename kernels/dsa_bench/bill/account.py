"""From measured times to the bill: parts, FLOPs of a dense chunk, extrapolation, ms per 1000 tokens, half the cost.

One layer throughout. A model of 61 such layers takes 61 times as much, and its MoE or FFN, embeddings, head and
communication besides, which are the same with both kinds of attention and are not here.
"""

import math
import re

from dsa_ref import cost

LAYERS = 61  # V3.2's
PARTS = {  # of a step, by the names of their kernels; the first that matches
    "scores and selection": r"index_scores|topk|select|tournament|translate|_collect|_choose|_bound|radix|_sampled",
    "attention": r"sparse_attention|_merge|_pack|mha|cudnn|sdpa|flash|fmha",
    "products": r"_head_weights|gemm|gemv|nvjet|cutlass|cublas|xmma|splitK|dot_kernel",
    "merge": r"lerp|sigmoid|logaddexp",
    "small": r"_append|_rms_norm|_index_queries|_turn_into|_place_tokens|_fused",
}
ESSENTIAL = ("attention", "scores and selection", "products")
NAME = 80  # characters of a kernel's name, without what all of torch's names begin with
PREFIXES = re.compile(
    r"void |at::native::|\(anonymous namespace\)::|gpu_kernel_impl_nocast<|elementwise_kernel<[\d, ]+"
)


def parts(kernels):
    """{"launches", "parts": {part: {"us", "launches"}}, "kernels"} of one call's kernels, `kernels_of`'s."""
    sums = {}
    for kernel in kernels:
        part = next((name for name, names in PARTS.items() if re.search(names, kernel["name"])), "other")
        made = sums.setdefault(part, {"us": 0.0, "launches": 0})
        made["us"] += kernel["us"]
        made["launches"] += kernel["launches"]
    short = [kernel | {"name": PREFIXES.sub("", kernel["name"])[:NAME]} for kernel in kernels]
    return {"launches": sum(kernel["launches"] for kernel in kernels), "parts": sums, "kernels": short}


def ratio(ms, sums):
    """{"essential_ms", "ratio"}: what attention, selection and products alone take, and the whole call over it."""
    essential = sum(sums[part]["us"] for part in ESSENTIAL if part in sums) / 1e3
    return {"essential_ms": essential, "ratio": ms / essential if essential else None}


def product_flops(config):
    """FLOPs a token of the products with weights that a dense layer in MHA mode makes for its new tokens."""
    c, head = config, config.qk_nope_head_dim + config.qk_rope_head_dim
    queries = c.q_lora_rank * (c.dim + c.n_heads * head)
    return 2 * (queries + c.dim * c.latent_dim + c.n_heads * c.v_head_dim * c.dim)


def dense_flops(config, T, S, kept):
    """FLOPs of a dense chunk of T tokens that ends at S; kept: whether only the new tokens' heads are made."""
    c = config
    heads = 2 * c.n_heads * c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
    return cost.prefill_cost(c, T, S).dense + heads * (T if kept else S) + product_flops(c) * T


def extrapolated(rows, config, T, position, who, kept):
    """What `who` would take at this position by its FLOPs at the rate last measured, None where it never was."""
    last = next((row for row in reversed(rows) if _measured(row["results"].get(who))), None)
    if last is None:
        return None
    flops, rate = dense_flops(config, T, position, kept), last["results"][who]["rate"]
    note = f"by FLOPs, at the rate of position {last['position']}"
    return {
        "verdict": "right",
        "note": note,
        "ms": flops / rate / 1e9,
        "flops": flops,
        "rate": rate,
        "extrapolated": True,
    }


def _measured(result):
    return result is not None and "ms" in result and not result.get("extrapolated")


def worst(times):
    """{"chunk", "times"}: the chunk that takes longest against the mean of its two neighbours."""
    beside = [2 * own / (before + after) for before, own, after in zip(times, times[1:], times[2:], strict=False)]
    return {"chunk": beside.index(max(beside)) + 1, "times": max(beside)} if beside else None


def right(results, unit):
    """{who: time} of the right dense results that have one in `unit`, "ms" or "us"."""
    return {who: r[unit] for who, r in results.items() if who != "DSA" and r["verdict"] == "right" and unit in r}


def fastest(results, unit):
    """The name of the fastest right dense result in `unit`, None without one."""
    found = right(results, unit)
    return min(found, key=found.get, default=None)


def made_up(prefill, decode, prompt=None):
    """The bill of measured rows of "prefill" and "decode": ms per 1000 tokens, and where DSA costs half of dense.

    prompt: a whole prompt by DSA as it was measured, to be set beside the sum of the chunks that stand for it here.
    """
    chunks, steps = prefill_lines(prefill), decode_lines(decode)
    half = {"prefill": halved(chunks, "times"), "prompt": halved(chunks, "prompt_times")}
    for who in dict.fromkeys(who for line in chunks for who in line["all"]):
        found = [{"position": line["position"], who: line["all"][who]} for line in chunks if who in line["all"]]
        half[f"prefill, {who}"] = halved(found, who)
    for batch in dict.fromkeys(line["batch"] for line in steps):
        half[f"decode, batch {batch}"] = halved([line for line in steps if line["batch"] == batch], "times")
    made = {"layers": LAYERS, "prefill": chunks, "decode": steps, "half": half}
    points = {row["position"]: row["results"]["DSA"].get("ms") for row in prefill}
    if prompt and all(points.values()):
        tokens = prompt["chunk"] * len(prompt["chunks_ms"])
        summed = prompt_ms(points, tokens, prompt["chunk"])
        made["prompt"] = {"tokens": tokens, "measured_ms": prompt["total_ms"], "summed_ms": summed}
    return made


def prefill_lines(rows):
    """A chunk's, and the whole prompt's, ms per 1000 tokens at each position where DSA and dense are known."""
    lines, points = [], {"dsa": {}, "dense": {}}
    for row in rows:
        name, position = fastest(row["results"], "ms"), row["position"]
        if name is None or "ms" not in row["results"]["DSA"]:
            continue
        both = {"dsa": row["results"]["DSA"]["ms"], "dense": row["results"][name]["ms"]}
        line = {"position": position, "dense": name, "times": both["dense"] / both["dsa"]}
        line["extrapolated"] = row["results"][name]["extrapolated"]
        line["all"] = {who: row["results"][who]["ms"] / both["dsa"] for who in right(row["results"], "ms")}
        for who, ms in both.items():
            line[f"{who}_ms"] = 1e3 * ms / row["tokens"]
            points[who][position] = ms
            whole = prompt_ms(points[who], position, row["tokens"])
            line[f"prompt_{who}_ms"] = 1e3 * whole / position
        lines.append(line | {"prompt_times": line["prompt_dense_ms"] / line["prompt_dsa_ms"]})
    return lines


def prompt_ms(points, position, chunk):
    """The sum of the chunks that end at chunk, 2 chunk, ..., position; points: {position: a chunk's ms}.

    Between two points a chunk's time grows linearly; below the first it is the first's.
    """
    return sum(_at(points, end) for end in range(position, 0, -chunk))


def _at(points, position):
    """The time at a position, linear between the points beside it."""
    below = max((p for p in points if p <= position), default=min(points))
    above = min((p for p in points if p >= position), default=max(points))
    if below >= above:
        return points[below]
    return points[below] + (points[above] - points[below]) * (position - below) / (above - below)


def decode_lines(rows):
    """ms per 1000 tokens of each step whose DSA and dense times are known."""
    lines = []
    for row in rows:
        name = fastest(row["results"], "us")
        if name is not None and "us" in row["results"]["DSA"]:
            dsa, dense = (row["results"][who]["us"] / row["batch"] for who in ("DSA", name))  # us a token, ms per 1000
            line = {"batch": row["batch"], "position": row["position"], "dsa_ms": dsa, "dense_ms": dense}
            lines.append(line | {"dense": name, "times": dense / dsa})
    return lines


def halved(lines, times):
    """{"position", "between"}: where `times` reaches 2 for good, interpolated in log(position); None where it never
    does, and "between" [None, p] where it has at the first position p already."""
    least = next((i for i in range(len(lines)) if all(line[times] >= 2 for line in lines[i:])), None)
    if least is None:
        return {"position": None, "between": None}
    above = lines[least]
    if least == 0:
        return {"position": above["position"], "between": [None, above["position"]]}
    below = lines[least - 1]
    share = (2 - below[times]) / (above[times] - below[times])
    log = math.log(below["position"]) + share * math.log(above["position"] / below["position"])
    return {"position": round(math.exp(log)), "between": [below["position"], above["position"]]}
