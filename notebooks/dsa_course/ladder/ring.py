"""Notebook 11's ring of stages: a filler, a reader and their barriers, acted out step by step; and its clock."""

import numpy as np

ORDERS = ("filler first", "reader first", "bytes last", 1, 2, 3)  # who acts when more than one can; ints are seeds


class Fault(Exception):
    """`kind`: "filler waits" or "reader waits" (for ever), "early", "overwritten", "twice". The text names the tile."""

    def __init__(self, kind, text):
        super().__init__(text)
        self.kind = kind


def passes(phase, parity) -> bool:
    """Whether a wait for `parity` returns while the barrier is in phase number `phase`: the phase before it is over.

    parity: 0, 1, or None, which waits for nothing.
    """
    return parity is None or phase % 2 != parity


def act_out(waits, tiles, places, order="filler first") -> list[int]:
    """Send `tiles` tiles through a ring; returns the tiles as they were read.

    waits(i, places) -> (place, parity the filler waits for at `free`, parity the reader waits for at `full`); None for
    a parity: no wait. Three actors: the filler asks for tiles, the memory delivers them, the reader begins and ends a
    tile. order: one of ORDERS.

    Raises: Fault where they hang, where a tile is read before it came or while another replaces it, or where a second
    copy is asked for into a place that still waits for its first.
    """
    full, free = [0] * places, [0] * places  # the number of each barrier's present phase
    holds = [None] * places  # the tile in the place
    asked, flying, reading, read = 0, [], None, []
    rng = np.random.default_rng(order) if isinstance(order, int) else None
    ranks = {"filler first": "fdr", "reader first": "rdf", "bytes last": "frd"}

    while len(read) < tiles:
        able = []
        if asked < tiles:
            place, parity, _ = waits(asked, places)
            if passes(free[place], parity):
                able.append("f")
        if flying:
            able.append("d")
        if reading is not None:
            able.append("r")
        else:
            place, _, parity = waits(len(read), places)
            if passes(full[place], parity):
                able.append("r")
        if not able:
            if asked > len(read):
                raise Fault("reader waits", f"tile {len(read)} has come, and the reader waits for it for ever")
            raise Fault("filler waits", f"the filler waits for ever before it asks for tile {asked}")
        who = able[rng.integers(len(able))] if rng else min(able, key=ranks[order].index)
        if who == "f":
            place = waits(asked, places)[0]
            if any(waits(i, places)[0] == place for i in flying):
                raise Fault("twice", f"tile {asked} is asked for while another is on its way to place {place}")
            flying.append(asked)
            asked += 1
        elif who == "d":
            tile = flying.pop(0)
            place = waits(tile, places)[0]
            if reading is not None and waits(reading, places)[0] == place:
                raise Fault("overwritten", f"tile {tile} came into place {place} while tile {reading} was read there")
            holds[place] = tile
            full[place] += 1
        elif reading is None:
            place, tile = waits(len(read), places)[0], len(read)
            if holds[place] != tile:
                kind = "overwritten" if (holds[place] or -1) > tile else "early"
                raise Fault(kind, f"place {place} held {_name(holds[place])} when tile {tile} was to be read")
            reading = tile
        else:
            free[waits(reading, places)[0]] += 1
            read.append(reading)
            reading = None
    return read


def _name(tile):
    return "nothing" if tile is None else f"tile {tile}"


def timeline(places, latency, use, tiles=12) -> list[tuple[int, int, int, int]]:
    """(asked, came, begun, done) of each tile in clocks: it takes `latency` to come, and `use` to be used.

    A tile is asked for as soon as its place is free, and used when it has come and the one before it is done.

    Raises: ValueError for fewer than one place, tile or clock.
    """
    for name, value in (("places", places), ("latency", latency), ("use", use), ("tiles", tiles)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    found = []
    for i in range(tiles):
        asked = found[i - places][3] if i >= places else 0
        begun = max(asked + latency, found[-1][3] if found else 0)
        found.append((asked, asked + latency, begun, begun + use))
    return found


def waiting(spans) -> int:
    """Clocks in which nothing was used, between the first use and the last."""
    return sum(later[2] - earlier[3] for earlier, later in zip(spans, spans[1:], strict=False))
