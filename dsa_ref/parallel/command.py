"""The command lines of programs that torchrun starts on every rank: the same options on all, and one ending for all.

What one rank refuses ends all of them, and is said once on each host, by its first rank: usage by the first of all.
torchrun ends the others as soon as one has ended, so none does before it is said.
"""

import argparse
import contextlib
import os
import pathlib
import sys
import zlib
from typing import IO, NoReturn

from .ranks import Ranks, check_timeout, join

TIMEOUT = 60.0  # seconds


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises what it refuses, as ValueError, for `end`; the first rank alone prints its help."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(message)

    def print_help(self, file: IO[str] | None = None) -> None:
        """As argparse does, on the first rank."""
        if _place("RANK") == 0:
            super().print_help(file)


def seconds(text: str) -> float:
    """For argparse: a timeout that `join` can take."""
    try:
        check_timeout(float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return float(text)


def several() -> bool:
    """Whether torchrun started more than this process."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def start(parser: Parser, arguments: list[str] | None = None) -> tuple[argparse.Namespace, Ranks]:
    """(the options, this process's place in a group of all), once all ranks have the same options, but for paths.

    parser: of a command with --timeout and --device. arguments: as on the command line, None for sys.argv's. Paths may
    have other names on another host, but are given on all ranks or on none.

    Raises: on all ranks alike, ValueError for what one refuses or has otherwise, and for a GPU's number, as each rank
    has a GPU of its own; and as `join` does.
    """
    options, refused = None, None
    try:
        options = parser.parse_args(arguments)
    except ValueError as error:  # the others must hear of it
        refused = error
    try:
        ranks = Ranks(join(options.timeout if options else TIMEOUT))
    except (ValueError, RuntimeError) as error:
        raise refused or error from None
    with ranks.failing_together():
        if refused:
            raise refused
        if ranks.size > 1 and options.device.startswith("cuda:"):
            raise ValueError(f"--device must be cuda: each rank has a GPU of its own, got {options.device} for all")
        ranks.agree({"call": parser.prog, **_compared(parser, options)})
    return options, ranks


def end(parser: argparse.ArgumentParser, error: Exception, code: int = 1, where: str = "") -> NoReturn:
    """Say what is wrong and exit, with usage where the code is argparse's, 2. where: what the rank was at.

    An error that `Ranks.agree` raised on all ranks alike is said once; another one by the rank that it came to.
    """
    shared, rank = getattr(error, "on_all_ranks", False), _place("RANK")
    if not shared or _place("LOCAL_RANK") == 0:
        if code == 2 and rank == 0:
            parser.print_usage(sys.stderr)
        who = [f"rank {rank}"] if several() and not shared and not str(error).startswith("rank ") else []
        print(*[f"{parser.prog}: error", *who, *filter(None, [where]), error], sep=": ", file=sys.stderr, flush=True)
    if shared:
        with contextlib.suppress(RuntimeError, ValueError):
            Ranks().agree({"call": "end"})
    sys.exit(code)


def _compared(parser, options) -> dict[str, str]:
    """The options by their names, as short texts; of a path, whether it is given."""
    found = {}
    for action in parser._actions:
        if hasattr(options, action.dest):
            value = getattr(options, action.dest)
            text = "given" if isinstance(value, pathlib.Path) else str(value)
            name = (action.option_strings or [action.dest])[0]
            found[name] = text if len(text) <= 40 else f"{text[:20]}... (CRC {zlib.crc32(os.fsencode(text)):08x})"
    return found


def _place(name: str) -> int:
    return int(os.environ.get(name, 0))
