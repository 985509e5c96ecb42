"""A measured row as text, in lines of at most 120 columns."""

WIDTH = 120


def row(section, found, ranks):
    """Times, efficiency and verdict; what is exchanged; memory; and for a prefill the indexer's shares."""
    exchange = found["exchange"]
    alone = ", ".join(f"{who} {ms:.2f} ms" for who, ms in found["exchanges_ms"].items())
    texts = [
        f"{section}: {found['case']}: one GPU {found['one_ms']:.2f} ms, {ranks} GPUs {found['all_ms']:.2f} ms, "
        f"efficiency {found['efficiency']:.3f} ({found['efficiency_10']:.3f} to {found['efficiency_90']:.3f})",
        f"    {found['verdict']}: {found['note']}",
        f"    alone: {alone}",
        f"    in a call: {exchange['bytes'] / 1e6:.3f} MB received in {exchange['ms']:.2f} ms, messages "
        f"{exchange['messages_ms']:.2f} ms, together {exchange['share']:.1%}; waits {span(exchange['wait_ms'])} ms",
    ]
    if found["one_memory_bytes"] is not None:
        gib = [size / 2**30 for size in found["memory_bytes"]]
        texts.append(f"    memory beyond inputs: {span(gib)} GiB a rank, {found['one_memory_bytes'] / 2**30:.2f} alone")
    for plan, work in found.get("selection", {}).items():
        above = ", ".join(f"{what} {work[f'{what}_imbalance']:+.2%}" for what in ("pairs", "ms"))
        texts.append(f"    indexer, {plan}: above the mean {above} ({span(work['ms'])} ms)")
    return [text[:WIDTH] for text in texts]


def span(values):
    """The smallest and the largest."""
    return f"{min(values):.2f} to {max(values):.2f}"
