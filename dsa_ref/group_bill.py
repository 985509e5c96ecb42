"""How long one layer takes on a group of cards, by both plans of `dsa_ref.parallel`: `python -m dsa_ref.group_bill`.

    gathered keys    a rank does 1 / size of the bill's work; all rows are exchanged, and brought into order
    sharded keys     a rank scores 1 / size of the keys, and does all the rest for all tokens; candidates and parts are
                     exchanged, and merged

The work is `dsa_ref.bill`'s, with its speeds; nothing overlaps an exchange, as in `dsa_ref.parallel`. An exchange is
NCCL's ring as NCCL itself predicts it when it chooses a protocol (src/graph/tuning.cc): a start, a step for each other
rank, and the bytes that a rank receives, at the speed of the slowest link that all of them must cross. Of two protocols
the quicker is taken: one with quick steps that sends flags beside the data, and one for much data.

What this leaves out: the messages in which ranks agree, what the host does, and other traffic on the links.

Source: SPEC section 11; NCCL, github.com/NVIDIA/nccl.
"""

import dataclasses

from .bill import H200, Card, decode_seconds, pays_from, prefill_seconds, step
from .config import V32, DSAConfig
from .contracts import check_count
from .cost import BF16_BYTES, gathered_bytes, gathered_bytes_per_token, matrices, sharded_bytes


