"""A task whose answer lies far back: a key is bound to a value once, and asked for much later.

    #@ 7Qx4=mZ8k        the definition, written over a window of text
    ...                 text, `distance` bytes from line to line
    #? 7Qx4=mZ8k        the query: a model that looks back knows the last four characters, any other one guesses

Keys and values are drawn anew for every window, so nothing but the definition says what the value is. Where it lies
more than k tokens back, a sliding window of k keys has lost it, and a selection must have found it.
"""

import random
import string
from typing import NamedTuple

import torch
from torch import Tensor

from ..nn.model import SmallModel
from .corpus import held_out_windows

DEFINITION, QUERY = b"\n#@ ", b"\n#? "  # the line before ends here
WIDTH = 4  # characters of a key, and of a value
ANSWER = len(QUERY) + WIDTH + len(b"=")  # where in a line the value begins
LINE = ANSWER + WIDTH + len(b"\n")
ALPHABET = (string.ascii_letters + string.digits).encode()
TRIES = 1000  # of drawing two free places


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
        return slice(self.query + ANSWER, self.query + ANSWER + WIDTH)


def plant(
    window: bytes, draw: random.Random, pairs: int, least: int = LINE, most: int | None = None
) -> tuple[bytes, list[Pair]]:
    """Write `pairs` definitions and their queries over a window: its new bytes, and where they are.

    least, most: of a pair's distance, in bytes; its logarithm is drawn evenly. most: None for what the window allows.

    Raises: ValueError for distances that no window of this length has, and where there is no room for so many lines.
    """
    most = len(window) - LINE if most is None else most
    if not LINE <= least <= most <= len(window) - LINE:
        raise ValueError(
            f"least and most must be from {LINE}, a line, to {len(window) - LINE}, a window less a line, and in this "
            f"order, got {least} and {most}"
        )
    planted, found, taken, keys = bytearray(window), [], [], set()
    for _ in range(pairs):
        pair = _place(len(window), draw, taken, least, most)
        taken += pair
        key = _word(draw)
        while key in keys:
            key = _word(draw)
        keys.add(key)
        said = key + b"=" + _word(draw) + b"\n"
        planted[pair.definition : pair.definition + LINE] = DEFINITION + said
        planted[pair.query : pair.query + LINE] = QUERY + said
        found.append(pair)
    return bytes(planted), found


def _place(length, draw, taken, least, most) -> Pair:
    for _ in range(TRIES):
        distance = min(most, int(least * (most / least) ** draw.random()))
        first = draw.randrange(length - LINE - distance + 1)
        pair = Pair(first, first + distance)
        if all(abs(place - other) >= LINE for place in pair for other in taken):
            return pair
    raise ValueError(f"pairs must fit into a window of {length} bytes beside each other, got no place for one more")


def _word(draw) -> bytes:
    return bytes(draw.choices(ALPHABET, k=WIDTH))


def needle_windows(
    corpus: Tensor, count: int, length: int, pairs: int, least: int, seed: int = 0
) -> tuple[Tensor, list[list[Pair]]]:
    """`held_out_windows` with `pairs` pairs in each, at least `least` bytes apart: uint8 [count, length + 1], places.

    Raises: as `held_out_windows` and `plant` do.
    """
    draw = random.Random(f"needles {seed}")
    planted = [plant(bytes(row.tolist()), draw, pairs, least) for row in held_out_windows(corpus, count, length).cpu()]
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
