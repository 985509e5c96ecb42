"""Write the README's tables of measurements from the records: `python -m notebooks.maintain.tables`, as `make course`.

In README.md a table stands between `<!-- table: name -->` and `<!-- end of table -->`; a test makes each anew.
"""

import re

from dsa_ref import records

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


def table(heads, rows) -> str:
    """Rows of texts as Markdown, the first column to the left."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def name(position) -> str:
    """4K, 128K, 1M."""
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


TABLES = {"layer": layer, "kernels": kernels, "decode": decode}


def written(text) -> str:
    """README's text with each of its tables made anew.

    Raises: ValueError for a table that nobody makes, or one that is missing.
    """
    found = re.findall(r"<!-- table: (\w+) -->", text)
    if sorted(found) != sorted(TABLES):
        raise ValueError(f"README.md must have the tables {', '.join(TABLES)} once each, got {', '.join(found)}")
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
