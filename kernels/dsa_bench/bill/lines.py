"""The bill as text, in lines of at most 120 columns."""

from dsa_ref.cost import dollars_per_million

from .account import LAYERS, PARTS

SHORT = {"scores and selection": "select"}


def size(n):
    """2048 as 2K, 1048576 as 1M."""
    return f"{n >> 20}M" if n >= 1 << 20 and n % (1 << 20) == 0 else f"{n >> 10}K" if n % 1024 == 0 else str(n)


def prefill(made):
    """The last position of a prefill's rows: DSA with its parts, and dense beside it."""
    row = made["rows"][-1]
    found = ["", "chunk ending at"] if len(made["rows"]) == 1 else []
    for who, result in row["results"].items():
        found.append(f"{size(row['position']):>5} {who:<18} {timed(result, 'ms')}")
        if "ratio" in result:
            found[-1] += f", {result['ratio']:.3f} of {result['essential_ms']:.2f} ms, same bits x {result['repeats']}"
        found += details(result)
    return found


def decode(made):
    """The last shape of decode's rows."""
    row = made["rows"][-1]
    found = ["", "step of"] if len(made["rows"]) == 1 else []
    for who, result in row["results"].items():
        found.append(f"{row['batch']:>3} x {size(row['position']):>5} {who:<24} {timed(result, 'us')}")
        found += details(result)
    return found


def prompt(made):
    """A whole prompt."""
    times = made["chunks_ms"]
    text = f"prompt of {size(made['chunk'] * len(times))}: {made['total_ms'] / 1e3:.2f} s in {len(times)} chunks"
    found = [
        "",
        text + f", the last {times[-1]:.1f} ms; peak {made['peak_gib']:.2f} GiB; warm in {made['warm_s']:.0f} s",
    ]
    if worst := made["worst"]:
        found.append(
            f"      chunk {worst['chunk']} takes {worst['times']:.2f} times its neighbours' mean, the most of all"
        )
    if made["compiled"]:
        names = ", ".join(f"{entry['kernel']} in chunk {entry['chunk']}" for entry in made["compiled"])
        found.append(f"      compiled meanwhile: {names}"[:120])
    return found


LAST = {"prefill": prefill, "prompt": prompt, "decode": decode}


def timed(result, unit):
    """A result's time with its spread, and DSA's speed over it."""
    if unit not in result:
        return f"{result['verdict']}: {result['note']}"[:75]
    text = f"{result[unit]:9.2f} {unit}"
    if f"{unit}_10" in result:
        text += f" ({result[f'{unit}_10']:.2f} to {result[f'{unit}_90']:.2f})"
    if "speed" in result:
        text += f", DSA {result['speed']:.2f}x" + (" extrapolated" if result.get("extrapolated") else "")
    return text


def details(result):
    """The parts of a result, on a line of their own."""
    if "parts" not in result:
        return []
    sums = [
        f"{SHORT.get(part, part)} {result['parts'][part]['us'] / 1e3:.3f} ({result['parts'][part]['launches']:g})"
        for part in (*PARTS, "other")
        if part in result["parts"]
    ]
    peak = f", peak {result['peak_gib']:.2f} GiB" if "peak_gib" in result else ""
    return [f"      {result['launches']:g} launches{peak}; ms: {', '.join(sums)}"[:120]]


def bill(made, price):
    """The bill in ms per 1000 tokens of one layer, and in dollars per million tokens of all layers' attention."""
    found = [
        "",
        f"ms per 1000 tokens, one layer; $ per million tokens of {LAYERS} layers' attention at ${price:g} a GPU-hour",
    ]
    for line in made["prefill"]:
        star = "*" if line["extrapolated"] else " "
        chunk, prompt = (
            f"DSA {money(line[f'{kind}dsa_ms'], price)}, dense {money(line[f'{kind}dense_ms'], price)}"
            for kind in ("", "prompt_")
        )
        found.append(f"prefill {size(line['position']):>5}: {chunk}{star}= {line['times']:.2f}x ({line['dense']})")
        found.append(f"       a prompt up to there: {prompt}{star}= {line['prompt_times']:.2f}x")
    for line in made["decode"]:
        found.append(
            f"decode {line['batch']:>2} x {size(line['position']):>5}: DSA {money(line['dsa_ms'], price)}, dense "
            f"{money(line['dense_ms'], price)} = {line['times']:.2f}x ({line['dense']})"
        )
    if prompt := made.get("prompt"):
        measured, summed = (prompt[name] / 1e3 for name in ("measured_ms", "summed_ms"))
        found.append(
            f"a prompt of {size(prompt['tokens'])} by DSA: {measured:.2f} s measured, {summed:.2f} s by its chunks"
        )
    for what, half in made["half"].items():
        found.append(f"half the cost, {what}: {reached(half)}")
    return found


def money(ms, price):
    """Milliseconds per 1000 tokens, and the dollars."""
    return f"{ms:.2f} (${dollars_per_million(ms, LAYERS, price):.3f})"


def reached(half):
    """Where half the cost is reached, in words."""
    if half["position"] is None:
        return "not reached"
    low, high = half["between"]
    if low is None:
        return f"already at {size(high)}, the first position"
    return f"from {half['position']:,} tokens on (between {size(low)} and {size(high)})"