@dataclasses.dataclass(frozen=True)
class Fabric:
    """Links between cards.

    inside: bytes/s that a card receives from others of its host; between: bytes/s that a host receives from others,
    over all its ports; host: cards of a host.

    Raises: ValueError for what is not positive, as `check_count` for host.
    """

    name: str
    inside: float
    between: float
    host: int = 8

    def __post_init__(self) -> None:
        check_count("host", self.host)
        for name in ("inside", "between"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


# What a card receives over NVLink 4: of 450 GB/s, 18 links at NCCL's figure for one (src/graph/topo.h, SM90_NVLINK_BW).
NVLINK = 18 * 20.6e9
INFINIBAND = Fabric("InfiniBand, 8 x 400 Gbit/s a host", NVLINK, 8 * 50e9)  # DGX H200, by its data sheet
ETHERNET = Fabric("Ethernet, 100 Gbit/s a host", NVLINK, 12.5e9)  # one port of 100GBASE, IEEE 802.3
FABRICS = (INFINIBAND, ETHERNET)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Seconds of NCCL's ring, and the share of a link's bytes/s that is data, in one host and in several."""

    start: float
    inside: float  # a step to a card of the same host
    between: float  # a step to another host
    share: tuple[float, float]


PROTOCOLS = (  # NCCL's "LL" and "Simple" for rings: src/graph/tuning.cc at 01afd20a77, baseLat, hwLat, busBw
    Protocol(3.6e-6, 0.47e-6, 2.7e-6, (1 / 3, 1 / 4)),
    Protocol(8.4e-6, 3.4e-6, 9.6e-6, (1.0, 1.0)),
)


def exchange_seconds(received: float, size: int, fabric: Fabric) -> float:
    """Seconds of an all-gather or reduce-scatter over `size` ranks in which each receives so many bytes; 0 for one."""
    check_count("size", size)
    if not received >= 0:
        raise ValueError(f"received must be at least 0, got {received}")
    if size == 1:
        return 0.0
    hosts = -(-size // fabric.host)
    speed = fabric.inside if hosts == 1 else min(fabric.inside, fabric.between)
    steps = [kind.start + (size - hosts) * kind.inside + (hosts - 1) * kind.between for kind in PROTOCOLS]
    moves = [received / (speed * kind.share[hosts > 1]) for kind in PROTOCOLS]
    return min(map(sum, zip(steps, moves, strict=True)))


def gathered_seconds(
    config: DSAConfig, T: int, S: int, size: int, fabric: Fabric = INFINIBAND, card: Card = H200
) -> dict[str, float]:
    """{part: seconds} of T tokens at the end of S by gathered keys, T = S for a prompt, on each of `size` ranks.

    On one rank it is the bill's chunk, of enough tokens to hide the reading of weights, some 200.
    """
    parts = {name: seconds / size for name, seconds in prefill_seconds(config, T, S, card=card).items()}
    parts["products"] = max(parts["products"], weights_seconds(config, card))
    return parts | gathering_seconds(config, S, size, fabric, card)


def sharded_seconds(
    config: DSAConfig, T: int, S: int, size: int, fabric: Fabric = INFINIBAND, card: Card = H200
) -> dict[str, float]:
    """{part: seconds} of T tokens at the end of S by sharded keys. Attention costs a rank the whole list, of which the
    most is other ranks'. Merging is counted as bytes that are moved, which says too little for many ranks."""
    parts = prefill_seconds(config, T, S, card=card)
    parts["products"] = max(parts["products"], weights_seconds(config, card))
    chosen = min(parts["scores and selection"], card.choose * T)
    parts["scores and selection"] = chosen + (parts["scores and selection"] - chosen) / size
    received = sharded_bytes(config, T, S, size)
    moved = 4 * received["candidates"] + received["parts"]  # candidates are ordered by place, then chosen from
    parts["merge"] = moved / card.small
    parts["exchange"] = sum(exchange_seconds(each, size, fabric) for each in received.values())
    return parts


def gathered_decode_seconds(
    config: DSAConfig, S: int, size: int, fabric: Fabric = INFINIBAND, card: Card = H200
) -> dict[str, float]:
    """{part: seconds} of one token by keys that are sharded and gathered for it, which no one would do."""
    return decode_seconds(config, 1, S, card=card) | gathering_seconds(config, S, size, fabric, card)


def sharded_decode_seconds(
    config: DSAConfig, S: int, size: int, fabric: Fabric = INFINIBAND, card: Card = H200
) -> dict[str, float]:
    """{part: seconds} of one token by sharded keys, in one sequence of S; on one rank the bill's step."""
    check_count("size", size)
    parts, received = decode_seconds(config, 1, -(-S // size), card=card), sharded_bytes(config, 1, S, size)
    if size == 1:
        return parts | {"merge": 0.0, "exchange": 0.0}
    chosen = card.passes + size * min(config.index_topk, S) / card.scan
    parts["merge"] = step(card, 2, 0, chosen) + step(card, 2, received["parts"])
    parts["exchange"] = sum(exchange_seconds(each, size, fabric) for each in received.values())
    return parts


def gathering_seconds(config: DSAConfig, S: int, size: int, fabric: Fabric, card: Card) -> dict[str, float]:
    """{"exchange", "order"}: the rows of S tokens come, and are read and written once, in the sequence's order."""
    received = gathered_bytes(config, S, size)
    order = 2 * gathered_bytes_per_token(config) * S / card.memory if size > 1 else 0.0
    return {"exchange": exchange_seconds(received, size, fabric), "order": order}


def weights_seconds(config: DSAConfig, card: Card) -> float:
    """Seconds to read the layer's weights once, which products of few tokens take."""
    return BF16_BYTES * sum(matrices(config).values()) / card.memory


def gathered_memory(config: DSAConfig, S: int) -> int:
    """Bytes of all rows on each rank while a layer runs by gathered keys: as they come, and in order."""
    return 2 * gathered_bytes_per_token(config) * S


def gathering_pays_from(
    config: DSAConfig, S: int, size: int, fabric: Fabric = INFINIBAND, card: Card = H200
) -> int | None:
    """The fewest tokens at the end of S that gathered keys take no longer for than sharded ones, None if not even S."""
    plans = [lambda T, plan=plan: sum(plan(config, T, S, size, fabric, card).values()) for plan in PREFILL]
    return pays_from(*plans, most=S)


PREFILL = (gathered_seconds, sharded_seconds)
DECODE = (sharded_decode_seconds, gathered_decode_seconds)


def lines(
    config: DSAConfig = V32,
    sizes: tuple[int, ...] = (8, 64, 256, 1024),
    contexts: tuple[int, ...] = (128_000, 1_000_000, 10_000_000),
) -> list[str]:
    """The table: a prompt and a token on so many ranks, a layer each, and from how many tokens on gathering pays."""
    texts = [
        "one layer          | a prompt by gathered keys               | gathering    | a token, µs",
        "ranks      tokens  |    one, s   all, s  efficiency  exchange | pays, tokens |   one  sharded  gathered",
    ]
    for fabric in FABRICS:
        texts.append(fabric.name)
        for size, S in ((size, S) for size in sizes for S in contexts):
            one = sum(prefill_seconds(config, S, S).values())
            parts = gathered_seconds(config, S, S, size, fabric)
            every, pays = sum(parts.values()), gathering_pays_from(config, S, size, fabric)
            token = 1e6 * sum(decode_seconds(config, 1, S).values())
            sharded, gathered = (1e6 * sum(plan(config, S, size, fabric).values()) for plan in DECODE)
            prompt = f"{one:9.3f}{every:9.4f}{one / size / every:12.3f}{parts['exchange'] / every:10.1%}"
            steps = f"{token:5.0f}{sharded:9.0f}{gathered:10.0f}"
            texts.append(f"{size:5}{S:12,}  | {prompt} | {'never' if pays is None else pays:>12} | {steps}")
    return texts


if __name__ == "__main__":
    print(*lines(), sep="\n")
