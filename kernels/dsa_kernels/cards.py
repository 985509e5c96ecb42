"""The GPU that a tensor lies on: what its instructions are, and how much of it a program can have.

Kernels are compiled anew for each card, so the code is one. What differs is which products the tensor cores know, and
how many bytes of shared memory a program gets; tiles are chosen by that (`index_scores.tiles`,
`sparse_attention.tiles`). `tests/kernels/test_compile.py` compiles every kernel for these cards, without having one.
"""

import functools
import typing

import torch

OLDEST = (8, 0)  # compute capability: Ampere's bf16 tensor cores
NATIVE_FP8 = (8, 9)  # before, e4m3 is read as bytes and widened
HOPPER = (9, 0)


class Card(typing.NamedTuple):
    """What the choice of kernels and tiles asks about a GPU."""

    capability: tuple[int, int]
    shared_memory: int  # bytes that one program can have
    multiprocessors: int


# One of each kind, for whoever wants to know what a card would be given: multiprocessors differ from model to model.
KNOWN = {
    80: Card((8, 0), 166_912, 108),  # A100
    86: Card((8, 6), 101_376, 82),  # RTX 3090
    89: Card((8, 9), 101_376, 128),  # RTX 4090, L4
    90: Card((9, 0), 232_448, 132),  # H100, H200
    100: Card((10, 0), 232_448, 148),  # B200
    120: Card((12, 0), 101_376, 170),  # RTX 5090
}


def card_of(tensor: torch.Tensor) -> Card | None:
    """The GPU that `tensor` lies on, None if it is elsewhere."""
    return _card(tensor.device.index) if tensor.is_cuda else None


@functools.cache
def _card(index):
    from triton.runtime import driver  # not on top: whether kernels are interpreted is decided first

    properties = torch.cuda.get_device_properties(index)
    shared_memory = driver.active.utils.get_device_properties(index)["max_shared_mem"]  # what Triton holds a launch to
    return Card((properties.major, properties.minor), shared_memory, properties.multi_processor_count)


def on_hopper(tensor: torch.Tensor) -> bool:
    """Whether `tensor` lies on a GPU of compute capability 9.0, for which `dsa_kernels.hopper` is written."""
    card = card_of(tensor)
    return card is not None and card.capability == HOPPER


def too_wide(name, sizes, needed, card):
    """The sentence for a tensor of which not even a small tile fits into shared memory."""
    number = ".".join(map(str, card.capability))
    return (
        f"{name} must be narrower on this GPU (compute capability {number}): the smallest tile of {sizes} takes "
        f"{needed:,} bytes of shared memory, and a program has {card.shared_memory:,}; dsa_ref takes any size"
    )
