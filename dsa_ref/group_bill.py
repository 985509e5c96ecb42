"""How long one layer takes on a group of cards, by both plans of `dsa_ref.parallel`: `python -m dsa_ref.group_bill`.

    gathered keys    a rank does 1 / size of the bill's work; all rows are exchanged, and brought into order
    sharded keys     a rank scores 1 / size of the keys, and does all the rest for all tokens; candidates and parts are
                     exchanged, and merged

The work is `dsa_ref.bill`'s, with its speeds; nothing overlaps an exchange, as in `dsa_ref.parallel`. An exchange is
NCCL's ring as NCCL itself predicts it when it chooses a protocol: a start, a step for each other rank, and the bytes
that a rank receives, at the speed of the slowest link that all of them must cross. Of three protocols the quickest is
taken: two with quick steps that send flags beside the data, and one for much data. Two constants are measured, on two
and on four H200 of one host: `ATTAINED` and `MESSAGE`. More ranks, and several hosts, get those of four: there nothing
is measured, and messages certainly take longer.

What this leaves out: what else the host does, such as launching a decoded token's kernels one by one (the records' take
milliseconds so, without a CUDA graph) or starting an exchange (some 0.2 ms, where nothing hides it), waiting for the
last rank to come, other traffic on the links, NVLink's multicast, and hosts of one card, between which NCCL goes other
ways.

Source: SPEC section 11; figures/parallel_2_h200.json and parallel_4_h200.json; NCCL, github.com/NVIDIA/nccl:
src/graph/tuning.cc at 72d2432094, search.cc and topo.h at 80f6bda437, src/transport/net_ib.cc at 02aedae040. The
records' NCCL 2.28.9 could not be read; a later state has the same numbers for rings (src/tuning/cost_model.cc at
1fc949c50b, ring.cc at 12df1a11af).
"""

import dataclasses
import math

from .bill import H200, Card, decode_seconds, pays_from, prefill_seconds, step
from .config import V32, DSAConfig
from .contracts import check_count
from .cost import BF16_BYTES, check_config, gathered_bytes, gathered_bytes_per_token, matrices, sharded_bytes


def _check_number(name, value, positive):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < math.inf or positive and value == 0:
        raise ValueError(f"{name} must be {'positive' if positive else 'at least 0'} and finite, got {value}")


def _check_kind(name, value, kind):
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")


@dataclasses.dataclass(frozen=True)
class Fabric:
    """Links between cards.

    inside: bytes/s that a card could receive from others of its host, of which `ATTAINED` is attained; between: bytes/s
    that a host receives from others, over all its ports; host: cards of a host.

    Raises: TypeError for a name that is no str or a speed that is no number, ValueError for one that is not positive
    and finite; as `check_count` for host.
    """

    name: str
    inside: float
    between: float
    host: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a str, got {type(self.name).__name__}")
        for name in ("inside", "between"):
            _check_number(name, getattr(self, name), positive=True)
        check_count("host", self.host)


# What NCCL takes a card's NVLink 4 for: 18 links (NVIDIA's own system file of MLPerf Inference v4.1,
# H200-SXM-141GBx8_TRT_MaxQ.json: "18x 4th Gen NVLink, 900GB/s", both directions) of SM90_NVLINK_BW (topo.h) each.
NVLINK = 18 * 20.6e9
# What its search makes a ring of: channels of one of the speeds in sm90SpeedArrayIntra (search.cc), as many as fit into
# the links. Six of 60 GB/s do; no other speed fills more.
RING = 6 * 60e9
# Measured, {cards of a host: share of RING}: what an all-gather of 84 to 1013 MB attained between them, without
# multicast: 0.52 to 0.74 on two, 0.66 to 0.90 on four; medians here (exchanges_ms of prompts and parts in the records).
# NCCL's source knows no reason for it. On other numbers nothing is measured; more than four cards are taken for four.
ATTAINED = {2: 0.68, 4: 0.85}
# Between hosts a ring's channels have speeds of sm90SpeedArrayInter: 45 GB/s on each of 8 ports of 400 Gbit/s, a DGX
# H200's (NVIDIA's "DGX BasePOD", core components), since 8 of 48 are more than a card's NVLINK; or one of 12 GB/s on
# one port of 100 Gbit/s.
INFINIBAND = Fabric("InfiniBand, 8 x 400 Gbit/s a host", RING, 8 * 45e9)
ETHERNET = Fabric("Ethernet, 100 Gbit/s a host", RING, 12e9)
FABRICS = (INFINIBAND, ETHERNET)

