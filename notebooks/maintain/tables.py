"""Write the README's tables of measurements from the records: `python -m notebooks.maintain.tables`, as `make course`.

In README.md a table stands between `<!-- table: name -->` and `<!-- end of table -->`; a test makes each anew.
"""

import re

from dsa_ref import V32, bill, group_bill, records
from dsa_ref.training import results

README = records.figures_folder().parent / "README.md"
SHAPES = {  # a step of h200.json and h100.json -> (what it is called here, its shapes)
    "index_scores": ("index scores", ("4096 x 32K", "4096 x 128K", "1024 x 1M")),
    "select_topk": ("top-k", ("4096 x 32K independent", "4096 x 128K independent", "512 x 1M independent")),
    "lightning_select": ("the two, fused", ("4096 x 32K", "4096 x 128K", "1024 x 1M")),
    "sparse_attention": (
        "sparse attention",
        ("4096 x 32K, 128 heads, random", "4096 x 128K, 128 heads, random", "4096 x 32K, 16 heads, correlated"),
    ),
    "chain": ("all of it", ("4096 x 32K", "4096 x 128K", "1024 x 1M")),
}

MODELS = ("models_h200.json", "models_h100.json", "models_cpu.json")  # those that are there have a table
TRAINING = ("training_kernels_h200.json", "training_kernels_h100.json")  # likewise
PARALLEL = "parallel_*.json"  # one for each number of GPUs and card
DENSE = ("dense MHA, cuDNN", "dense MHA, flash")
WHO = {"eager": "eager", "sdpa": "sdpa", "ours": "ours", "ours_fp8": "FP8"}


def table(heads, rows) -> str:
    """Rows of texts as Markdown, the first column to the left."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def name(position) -> str:
    """256, 4K, 128K, 1M."""
    if position < 1 << 10:
        return str(position)
    return f"{position >> 20}M" if position >= 1 << 20 else f"{position >> 10}K"


def layer() -> str:
    """One layer's cost against the context, reading and writing, from layer_h200.json."""
    bill = records.read("layer_h200.json")["steps"]["bill"]
    steps = {(row["batch"], row["position"]): row for row in bill["decode"]}
    rows = []
    for row in bill["prefill"]:
        cells = [name(row["position"]), f"{row['dsa_ms']:.2f}", f"{row['dense_ms']:.2f}", f"{row['times']:.2f}"]
        for batch in (1, 8):
            found = steps.get((batch, row["position"]))
            kinds = ("dsa_ms", "dense_ms", "times")
            cells += [f"{found[key]:.{2 if key == 'times' else 0}f}" for key in kinds] if found else [""] * 3
        rows.append(cells)
    each = [" DSA", " dense", " times"]
    return table(["context", *(f"{what}{kind}" for what in ("read:", "write 1:", "write 8:") for kind in each)], rows)


def kernels() -> str:
    """Each step beside the fastest public kernel that is right, or the fastest where none is, on both cards."""
    cards = [records.read(f"{card}.json")["steps"] for card in ("h200", "h100")]
    rows = []
    for step, (called, shapes) in SHAPES.items():
        for shape in shapes:
            on = [next(row["results"] for row in card[step]["rows"] if row["case"] == shape) for card in cards]
            rows.append([f"{called}, {shape.removesuffix(' independent')}", *beside(on)])
    return table(["step, queries x keys", "ours, ms", "public, ms", "whose", "times, H200", "times, H100"], rows)


def beside(results) -> list[str]:
    """The cells behind the shape in `kernels`. results: those of the card whose times are shown, then of others."""
    peers = {who: result for who, result in results[0].items() if who not in ("ours", "torch")}
    who = min(peers, key=lambda peer: peers[peer]["ms"])
    times = [f"{result[who]['ms'] / result['ours']['ms']:.2f}" for result in results]
    wrong = "" if peers[who]["verdict"] == "right" else ", wrong"
    return [f"{results[0]['ours']['ms']:.2f}", f"{peers[who]['ms']:.2f}", who + wrong, *times]


