"""Check a checkpoint directory of DeepSeek-V3.2 or GLM-5: is it whole, what would run here, what memory does it take.

    python -m dsa_ref.integrations.transformers DIRECTORY --tokens 32768

The command line of `report`. No weight is read. Status 0: nothing is wrong with the files; 1: something is, and the
report says what; 2: there is no such model.
"""

import argparse
import contextlib
import os
import sys

from ...records import positive
from .report import report

PROGRAM = "dsa_ref.integrations.transformers"


def main(arguments: list[str] | None = None) -> None:
    """Print the report to stdout; arguments as on the command line."""
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description=__doc__.splitlines()[0])
    parser.add_argument("directory", metavar="DIRECTORY", help="with config.json and safetensors files")
    parser.add_argument("--tokens", type=positive, metavar="N",
                        help="of a sequence, to count memory for (default: the model's longest context)")  # fmt: skip
    parser.add_argument("--batch", type=positive, default=1, metavar="B", help="sequences (default %(default)s)")
    options = parser.parse_args(arguments)
    if sys.stdout is None:
        parser.error("standard output must be open, got a closed one")
    try:
        text, faults = report(options.directory, options.tokens, options.batch)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    try:
        print(text, flush=True)
    except OSError as error:  # a full disk; or whoever read the report has enough, which needs no words
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to be flushed at the exit
        with contextlib.suppress(OSError):
            if not isinstance(error, BrokenPipeError):
                print(f"{parser.prog}: error: standard output must be writable, got {error}", file=sys.stderr)
        sys.exit(1)
    if faults:
        sys.exit(f"{parser.prog}: wrong: {faults} faults in the files, listed above")


if __name__ == "__main__":
    main()