# Measured, {ranks: seconds of one message in which they agree}, between processes of one host, by torch's gloo: the
# median of messages_ms over the number of messages in a call, all rows of the records. It grows with the ranks; more
# than four, and those on several hosts, are taken for four here, which says too little.
MESSAGE = {2: 0.73e-3, 4: 1.09e-3}
MESSAGES = {"gathered": 2, "sharded": 1}  # a call of GatheredLayer or ShardedLayer: `agree` in dsa_ref/parallel
PLACE = 4  # bytes of a row's place in the sequence, which comes with the rows of a ShardedCache


def _measured(found, count):
    """What was measured on the most ranks or cards that are no more than these; on the fewest for fewer."""
    return found[max((known for known in found if known <= count), default=min(found))]


@dataclasses.dataclass(frozen=True)
class _Protocol:
    """Seconds of NCCL's ring for an all-gather or reduce-scatter, and which of a ring's bytes/s are data."""

    start: float  # baseLat
    inside: float  # hwLat, NVLink: a step to a card of the same host
    between: float  # hwLat, network: a step to another host; a port adds none: latency "not set" in net_ib.cc
    post: float  # getNetOverhead, Intel's: the least that any step takes where there are several hosts
    share: tuple[float, float]  # of a ring's speed: in one host, in several
    most: tuple[float, float, float] = (math.inf,) * 3  # bytes/s: in one host, in two, in more


# NCCL's LL, LL128 and Simple on Hopper (minCompCap 90) and hosts with Intel's processors, a DGX H200's.
_PROTOCOLS = (
    # llMaxBws: in one host by the card (row "Hopper"), in several by the processor (row "Volta", as for all of Intel)
    _Protocol(6.6e-6, 0.6e-6, 2.7e-6, 1e-6, (0.5, 0.5), (141e9, 39e9, 20.4e9)),
    # perChMaxRingLL128Bws: 36.7 GB/s a channel is less than 0.92 of a channel's 45 between hosts
    _Protocol(14e-6, 1.9e-6, 4.0e-6, 1e-6, (0.92, 36.7 / 45)),
    _Protocol(8.4e-6, 3.4e-6, 14e-6, 3e-6, (1.0, 1.0)),
)


