"""Notebook 17: how much of the causal triangle each rank gets, by contiguous shares and by zigzag."""

import ipywidgets
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dsa_ref.parallel import Zigzag

from ..viz import COLOURS, LiveFigure

TOKENS = 1 << 17
PLANS = ("contiguous", "zigzag")


def chunks_of(plan, T, size, rank) -> list[range]:
    """The rank's rows, a range a chunk."""
    if plan == "contiguous":
        return [range(rank * T // size, (rank + 1) * T // size)]
    return list(Zigzag(T, size).chunks(rank))


def pairs_of(chunks) -> int:
    """(query, key) pairs that rows see: row t sees t + 1 keys."""
    return sum((chunk.start + 1 + chunk.stop) * len(chunk) // 2 for chunk in chunks)


def shares_at(plan, size) -> dict:
    """What `live_shares` shows, its `.data`."""
    chunks = {rank: chunks_of(plan, TOKENS, size, rank) for rank in range(size)}
    pairs = [pairs_of(own) for own in chunks.values()]
    work = [own * size / sum(pairs) for own in pairs]
    return {"plan": plan, "size": size, "chunks": chunks, "work": work, "imbalance": max(work) - 1}


def live_shares(size=4, plan="contiguous") -> LiveFigure:
    """The causal triangle of 128K tokens, cut among ranks, and how many pairs each scores. Controls: plan, ranks.

    `.data`: plan, size, chunks {rank: its ranges}, work (pairs of each rank, over the mean), imbalance (the most, over
    the mean, less 1).
    """

    def draw(data):
        figure = Figure(figsize=(8.6, 3.7), layout="constrained", facecolor=COLOURS["visible"])
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
        K = 1024
        for rank, chunks in data["chunks"].items():
            shade, ink = shade_of(rank, data["size"])
            for chunk in chunks:
                first, last = chunk.start / K, chunk.stop / K
                left.fill([0, first, last, 0], [first, first, last, last], color=shade, linewidth=0)
                left.text(
                    max(first, last - first) / 2,
                    (first + last) / 2,
                    str(rank),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=ink,
                )
            right.bar(rank, data["work"][rank], color=shade, edgecolor="black", linewidth=0.6)
            right.text(rank, data["work"][rank] + 0.03, f"{data['work'][rank]:.2f}", ha="center", fontsize=8)
        end = TOKENS / K
        left.add_patch(Rectangle((0, 0), end, end, fill=False, edgecolor="#777777", linewidth=0.8))
        left.set(xlim=(0, end), ylim=(end, 0), xlabel="key, in K", ylabel="query, in K", aspect="equal")
        left.set_title("who scores which pairs (number: the rank)", fontsize=9)
        left.set_xticks([0, 32, 64, 96, 128])
        left.set_yticks([0, 32, 64, 96, 128])
        right.axhline(1, color="black", linewidth=1, linestyle=(0, (4, 2)))
        right.set(xlabel="rank", ylabel="pairs, over the mean of all ranks", ylim=(0, 2.1), xticks=range(data["size"]))
        right.set_title(f"all wait for the slowest: {data['imbalance']:.1%} above the mean", fontsize=9)
        right.spines[["top", "right"]].set_visible(False)
        return figure

    def describe(data):
        work = ", ".join(f"{own:.2f}" for own in data["work"])
        return (
            f"The causal triangle of 128K tokens in {data['plan']} shares of {data['size']} ranks. Pairs of each rank, "
            f"over the mean: {work}. The slowest is {data['imbalance']:.1%} above the mean."
        )

    controls = {
        "plan": ipywidgets.ToggleButtons(options=PLANS, value=plan),
        "size": ipywidgets.IntSlider(size, min=2, max=8, description="ranks"),
    }
    return LiveFigure("shares", shares_at, draw, describe, **controls)


def shade_of(rank, size):
    """(a grey for the rank's work, ink that can be read on it)."""
    light = 0.92 - 0.62 * rank / (size - 1)
    return str(light), "white" if light < 0.55 else "black"
