"""Prefill a long context chunk by chunk, decode from it, and check some rows of it against the reference.

    python -m dsa_ref.long_context                            # the small model, 64K bytes of source, on a CPU
    python -m dsa_ref.long_context --sizes v32 --kernels      # V3.2's sizes, one layer, a million tokens, on a GPU

The command line of `read_long_context`: the table goes to stdout as it comes, progress to stderr.
"""

import argparse
import importlib
import os
import sys

import torch

from ..config import DSAConfig
from ..records import output_file, positive, provenance, write_log
from ..testing import Failed
from .run import read_long_context
from .show import Show

PROGRAM = "dsa_ref.long_context"


def main(arguments: list[str] | None = None) -> None:
    """Run, print the table, and write the record; arguments as on the command line."""
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", choices=("small", "v32"), default="small",
                        help="the trained small model, or one layer of V3.2's sizes (default %(default)s)")  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="one layer of the sizes in a model's config.json instead")
    parser.add_argument("--tokens", type=positive, help="tokens to prefill (default 65536; one layer: 1048576)")
    parser.add_argument("--chunk", type=positive, help="tokens a call (default 1024; one layer: 4096)")
    parser.add_argument("--decode", type=int, default=32, metavar="N", help="tokens to decode (default %(default)s)")
    parser.add_argument("--check", type=int, default=2, metavar="ROWS",
                        help="rows to check at each power of two; 0: none (default %(default)s)")  # fmt: skip
    parser.add_argument("--kernels", action="store_const", dest="ops", const="dsa_kernels", default="dsa_ref",
                        help="run the steps of dsa_kernels, not of dsa_ref: for a GPU")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of weights, numbers and rows (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where it runs, as torch names it (default %(default)s)")  # fmt: skip
    parser.add_argument("--log", type=output_file, help="where the record goes, as JSON")
    parser.add_argument("--progress", action="store_true", help="show progress though stderr is no terminal")
    options = parser.parse_args(arguments)
    try:
        torch.empty(0, device=options.device).cpu()  # "meta" has no numbers
    except (AssertionError, RuntimeError) as error:  # torch without CUDA asserts
        parser.error(f"--device must be one that torch can use here, got {options.device}: {error}")
    try:
        ops = importlib.import_module(options.ops)
    except ImportError as error:
        parser.error(f"--kernels needs a package that can be imported: {error}")
    sizes = options.sizes
    if options.config is not None:
        try:
            sizes = DSAConfig.from_hf(options.config)
        except (OSError, TypeError, ValueError) as error:
            parser.error(f"--config must be a config.json of DeepSeek-V3.2's or GLM-5's family: {error}")
    origin = provenance(PROGRAM, arguments, options.device) if options.log else None
    show = Show(options.progress or sys.stderr.isatty())
    try:
        result = read_long_context(
            sizes, options.tokens, options.chunk, ops, options.device,
            decode=options.decode, check=options.check, seed=options.seed, progress=show,
        )  # fmt: skip
        show.end(result)
    except (ValueError, TypeError) as error:
        show.clear()
        parser.error(str(error))
    except KeyboardInterrupt:
        show.clear()
        sys.exit(130)
    except OSError as error:  # a full disk; or whoever read the table has enough, which needs no words
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to be flushed at the exit
        sys.exit(1 if isinstance(error, BrokenPipeError) else f"{parser.prog}: error: {error}")
    except Failed as failure:
        show.clear()
        sys.exit(f"{parser.prog}: wrong: {failure}")
    except (torch.OutOfMemoryError, MemoryError) as error:
        show.clear()
        sys.exit(f"{parser.prog}: error: memory ran out though enough was free at the start: {error}")
    if options.log:
        write_log(PROGRAM, options.log, result | {"provenance": origin})


if __name__ == "__main__":
    main()