def exchange_seconds(received: float, size: int, fabric: Fabric) -> float:
    """Seconds of an all-gather or reduce-scatter over `size` ranks in which each receives so many bytes; 0 for one.

    Raises: TypeError for a fabric that is no Fabric or bytes that are no number, ValueError for bytes that are negative
    or not finite; as `check_count` for size.
    """
    _check_number("received", received, positive=False)
    check_count("size", size)
    _check_kind("fabric", fabric, Fabric)
    if size == 1:
        return 0.0
    hosts = -(-size // fabric.host)
    several = hosts > 1
    speed = fabric.inside * _measured(ATTAINED, min(size, fabric.host))
    speed = min(speed, fabric.between) if several else speed

    def seconds(kind):
        inside = max(kind.inside, kind.post) if several else kind.inside
        steps = kind.start + (size - hosts) * inside + (hosts - 1) * kind.between
        return steps + received / min(speed * kind.share[several], kind.most[min(hosts, 3) - 1])

    return min(map(seconds, _PROTOCOLS))


def messages_seconds(plan: str, size: int) -> float:
    """Seconds of the messages of one call by plan "gathered" or "sharded"; 0 for one rank.

    Counted as if the card waited meanwhile, as it does where the host first reads what the card computed.

    Raises: ValueError for another plan; as `check_count` for size.
    """
    if plan not in tuple(MESSAGES):  # a list, which no dict can look for, is refused alike
        raise ValueError(f"plan must be one of {', '.join(MESSAGES)}, got {plan!r}")
    check_count("size", size)
    return MESSAGES[plan] * _measured(MESSAGE, size) if size > 1 else 0.0


def gathered_seconds(
    config: DSAConfig, T: int, S: int, size: int, fabric: Fabric = INFINIBAND, card: Card = H200
) -> dict[str, float]:
    """{part: seconds} of T tokens at the end of S by gathered keys, T = S for a prompt, on each of `size` ranks.

    On one rank it is the bill's chunk, of enough tokens to hide the reading of weights, some 200.

    Raises: as all here that take these arguments: TypeError for a config, fabric or card of another type, or a count
    that is no int; ValueError for a count below 1 or T > S.
    """
    _check_case(config, fabric, card, T=T, S=S, size=size)
    parts = {name: seconds / size for name, seconds in prefill_seconds(config, T, S, card=card).items()}
    parts["products"] = max(parts["products"], weights_seconds(config, card))
    return parts | gathering_seconds(config, T, S, size, fabric, card)


def sharded_seconds(
    config: DSAConfig, T: int, S: int, size: int, fabric: Fabric = INFINIBAND, card: Card = H200
) -> dict[str, float]:
    """{part: seconds} of T tokens at the end of S by sharded keys. Attention costs a rank the whole list, of which the
    most is other ranks'. Merging is counted as bytes that are moved, which says too little for many ranks."""
    _check_case(config, fabric, card, T=T, S=S, size=size)
    parts = prefill_seconds(config, T, S, card=card)
    parts["products"] = max(parts["products"], weights_seconds(config, card))
    chosen = min(parts["scores and selection"], card.choose * T)
    parts["scores and selection"] = chosen + (parts["scores and selection"] - chosen) / size
    received = sharded_bytes(config, T, S, size)
    moved = 4 * received["candidates"] + received["parts"]  # candidates are ordered by place, then chosen from
    parts["merge"] = moved / card.small
    parts["exchange"] = sum(exchange_seconds(each, size, fabric) for each in received.values())
    parts["messages"] = messages_seconds("sharded", size)
    return parts


def gathered_decode_seconds(
    config: DSAConfig, S: int, size: int, fabric: Fabric = INFINIBAND, card: Card = H200
) -> dict[str, float]:
    """{part: seconds} of one token by keys that are sharded and gathered for it, which no one would do."""
    _check_case(config, fabric, card, S=S, size=size)
    return decode_seconds(config, 1, S, card=card) | gathering_seconds(config, 1, S, size, fabric, card)


def sharded_decode_seconds(
    config: DSAConfig, S: int, size: int, fabric: Fabric = INFINIBAND, card: Card = H200
) -> dict[str, float]:
    """{part: seconds} of one token by sharded keys, in one sequence of S; on one rank the bill's step."""
    _check_case(config, fabric, card, S=S, size=size)
    parts, received = decode_seconds(config, 1, -(-S // size), card=card), sharded_bytes(config, 1, S, size)
    if size == 1:
        return parts | {"merge": 0.0, "exchange": 0.0, "messages": 0.0}
    chosen = card.passes + size * min(config.index_topk, S) / card.scan
    parts["merge"] = step(card, 2, 0, chosen) + step(card, 2, received["parts"])
    parts["exchange"] = sum(exchange_seconds(each, size, fabric) for each in received.values())
    parts["messages"] = messages_seconds("sharded", size)
    return parts


def gathering_seconds(config: DSAConfig, T: int, S: int, size: int, fabric: Fabric, card: Card) -> dict[str, float]:
    """{"exchange", "order", "messages"}: the rows of S tokens come for the last T, and are brought into order.

    For that a rank's own are packed, which writes them twice and reads them once, and all are read and written once: a
    whole prompt's in long runs, at the speed of memory; those behind a cache, T < S, one by one by their places, which
    come too, at the speed of small steps.

    Raises: as all here; ValueError for T > S.
    """
    _check_case(config, fabric, card, T=T, S=S, size=size)
    if T > S:
        raise ValueError(f"T must be at most S = {S}, the tokens of the context, got {T}")
    if size == 1:
        return {"exchange": 0.0, "order": 0.0, "messages": 0.0}
    row, received, speed = gathered_bytes_per_token(config), gathered_bytes(config, S, size), card.memory
    if T < S:
        received, row, speed = received // row * (row + PLACE), row + PLACE, card.small
    order = row * S * (3 / size / card.memory + 2 / speed)
    return {
        "exchange": exchange_seconds(received, size, fabric),
        "order": order,
        "messages": messages_seconds("gathered", size),
    }


def weights_seconds(config: DSAConfig, card: Card) -> float:
    """Seconds to read the layer's weights once, which products of few tokens take."""
    check_config(config)
    _check_kind("card", card, Card)
    return BF16_BYTES * sum(matrices(config).values()) / card.memory


def gathered_memory(config: DSAConfig, S: int) -> int:
    """Bytes of all rows on each rank while a layer runs by gathered keys: as they come, and in order."""
    check_count("S", S)
    return 2 * gathered_bytes_per_token(config) * S


def gathering_pays_from(
    config: DSAConfig, S: int, size: int, fabric: Fabric = INFINIBAND, card: Card = H200
) -> int | None:
    """The fewest tokens at the end of S that gathered keys take no longer for than sharded ones, None if not even S."""
    _check_case(config, fabric, card, S=S, size=size)
    plans = [lambda T, plan=plan: sum(plan(config, T, S, size, fabric, card).values()) for plan in PREFILL]
    return pays_from(*plans, most=S)


PREFILL = (gathered_seconds, sharded_seconds)
DECODE = (sharded_decode_seconds, gathered_decode_seconds)
EFFICIENT = 0.9  # of the ranks' time, in the words under the table

LEGEND = """\
One layer of DeepSeek-V3.2's sizes on a group of H200, 8 to a host: predicted, not measured. The README has two and
four GPUs measured.

  ranks, context   GPUs that work on one sequence, and its tokens
  a whole prompt   all tokens at once by gathered keys: each rank does its share of the rows, and gets all ranks' keys.
                   efficiency: one GPU's seconds over those of all, times their number; waiting: the share of the ranks'
                   seconds in which they wait for each other's bytes and messages
  gather from      where only the last tokens of the context are new: from so many new ones on, gathered keys are the
                   quicker plan; for fewer, sharded keys, where each rank scores only the keys that it holds
  one token        decode of one sequence. sharded: with a message between the ranks' hosts; links: without it, what
                   GPUs and links alone need; gathered: all keys come for every token
""".splitlines()
HEADS = [
    "                  |           a whole prompt, s              |   gather from |         one token, ms",
    "ranks     context | one GPU       all  efficiency    waiting | (new tokens)  | one GPU  sharded   links  gathered",
]


def lines(
    config: DSAConfig = V32,
    sizes: tuple[int, ...] = (8, 64, 256, 1024),
    contexts: tuple[int, ...] = (128_000, 1_000_000, 10_000_000),
) -> list[str]:
    """The table: a prompt and a token on so many ranks, a layer each, with what its columns mean, and what follows.

    Raises: TypeError for sizes or contexts that are no tuples or lists of ints, ValueError for an empty one.
    """
    check_config(config)
    for name, values in (("sizes", sizes), ("contexts", contexts)):
        if not isinstance(values, (tuple, list)):
            raise TypeError(f"{name} must be a tuple of ints, got {type(values).__name__}")
        if not values:
            raise ValueError(f"{name} must hold at least one int, got none")
        for i, value in enumerate(values):
            check_count(f"{name}[{i}]", value)
    texts, found = [*LEGEND, *HEADS], []
    for fabric in FABRICS:
        texts.append(fabric.name)
        for size, S in ((size, S) for size in sizes for S in contexts):
            row = _row(config, S, size, fabric)
            found.append({"fabric": fabric.name, "size": size, "S": S} | row)
            texts.append(_line(size, S, row))
    return [*texts, "", *_in_short(found)]


def _row(config, S, size, fabric):
    """What the table says of one context on so many ranks: seconds, and a count of tokens or None."""
    parts = gathered_seconds(config, S, S, size, fabric)
    sharded, gathered = (plan(config, S, size, fabric) for plan in DECODE)
    row = {"one": sum(prefill_seconds(config, S, S).values()), "all": sum(parts.values())}
    return row | {
        "efficiency": row["one"] / size / row["all"],
        "waiting": (parts["exchange"] + parts["messages"]) / row["all"],
        "from": gathering_pays_from(config, S, size, fabric),
        "token": sum(decode_seconds(config, 1, S).values()),
        "sharded": sum(sharded.values()),
        "links": sum(sharded.values()) - sharded["messages"],
        "gathered": sum(gathered.values()),
    }


def _line(size, S, row):
    prompt = f"{row['one']:8.3f}{row['all']:10.4f}{row['efficiency']:12.3f}{row['waiting']:11.1%}"
    token = (
        f"{1e3 * row['token']:8.2f}{1e3 * row['sharded']:9.2f}{1e3 * row['links']:8.2f}{1e3 * row['gathered']:10.2f}"
    )
    first = "never" if row["from"] is None else f"{row['from']:,}"
    return f"{size:5}{S:12,} |{prompt} | {first:>12}  |{token}"


def _in_short(found):
    """What follows from the table's rows: when which plan wins."""
    longest, few = max(row["S"] for row in found), [row["from"] for row in found]
    most = "as the table says" if None in few else f"fewer than {max(few):,} here"
    lost = _places(row for row in found if row["gathered"] <= row["sharded"])
    texts = [
        "In short",
        f"  Gathered keys win for a prompt, sharded keys for few new tokens behind a long context ({most}),",
        f"  and for a token{f' (not on {lost})' if lost else ''}.",
    ]
    for fabric in dict.fromkeys(row["fabric"] for row in found):
        rows = [row for row in found if row["fabric"] == fabric and row["S"] == longest]
        well = [row["size"] for row in rows if row["efficiency"] >= EFFICIENT]
        most = f"up to {max(well)} ranks" if well else "on no number of ranks here"
        texts.append(f"  {fabric}: a prompt of {longest:,} keeps {EFFICIENT:.0%} of all GPUs busy {most}.")
    for key, what in (("sharded", "quicker on several GPUs than on one"), ("links", "so, but for its message")):
        won = _places(row for row in found if row[key] < row["token"])
        texts.append(f"  A token is {what}: {f'on {won}' if won else 'nowhere here'}.")
    return [*texts, "  What sharding keys always buys a token is memory: a context that no single GPU holds."]


def _places(rows):
    """On how many ranks, and for which contexts."""
    return ", ".join(f"{size} ranks for {S:,}" for size, S in sorted({(row["size"], row["S"]) for row in rows}))


def _check_case(config, fabric, card, **counts):
    # T > S the bill refuses itself
    check_config(config)
    _check_kind("fabric", fabric, Fabric)
    _check_kind("card", card, Card)
    for name, count in counts.items():
        check_count(name, count)


if __name__ == "__main__":
    print(*lines(), sep="\n")