def decode() -> str:
    """What a decode step does besides its products, and dense attention, from decode_h200.json."""
    rows = []
    for row in records.read("decode_h200.json")["steps"]["bytes"]["rows"]:
        dsa, saved, fewer = row["results"]["DSA"]["warm_us"], row["saved"]["warm"], row["bytes"]["times"]
        rows.append([row["case"], f"{dsa:.0f}", f"{saved['dense_us']:.0f}", f"{saved['times']:.2f}", f"{fewer:.2f}"])
    return table(["context", "DSA, µs", "dense, µs", "times quicker", "times fewer bytes"], rows)


def training_kernels() -> str:
    """The kernels of training, two tables for each of the records that are there."""
    return "\n\n".join(trained(file, records.read(file)["steps"]) for file in training_records())


def training_records() -> list[str]:
    """The records of the kernels of training that are there."""
    return [file for file in TRAINING if (records.figures_folder() / file).is_file()]


def trained(file, steps) -> str:
    """The backward beside what others have, then the losses and a layer's step, from one record of a card."""
    made = next(iter(steps.values()))["provenance"]
    order = [step for step in ("backward", "warm-up", "layer") if step in steps]
    found = {(step, row["case"]): row["results"] for step in order for row in steps[step]["rows"]}
    others = {"TileLang": "TileLang, ms", "TileLang, miles": "miles, ms", "torch, gather": "autograd, ms"}
    rows = []
    for (step, case), measured in found.items():
        if step == "backward":
            ours = measured.get("sorted", {})
            right = [measured[who]["ms"] for who in others if measured.get(who, {}).get("verdict") == "right"]
            times = f"{min(right) / ours['ms']:.2f}" if right and "ms" in ours else ""
            cells = [milliseconds(measured.get(who)) for who in ("sorted", "atomic", *others, DENSE[0])]
            more = [f"{ours['rate']:.0f}", f"{ours['memory_bytes'] / 2**30:.1f}"] if "ms" in ours else ["", ""]
            rows.append([case, cells[0], *more, *cells[1:5], times, *cells[5:]])
    heads = ["queries x keys", "ours, ms", "TFLOP/s", "GiB", "by atomics, ms", *others.values(), "times"]
    lines = [
        f"*{made['device']}, torch {made['torch']}, triton {made['triton']}",
        f"([`{file}`](figures/{file}), `{made['command']}`).*",
        "",
        table([*heads, f"{DENSE[0]}, ms"], rows),
        "",
    ]
    rows = []
    for (step, case), measured in found.items():
        against = {"backward": "sorted", "warm-up": next((who for who in DENSE if "ms" in measured.get(who, {})), "")}
        called = {"backward": "sparse attention's backward", "warm-up": f"{against['warm-up']}, backward"}
        for who, result in measured.items():
            if step != "layer" and not who.startswith("KL"):
                continue
            base = measured.get(against.get(step, "sparse"), {})
            times = f"{result['ms'] / base['ms']:.2f}" if "ms" in result and "ms" in base else ""
            memory = f"{result['memory_bytes'] / 2**30:.1f}" if "ms" in result else ""
            name = who if step != "layer" else f"a layer's step, {who}"
            rows.append([f"{name}, {case}", milliseconds(result), times, called.get(step, "the sparse step"), memory])
    return "\n".join([*lines, table(["", "ms", "times", "of", "GiB"], rows)])


def milliseconds(result) -> str:
    """A time, with what is wrong with it; or why there is none."""
    if result is None:
        return ""
    if "ms" not in result:
        return result["verdict"]
    return f"{result['ms']:.2f}" + ("" if result["verdict"] == "right" else ", wrong")


def models() -> str:
    """transformers' models as they are and made sparse, a table for each of the records that are there."""
    files = [file for file in MODELS if (records.figures_folder() / file).is_file()]
    return "\n\n".join(model(file, records.read(file)) for file in files)


