"""A task whose answer lies far back: a key is bound to a value once, and asked for much later.

    #@ 7Qx4=mZ8k        the definition, written over a window of text
    ...                 text, `distance` bytes from line to line
    #? 7Qx4=mZ8k        the query: a model that looks back knows the value, any other one guesses

Keys and values are drawn anew for every window, so nothing but the definition says what the value is. Where it lies
more than k tokens back, a sliding window of k keys has lost it, and a selection must have found it.
"""

import itertools
import random
import string
from typing import NamedTuple

import torch
from torch import Tensor

from ..nn.model import SmallModel
from .corpus import held_out_windows

DEFINITION, QUERY = b"\n#@ ", b"\n#? "  # the line before ends here
KEY, VALUE = 4, 4  # characters
ANSWER = len(QUERY) + KEY + len(b"=")  # where in a line the value begins
LINE = ANSWER + VALUE + len(b"\n")
ALPHABET = (string.ascii_letters + string.digits).encode()
TRIES = 10_000  # of drawing free places


class Pair(NamedTuple):
    """Where in a window a definition and its query begin, in bytes."""

    definition: int
    query: int

    @property
    def distance(self) -> int:
        """How many bytes back the definition lies, line from line and byte from byte."""
        return self.query - self.definition

    @property
    def answer(self) -> slice:
        """The value's bytes in the query."""
        return slice(self.query + ANSWER, self.query + ANSWER + VALUE)


def plant(
    window: bytes, draw: random.Random, pairs: int, asks: int = 1, least: int = LINE, most: int | None = None
) -> tuple[bytes, list[Pair]]:
    """Write `pairs` definitions, and `asks` queries of each, over a window: its new bytes, and a Pair for each query.

    least, most: of the distance from a definition to its queries, in bytes; its logarithm is drawn evenly, up to what
    the window allows. most: None for no other bound.

    Raises: ValueError for distances that no window of this length has, and where there is no room for so many lines.
    """
    most = len(window) - LINE if most is None else most
    if not LINE <= least <= most <= len(window) - LINE:
        raise ValueError(
            f"least and most must be from {LINE}, a line, to {len(window) - LINE}, a window less a line, and in this "
            f"order, got {least} and {most}"
        )
    planted, taken, found, keys = bytearray(window), bytearray(len(window)), [], set()
    for _ in range(pairs):
        definition, queries = _places(taken, draw, asks, least, most)
        key = _word(draw, KEY)
        while key in keys:
            key = _word(draw, KEY)
        keys.add(key)
        said = key + b"=" + _word(draw, VALUE) + b"\n"
        for first, head in ((definition, DEFINITION), *((query, QUERY) for query in queries)):
            planted[first : first + LINE] = head + said
        found += [Pair(definition, query) for query in queries]
    return bytes(planted), found


def _places(taken: bytearray, draw, asks, least, most) -> tuple[int, list[int]]:
    """Where a definition and its queries begin, all on bytes that are 0 in `taken`, which become 1."""
    for _ in range(TRIES):
        definition = draw.randrange(len(taken) - LINE - least + 1)
        farthest = min(most, len(taken) - LINE - definition)
        distances = [int(least * ((farthest + 1) / least) ** draw.random()) for _ in range(asks)]
        lines = sorted([definition, *(definition + min(distance, farthest) for distance in distances)])
        apart = all(later - earlier >= LINE for earlier, later in itertools.pairwise(lines))
        if apart and all(taken.find(1, line, line + LINE) < 0 for line in lines):
            for line in lines:
                taken[line : line + LINE] = b"\1" * LINE
            return lines[0], lines[1:]
    raise ValueError(f"pairs must fit into a window of {len(taken)} bytes beside each other, got no place for one more")


def _word(draw, width) -> bytes:
    return bytes(draw.choices(ALPHABET, k=width))


def needle_windows(
    corpus: Tensor, count: int, length: int, pairs: int, least: int, seed: int = 0
) -> tuple[Tensor, list[list[Pair]]]:
    """`held_out_windows` with `pairs` pairs in each, at least `least` bytes apart: uint8 [count, length + 1], places.

    Raises: as `held_out_windows` and `plant` do.
    """
    draw = random.Random(f"needles {seed}")
    planted = [
        plant(bytes(row.tolist()), draw, pairs, 1, least) for row in held_out_windows(corpus, count, length).cpu()
    ]
    windows = torch.tensor([list(window) for window, _ in planted], dtype=torch.uint8, device=corpus.device)
    return windows, [places for _, places in planted]


@torch.no_grad()
def needles_found(model: SmallModel, windows: Tensor, places: list[list[Pair]], attention: str) -> list[list[bool]]:
    """Whether all bytes of a value are the likeliest ones, given the bytes before each, for every pair of each window.

    windows: uint8 [n, L + 1], on the model's device; attention: as for `DSALayer`.
    """
    found = []
    for window, pairs in zip(windows.long(), places, strict=True):
        right = (model(window[:-1], attention=attention).argmax(dim=-1) == window[1:]).tolist()
        found.append([all(right[pair.answer.start - 1 : pair.answer.stop - 1]) for pair in pairs])
    return found
