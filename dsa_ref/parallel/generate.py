"""Continue a text whose keys lie on all ranks: the prompt by gathered keys, then byte by byte by sharded ones.

    torchrun --nproc-per-node 2 -m -- dsa_ref.parallel.generate "def read_lines(path):"

Each rank reads its rows of the prompt and keeps what it made of them; nothing is sent again when decoding begins. Every
rank ends up with the same logits, to the bit, and draws the same byte. `dsa_ref.nn.generate` is the same on one rank,
for many texts at once.
"""

import argparse
import importlib
import os
import pathlib
import sys
import zlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from ..contracts import check_count, check_int
from ..nn.generate import choose
from ..nn.model import SMALL_MODEL, SmallModel, load_small_model
from .command import TIMEOUT, Parser, end, seconds, start
from .gathered import GatheredLayer
from .model import new_sharded_caches, over_group
from .ranks import Ranks
from .sharded import ShardedLayer
from .zigzag import Zigzag

PROGRAM = "dsa_ref.parallel.generate"


def generate_over_group(
    model: SmallModel,
    prompt: bytes,
    tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    group: dist.ProcessGroup | None = None,
) -> Iterator[int]:
    """Up to `tokens` bytes that continue the prompt, one by one, the same on all ranks; all ranks go through them.

    model: the same on all ranks, and not over a group yet. temperature, top_k, top_p: as for `dsa_ref.nn.generate`;
    seed: of the draws. It ends early where the model can read no more, at max_seq_len.

    Raises, at the first byte: TypeError or ValueError for what it cannot do, on all ranks alike, such as an empty
    prompt, one longer than max_seq_len, or one that differs between ranks; RuntimeError where a rank does not come.
    """
    ranks = Ranks(group)
    with ranks.failing_together():
        if not isinstance(model, SmallModel):
            raise TypeError(f"model must be a SmallModel, got {type(model).__name__}")
        if model.config.vocab_size != 256:
            raise ValueError(f"model must have a vocab_size of 256, a token is a byte, got {model.config.vocab_size}")
        if not isinstance(prompt, bytes):
            raise TypeError(f"prompt must be bytes, got {type(prompt).__name__}")
        longest = model.config.attention.max_seq_len
        if not 1 <= len(prompt) <= longest:
            raise ValueError(f"prompt must have from 1 to max_seq_len = {longest} bytes, got {len(prompt)}")
        check_count("tokens", tokens)
        check_int("seed", seed, 0, 2**63 - 1)
        sampling = [temperature, top_k, top_p]
        choose(torch.zeros(2), None, *sampling)  # refuses what is wrong
        text = [len(prompt), zlib.crc32(prompt)]
        ranks.agree({"call": "generate", "prompt": text, "tokens": tokens, "sampling": sampling, "seed": seed})
    device, ends = next(model.parameters()).device, min(len(prompt) + tokens - 1, longest)  # the last byte is not read
    caches, generator = new_sharded_caches(model, ends, group), torch.Generator().manual_seed(seed)
    decoding, text = over_group(model, ShardedLayer, group), torch.tensor(list(prompt), device=device)
    with torch.no_grad():
        rows = Zigzag(len(prompt), ranks.size).rows(ranks.rank, device)
        logits = over_group(model, GatheredLayer, group)(text[rows], rows, caches)
        last = logits.new_zeros(1, model.config.vocab_size) if ranks.rank else logits[-1:]  # rank 0 has the last row
        logits = ranks.all_gather(last)[0]
    for place in range(len(prompt), len(prompt) + tokens):
        byte = choose(logits[-1].cpu(), generator, *sampling)
        yield byte
        if place == ends:
            return
        with torch.no_grad():
            logits = decoding(torch.tensor([byte], device=device), torch.tensor([place], device=device), caches)


def main(arguments: list[str] | None = None) -> None:
    """Write a prompt's continuation to stdout as it comes, from the first rank; arguments as on the command line."""
    parser = _make_parser()
    try:
        options, ranks = start(parser, arguments)
        with ranks.failing_together():
            model = _load(options)
        sampling = {"temperature": options.temperature, "top_k": options.top_k_tokens, "top_p": options.top_p}
        text = generate_over_group(model, os.fsencode(options.prompt), options.tokens, seed=options.seed, **sampling)
        for byte in text:
            _write(bytes([byte]), ranks)
        _write(b"\n", ranks)
        ranks.agree({"call": "written"})  # an error of the last one
    except (ValueError, TypeError) as error:
        end(parser, error, 2)
    except (OSError, RuntimeError) as error:
        end(parser, error)
    except KeyboardInterrupt:
        sys.exit(130)
    dist.destroy_process_group()


def _make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__.splitlines()[0])
    parser.add_argument("prompt", metavar="PROMPT", help="what to continue")
    parser.add_argument("--tokens", type=int, default=200, help="bytes to write, at most (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest byte (default)")
    parser.add_argument("--top-k-tokens", type=int, metavar="K", help="draw from the K likeliest bytes")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that reach P")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default %(default)s)")
    parser.add_argument("--weights", type=pathlib.Path, default=SMALL_MODEL, help="the trained model")
    parser.add_argument("--kernels", action="store_const", dest="ops", const="dsa_kernels", default="dsa_ref",
                        help="run the steps of dsa_kernels, not of dsa_ref")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where the model runs, as torch names it (default %(default)s)")  # fmt: skip
    parser.add_argument("--timeout", type=seconds, default=TIMEOUT, metavar="SECONDS",
                        help="how long ranks wait for each other (default %(default)s)")  # fmt: skip
    return parser


def _load(options: argparse.Namespace) -> SmallModel:
    """The model that the options ask for. Raises: ValueError for what cannot be used."""
    try:
        torch.empty(0, device=options.device).cpu()  # "meta" has no numbers
    except (AssertionError, RuntimeError) as error:  # torch without CUDA asserts
        raise ValueError(f"--device must be one that torch can use here, got {options.device}: {error}") from error
    try:
        ops = importlib.import_module(options.ops)
    except ImportError as error:
        raise ValueError(f"--kernels needs a package that can be imported: {error}") from error
    try:
        return load_small_model(options.weights, ops).to(options.device)
    except Exception as error:  # whatever a file of another kind leads to
        said = f"--weights must be a file that save_small_model wrote, got {options.weights}: {error}"
        raise ValueError(said) from error


def _write(text: bytes, ranks: Ranks) -> None:
    """To stdout, on the first rank; where that is full or closed, it is an error on all ranks when they next meet."""
    if ranks.rank:
        return
    with ranks.failing_together():
        try:
            sys.stdout.buffer.write(text)
            sys.stdout.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to be flushed at the exit
            raise OSError(f"standard output must be writable, got {error}") from error


if __name__ == "__main__":
    main()