def model(file, record) -> str:
    """What was measured where, how it was judged, and the table of one record of `dsa_bench.models`."""
    made, results = record["provenance"], record["judge"]["results"]
    versions = ", ".join(f"{package} {made[package]}" for package in ("torch", "triton", "transformers"))
    gpu = not made["device"].startswith("CPU")
    ours = [who for who in ("ours", "ours_fp8") if who in results]
    judged = ", ".join(
        f"by at most {100 * results[who]['tolerance']:.2g} % of its norm with {WHO[who]} at "
        f"{100 * results[who]['share']:.1f} %"
        for who in ours
    )
    threads = "" if gpu else ", one thread, whose processor time it is"
    memory = "GiB: at most, weights included." if gpu else "MiB: what came on top while it read."
    lines = [
        f"*{made['device']}{threads}, {record['sizes']['num_hidden_layers']} layers, {record['dtype'][6:]}, {versions}",
        f"([`{file}`](figures/{file}), `{made['command']}`). {memory}",
        f"Given the same input, a layer's attention output differs from sdpa's {judged} of",
        f"{record['judge']['tokens']} tokens.*",
    ]
    decodes = {(row["batch"], row["tokens"]): row["results"] for row in record["decode"]}
    everyone = ["eager", "sdpa", *ours]
    rows = []
    for T, found in [(row["tokens"], row["results"]) for row in record["prefill"]]:
        times = f"{found['sdpa']['seconds'] / found['ours']['seconds']:.2f}" if "seconds" in found["sdpa"] else ""
        cells = [name(T), *(cell(found[who], "seconds") for who in everyone), times]
        cells += [cell(found[who], "GiB" if gpu else "MiB") for who in ("sdpa", "ours")]
        rows.append(cells + [cell(decodes[1, T][who], "ms") for who in everyone])
    for (B, T), found in decodes.items():
        if B > 1:
            cells = [f"{B} of {name(T)}", *[""] * (len(everyone) + 3)]
            rows.append(cells + [cell(found[who], "ms") for who in everyone])
    called = [WHO[who] for who in everyone]
    heads = [
        "tokens",
        *(f"read: {who}, s" for who in called),
        "times sdpa",
        *(f"{who}, {'GiB' if gpu else 'MiB'}" for who in ("sdpa", "ours")),
    ]
    lines += ["", table([*heads, *(f"write: {who}, ms" for who in called)], rows)]
    if record["compiled"]:
        lines += [
            "",
            "*One token as one CUDA graph: the whole forward pass by `torch.compile`, on a static cache.*",
            "",
        ]
        rows = [
            [name(row["tokens"]), *(cell(row["results"][who], "finer") for who in everyone[1:])]
            for row in record["compiled"]
        ]
        lines.append(table(["tokens", *(f"write: {who}, ms" for who in called[1:])], rows))
    return "\n".join(lines)


def cell(result, what) -> str:
    """One figure of a result of `dsa_bench.models`, or why there is none."""
    if "seconds" not in result:
        return "no memory" if "out of memory" in result["note"] else "failed"
    if what == "seconds":
        return f"{result['seconds']:.3f}" if result["seconds"] < 1 else f"{result['seconds']:.2f}"
    if what == "finer":
        return f"{1e3 * result['seconds']:.2f}"
    if what == "ms":
        return f"{1e3 * result['seconds']:.1f}"
    if what == "GiB":
        return f"{result['peak_bytes'] / 2**30:.1f}"
    return f"{(result['peak_bytes'] - result['held_bytes']) / 2**20:.0f}"


def training() -> str:
    """What each way to select comes to, a table for each of the records of training that are there."""
    return "\n\n".join(regimes(file, results.read_runs(file)) for file in results.recorded())


def regimes(file, runs) -> str:
    """How the runs of one record were made, and the table of their regimes: mean and range over the seeds."""
    made, plan = runs[0]["provenance"], runs[0]["plan"]
    dense, warm, last = plan["steps"]
    short = max((until for until, length, _ in plan["starts"] if length < plan["length"]), default=0)
    lines = [
        f"*{made['device']}, torch {made['torch']}, triton {made['triton']} ([`{file}`](figures/{file}),",
        f"`{made['command']}`); seeds {', '.join(str(run['seed']) for run in runs)}, {dense} steps of dense",
        f"training, {warm} of warm-up, {last} of the last stage, of {plan['batch']} windows of {plan['length']} bytes",
        f"each, in the first {short:.0%} of the dense ones of as many bytes in shorter windows;",
        f"k = {plan['k']}, {plan['windows']} held-out windows. Mean, and range over the seeds.*",
        "",
    ]
    digits = {"loss": 4, "ratio": 4, "error": 4, "worst": 4, "needles": 3, "recall": 3}
    rows = [
        [f"DSA, {name}" if name in results.PRECISIONS else name]
        + [results.spread([getattr(run, column) for run in found], places) for column, places in digits.items()]
        for name, found in results.rows(runs).items()
    ]
    heads = ["regime", "loss", "to dense", "its error", "largest of a part", "needles", "mass, of the oracle's"]
    return "\n".join([*lines, table(heads, rows)])


