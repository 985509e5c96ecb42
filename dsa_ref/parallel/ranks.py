"""A group of ranks that work on one sequence: who they are, what they must agree on, and what they send each other.

Before a call's first large exchange the ranks send each other a short message each, what they are about to do and with
which sizes, dtypes and settings. So a rank that was called otherwise, or whose arguments are refused, is an error that
names it on every rank, where a collective with other sizes would wait, or mix up bytes. A rank that has died, or does
not come within the group's timeout, is a RuntimeError on all others.

Transport is torch.distributed's: gloo for CPU tensors, NCCL for those on GPUs. Messages are CPU tensors where the group
has a backend for them, as one of `join` has: then no GPU waits for a message.
"""

import contextlib
import datetime
import json
import math
import os
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

MESSAGE = 2048  # bytes of one
LONGEST = 1e6  # seconds of a timeout, 11 days; sockets count nanoseconds in 64 bits
ERRORS = {kind.__name__: kind for kind in (ValueError, TypeError, OSError, RuntimeError)}  # as others hear of one
# Their names since torch 2.13, and before.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def join(timeout: float = 60.0) -> dist.ProcessGroup:
    """The group of all processes that `torchrun` started, each on a GPU of its own where there are some.

    timeout: seconds that a rank waits for the others, in any exchange, before it raises; where tensors on GPUs are
    exchanged, NCCL's watchdog ends the process then, within some 70 seconds more. torchrun ends the others as soon as
    one has died. A group of a part of them: `torch.distributed.new_group(ranks, timeout=...)` afterwards.

    Raises: TypeError for a timeout that is no number, ValueError for one below a millisecond or above a million
    seconds, outside of torchrun, or on a host with some GPUs, but fewer than processes; RuntimeError where others do
    not come.
    """
    check_timeout(timeout)
    if missing := [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in os.environ]:
        raise ValueError(f"join must be called in a process that torchrun started, which sets {', '.join(missing)}")
    backend = "gloo"
    if torch.cuda.is_available():
        backend, own, gpus = "cpu:gloo,cuda:nccl", int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        here = max(own + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # then all of a host are refused alike
        if here > gpus:
            raise ValueError(f"--nproc-per-node must be at most the number of GPUs here, {gpus}, got {here}")
        torch.cuda.set_device(own)
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
    return dist.group.WORLD


def check_timeout(timeout: float) -> None:
    """Raise TypeError for what is no number of seconds, ValueError for one that no group can have."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number of seconds, got {timeout!r}")
    if not 1e-3 <= timeout <= LONGEST:
        raise ValueError(f"timeout must be from 0.001 to {LONGEST:.0f} seconds, got {timeout}")


class Ranks:
    """A process group, seen from one of its ranks.

    group: a torch process group that holds this process, or None for that of all processes.
    rank, size: this process's place in it, and how many there are. Ranks are always gone through in ascending order.

    Raises: ValueError without torch.distributed, or where the group does not hold this process.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError("group must be one of torch.distributed, which is not initialized: see parallel.join")
        self.group = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("group must hold this process, which is not one of its ranks")
        self.meetings = 0  # how often they have exchanged messages

    def agree(self, same: dict, own: dict | None = None) -> list[dict]:
        """Every rank's `own`, by rank, once it is known that all brought the same `same`. Both: what JSON can hold.

        Raises: on all ranks alike, ValueError for what is not the same, naming it and a rank that differs, and the
        error that a rank has announced, both with the attribute `on_all_ranks`; RuntimeError for a rank that did not
        come.
        """
        text = json.dumps({"same": same, "own": own or {}}).encode()
        if len(text) > MESSAGE:
            raise ValueError(f"what ranks agree on must fit into {MESSAGE} bytes, got {len(text)}")
        message = torch.frombuffer(bytearray(text.ljust(MESSAGE)), dtype=torch.uint8)
        self.meetings += 1  # an error up to here can still be announced
        received = self.all_gather(message[None].to(self._message_device())).cpu().numpy()
        everyone = [json.loads(row.tobytes()) for row in received]
        if error := _what_is_wrong([other["same"] for other in everyone]):
            error.on_all_ranks = True
            raise error
        return [other["own"] for other in everyone]

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """An error inside, before this rank came to `agree`, is raised by the others' `agree` too.

        Of its kind, or as RuntimeError where it is not a ValueError, TypeError or OSError.
        """
        before = self.meetings
        try:
            yield
        except Exception as error:
            if self.meetings == before:
                kind = next((name for name, kind in ERRORS.items() if isinstance(error, kind)), None)
                said = str(error) if kind else f"{type(error).__name__}: {error}"
                words = said.encode("ascii", "backslashreplace")[: MESSAGE // 3].decode()
                while len(json.dumps(words)) > MESSAGE - 128:  # of control characters, six letters each
                    words = words[: len(words) // 2]
                self.agree({"error": [kind or "RuntimeError", words]})
            raise

    def all_gather(self, own: Tensor) -> Tensor:
        """Every rank's tensor: [size, *own.shape]. own: the same shape and dtype on all ranks."""
        own = own.contiguous()
        everyone = own.new_empty(self.size * own.shape[0], *own.shape[1:])
        with self._lost("an all-gather"):
            all_gather_single(everyone, own, group=self.group)
        return everyone.unflatten(0, (self.size, own.shape[0]))

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        """This rank's place of the sum over ranks of parts [size, L, ...]: [L, ...], in parts' dtype.

        The order of the sum is the backend's, and the same each time for one group and size.
        """
        parts = parts.contiguous()
        own = parts.new_empty(parts.shape[1:])
        with self._lost("a reduce-scatter"):
            reduce_scatter_single(own, parts.flatten(0, 1), group=self.group)
        return own

    def all_reduce(self, own: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        with self._lost("an all-reduce"):
            dist.all_reduce(own, group=self.group)
        return own

    @contextlib.contextmanager
    def _lost(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.size}: {what} failed: another rank has ended, or did not come within "
                "the group's timeout; the first error that a rank reports says why"
            ) from error

    def _message_device(self) -> torch.device:
        on_cpu = "cpu:" in str(dist.get_backend_config(self.group))
        return torch.device("cpu" if on_cpu else f"cuda:{torch.cuda.current_device()}")


def _what_is_wrong(everyone: list[dict]) -> Exception | None:
    """The error of what all ranks brought to `agree`, if any."""
    errors = [same.get("error") for same in everyone]
    for rank, error in enumerate(errors):
        if error is not None:
            kind, words = error
            return ERRORS[kind](words if errors.count(error) == len(errors) else f"rank {rank}: {words}")
    for rank, same in enumerate(everyone):
        for name, value in everyone[0].items():
            if same.get(name) != value:
                got = same.get(name)
                return ValueError(f"{name} must be the same on all ranks, got {value} on rank 0, {got} on {rank}")
    return None


def pack(parts: Sequence[Tensor], rows: int) -> Tensor:
    """The bytes of parts [n, ...] side by side, one row a token: uint8 [rows, bytes], zeros behind the n rows."""
    n, widths = len(parts[0]), [row_bytes(part) for part in parts]
    packed = torch.empty(rows, sum(widths), dtype=torch.uint8, device=parts[0].device)
    packed[n:] = 0
    for place, part in zip(columns(packed[:n], widths), parts, strict=True):
        place.copy_(part.detach().reshape(n, row_bytes(part) // part.element_size()).view(place.dtype))
    return packed


def columns(packed: Tensor, widths: list[int]) -> list[Tensor]:
    """Views of packed uint8 [n, bytes], parts of so many bytes side by side: in words that divide all of them and of
    the bytes that a part's numbers have, since a GPU moves words of four bytes faster than bytes."""
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[math.gcd(4, *widths)]
    return list(packed.view(word).split([width // word.itemsize for width in widths], dim=1))


def row_bytes(part: Tensor) -> int:
    """Bytes of one row of part [n, ...]."""
    return part.element_size() * part[:0].flatten(1).shape[1] if part.dim() > 1 else part.element_size()


def sum_of_bits(x: Tensor) -> int:
    """The sum of the tensor's bit patterns, which does not depend on the order of the sum."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return int(x.detach().contiguous().view(whole).sum(dtype=torch.int64))
