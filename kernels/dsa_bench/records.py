"""What a run leaves behind: a table of at most 120 columns, and JSON that keeps the steps it did not measure."""

import json

from dsa_ref.records import figures_folder, write

from .run import OURS

CARDS = {"H200": "h200.json", "H100": "h100.json"}
COLUMNS = (("case", 34), ("who", 28), ("ms", 8), ("10-90 %", 11), ("rate", 13), ("of best", 7), ("ours is", 7))
DECODE_COLUMNS = (  # microseconds
    ("case", 25), ("who", 28), ("warm us", 8), ("10-90 %", 11), ("cold us", 8), ("rate", 13), ("of best", 7),
    ("ours is", 7), ("cold", 5),
)  # fmt: skip


def default_log(gpu):
    """Where figures of a card with this name go, None for a card that has no file."""
    return next((figures_folder() / file for card, file in CARDS.items() if card in gpu), None)


def decode_log(gpu):
    """Where figures of a decode step go, None for a card that has no file."""
    found = default_log(gpu)
    return found and found.with_name(f"decode_{found.name}")


def layer_log(gpu):
    """Where figures of a whole layer go, None for a card that has no file."""
    found = default_log(gpu)
    return found and found.with_name(f"layer_{found.name}")


def training_log(gpu):
    """Where figures of training's kernels go, None for a card that has no file."""
    found = default_log(gpu)
    return found and found.with_name(f"training_kernels_{found.name}")


def parallel_log(gpu, ranks):
    """Where figures of a layer over so many GPUs go, None for a card that has no file."""
    found = default_log(gpu)
    return found and found.with_name(f"parallel_{ranks}_{found.name}")


def ladder_log():
    """Where the ladder's figures go, on any card."""
    return figures_folder() / "ladder.json"


def merge(path, steps, ceilings):
    """Write `steps`, {step: record with its own provenance}, into the JSON at `path`; other steps there stay.

    ceilings: as `measure.ceilings` gives them, of this run; every step's record names the ceilings of its own run.
    """
    found = json.loads(path.read_text()) if path.exists() else {"steps": {}}
    for step, record in steps.items():
        found["steps"][step] = record | {"ceilings": ceilings}
    write(path, found)


def header() -> str:
    """The table's first line."""
    return _line([name for name, _ in COLUMNS])


def case_lines(record):
    """The table's lines of one case: ours and each peer; `ours is` says how many times as fast as that peer.

    What is not right comes with its verdict, and a note is a line of its own.
    """
    lines = []
    for who, result in record["results"].items():
        if result["verdict"] == "missing" and lines:
            lines.append(f"    {who}: missing: {result['note']}"[:120])
            continue
        cells = ["" if lines else record["case"], who, "", "", "", "", ""]
        if "ms" in result:
            cells[2:6] = _timed_cells(result, record["unit"])
        if "speed" in result:
            cells[6] = f"{result['speed']:.2f}x"
        lines.append(_line(cells))
        lines += _remarks(who, result)
    facts = {name: value for name, value in record["facts"].items() if value is not None}
    if facts:
        lines.append("    " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    return lines


def _remarks(who, result):
    """The lines below a result: what is wrong with it, or noted, and how it was timed if not in a graph."""
    lines = []
    if result["verdict"] != "right":
        lines.append(f"    {who}: {result['verdict']}: {result['note']}"[:120])
    elif result["note"]:
        lines.append(f"    {who}: {result['note']}"[:120])
    if result.get("timed", "graph") != "graph":
        lines.append(f"    {who}: timed {result['timed']}"[:120])
    return lines


def _timed_cells(result, unit):
    ms = result["ms"]
    low, high = (100 * (result[name] / ms - 1) for name in ("ms_10", "ms_90"))
    return [f"{ms:.3f}", f"{low:+.1f} {high:+.1f}", *_rate_cells(result, unit)]


def _rate_cells(result, unit):
    share = result["of_ceiling"]
    rate = f"{result['rate']:.0f} {unit}" if unit == "TFLOP/s" else f"{result['rate']:.2f} {unit}"
    return [rate, f"{share:.0%}" if share is not None else ""]


def decode_header() -> str:
    """The first line of a decode step's table."""
    return _line([name for name, _ in DECODE_COLUMNS], DECODE_COLUMNS)


def decode_lines(record):
    """The lines of one case of a decode step: ours and each peer; `ours is`: how many times as fast, warm / cold."""
    lines = []
    for who, result in record["results"].items():
        if result["verdict"] == "missing" and lines:
            lines.append(f"    {who}: missing: {result['note']}"[:120])
            continue
        cells = ["" if lines else record["case"], who, *[""] * 7]
        if "warm_us" in result:
            low, high = (100 * (result[f"warm_us_{end}"] / result["warm_us"] - 1) for end in (10, 90))
            cells[2:5] = f"{result['warm_us']:.1f}", f"{low:+.1f} {high:+.1f}", f"{result['cold_us']:.1f}"
            cells[5:7] = _rate_cells(result, record["unit"])
        if "speed_warm" in result:
            cells[7:9] = f"{result['speed_warm']:.2f}x", f"{result['speed_cold']:.2f}x"
        lines.append(_line(cells, DECODE_COLUMNS))
        lines += _remarks(who, result)
    facts = {name: value for name, value in record["facts"].items() if isinstance(value, (int, float, str))}
    return lines + [f"    {name}: {value}"[:120] for name, value in facts.items()]


def _line(cells, columns=COLUMNS):
    padded = []
    for i, (cell, (_, width)) in enumerate(zip(cells, columns, strict=True)):
        padded.append(f"{cell[:width]:<{width}}" if i < 2 else f"{cell[:width]:>{width}}")
    return " ".join(padded).rstrip()


def ceiling_lines(ceilings):
    """The measured ceilings as lines of text."""
    units = {"copy": "TB/s, read and written", "bf16": "TFLOP/s, 8192³", "fp8": "TFLOP/s, 8192³, fast accumulation"}
    return [
        f"ceiling {name}: " + (f"{value:.4g} {units[name]}" if value is not None else "not on this card")
        for name, value in ceilings.items()
    ]


def ours_wrong(record) -> bool:
    """Whether ours was wrong or failed in this case."""
    return record["results"].get(OURS, {"verdict": "right"})["verdict"] != "right"


def any_of_ours_wrong(record) -> bool:
    """Whether anything of ours was wrong or failed in this case of a decode step."""
    return any(result["verdict"] != "right" for result in record["results"].values() if result.get("ours", True))