def parallel() -> str:
    """A layer over several GPUs against one, for each of the records that are there."""
    return "\n\n".join(over_ranks(file, records.read(file)["steps"]) for file in parallel_records())


def parallel_records() -> list[str]:
    """The records of a layer over several GPUs that are there."""
    return sorted(path.name for path in records.figures_folder().glob(PARALLEL))


def over_ranks(file, steps) -> str:
    """Prompts, training and decode over the ranks of one record, beside what `group_bill` predicts of a prompt."""
    made = next(iter(steps.values()))["provenance"]
    size, rows = made["ranks"], []
    order = [name for name in ("prefill", "long", "training", "decode") if name in steps]
    for section, row in [(name, row) for name in order for row in steps[name]["rows"]]:
        cells = [row["case"], f"{row['one_ms']:.2f}", f"{row['all_ms']:.2f}", f"{row['efficiency']:.3f}"]
        cells += predicted(row, size) if section in ("prefill", "long") else ["", ""]
        exchange = row["exchange"]
        cells += [f"{row['exchanges_ms']['all-gather']:.2f}", f"{exchange['share']:.1%}"]
        if "selection" in row:
            cells += [f"{100 * row['selection'][plan]['ms_imbalance']:.1f} %" for plan in ("zigzag", "contiguous")]
        else:
            cells += ["", ""]
        wrong = "" if row["verdict"] == "right" else ", wrong"
        memory = "" if None in row["memory_bytes"] else f"{max(row['memory_bytes']) / 2**30:.1f}"
        rows.append([cells[0] + wrong, *cells[1:], memory])
    lines = [
        f"*{size} x {made['device']}, torch {made['torch']}, triton {made['triton']}, NCCL {made['nccl']}",
        f"([`{file}`](figures/{file}), `{made['command']}`).*",
        "",
    ]
    heads = [
        "one layer", "one GPU, ms", f"{size} GPUs, ms", "efficiency", "predicted, ms", "predicted", "all-gather, ms",
        "exchanges", "zigzag", "contiguous", "GiB",
    ]  # fmt: skip
    return "\n".join([*lines, table(heads, rows)])


def predicted(row, size) -> list[str]:
    """What `group_bill` says of a row's prompt, or of the tokens at its end: ms on all ranks, and the efficiency."""
    T, S = row["tokens"], row["keys"]
    one = sum(bill.prefill_seconds(V32, T, S).values())
    every = sum(group_bill.gathered_seconds(V32, T, S, size).values())
    return [f"{1e3 * every:.2f}", f"{one / size / every:.3f}"]


TABLES = {
    "layer": layer,
    "kernels": kernels,
    "decode": decode,
    "training_kernels": training_kernels,
    "models": models,
    "training": training,
    "parallel": parallel,
}


def written(text) -> str:
    """README's text with each of its tables made anew.

    "training", "training_kernels" and "parallel" belong there once there is a record of them. Raises: ValueError for a
    table that nobody makes or that has nothing to show, or one that is missing.
    """
    found = re.findall(r"<!-- table: (\w+) -->", text)
    recorded = {"training": results.recorded(), "training_kernels": training_records(), "parallel": parallel_records()}
    wanted = [name for name in TABLES if recorded.get(name, True)]
    if sorted(found) != sorted(wanted):
        raise ValueError(f"README.md must have the tables {', '.join(wanted)} once each, got {', '.join(found)}")
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)",
        lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}",
        text,
        flags=re.S,
    )


def main():
    text = written(README.read_text(encoding="utf-8"))
    with records.replacing(README) as new:
        new.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
