"""What of this machine decides which code a sparse model runs, and that decision in words.

dsa_kernels is looked for and not imported: it would switch Triton's interpreter on where there is no GPU.
"""

import importlib.metadata
import importlib.util
from typing import NamedTuple

import torch
import transformers

from ...config import DSAConfig
from ...long_context.memory import bytes_free

OLDEST, NATIVE_FP8, HOPPER = (8, 0), (8, 9), (9, 0)  # compute capabilities, as `dsa_kernels.cards` has them
HOPPER_INDEXER = (64, 128)  # heads and their width in `dsa_kernels.hopper.index_scores`
HOPPER_LISTS = 2048  # places in the fused selection's lists
HOPPER_ROWS = (576, 512)  # columns of a key and of a value in `dsa_kernels.hopper.sparse_attention`


class Machine(NamedTuple):
    """Versions, None for what is not installed, and the first GPU, None where there is none."""

    torch: str
    transformers: str
    triton: str | None
    kernels: bool  # whether dsa_kernels can be found
    rocm: str | None
    card: str | None
    capability: tuple[int, int] | None
    cards: int
    free: int | None  # bytes on all GPUs, else in RAM; None where nobody says

    @property
    def why_not(self) -> str | None:
        """Why dsa_kernels do not serve here, or None."""
        if self.rocm:
            return f"the kernels are for NVIDIA GPUs, and this torch is for ROCm {self.rocm}"
        if self.capability is None:
            return "no GPU is here, and a CPU interprets the kernels, for tests"
        if self.capability < OLDEST:
            return f"the kernels need compute capability 8.0, this GPU has {'.'.join(map(str, self.capability))}"
        missing = [name for name, there in (("triton", self.triton), ("dsa_kernels", self.kernels)) if not there]
        return f"the kernels need {' and '.join(missing)}, not found here" if missing else None

    @property
    def keeps_fp8(self) -> bool:
        """Whether transformers' "fp8" leaves weights FP8 when it loads them here; elsewhere it makes bf16 of them."""
        return self.capability is not None and self.capability >= NATIVE_FP8


def this_machine() -> Machine:
    """Look at the process's own environment and the GPUs that torch sees."""
    there = torch.cuda.is_available()
    cards = [torch.device("cuda", n) for n in range(torch.cuda.device_count())] if there else []
    free = [bytes_free(device) for device in cards or [torch.device("cpu")]]
    return Machine(
        torch.__version__,
        transformers.__version__,
        version("triton"),
        importlib.util.find_spec("dsa_kernels") is not None,
        torch.version.hip,
        torch.cuda.get_device_name(0) if there else None,
        torch.cuda.get_device_capability(0) if there else None,
        len(cards),
        None if None in free else sum(free),
    )


def version(package: str) -> str | None:
    """The installed version of a package, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def what_runs(machine: Machine, config: DSAConfig, dtype: torch.dtype) -> list[tuple[str, str]]:
    """(call, what it runs) for the calls of `make_sparse` that serve here, the one to take first."""
    if machine.why_not:
        return [
            ("make_sparse(model)", f"dsa_ref, plain torch: {machine.why_not}"),
            ("make_sparse(model, index_fp8=True)", "the same with V3.2's own FP8 index keys; not faster"),
        ]
    scores, attention = _scores(machine, config), _attention(machine, config, dtype)
    plain = f"portable {str(dtype).removeprefix('torch.')} scores, which select what transformers does, up to rounding"
    calls = [("make_sparse(model, dsa_kernels, index_fp8=True)", f"{scores}; {attention}")]
    calls += [("make_sparse(model, dsa_kernels)", f"{plain}; {attention}")]
    return calls if machine.capability >= NATIVE_FP8 else calls[::-1]


def _scores(machine, config):
    """What scores FP8 index keys."""
    if machine.capability < NATIVE_FP8:
        return "portable kernels that widen FP8 to bf16: V3.2's own selection, not faster"
    if machine.capability != HOPPER:
        return "portable kernels with FP8 products"
    heads, k = (config.index_n_heads, config.index_head_dim), config.index_topk
    if heads != HOPPER_INDEXER:
        return "portable FP8 scores: Hopper's take {} index heads of {}, got {} of {}".format(*HOPPER_INDEXER, *heads)
    if k > HOPPER_LISTS:
        return f"Hopper's FP8 scores, selection apart: the fused kernel selects {HOPPER_LISTS} at most, got {k}"
    return "Hopper's kernel that scores FP8 and selects at once"


def _attention(machine, config, dtype):
    """What attends to the selected rows."""
    if machine.capability != HOPPER:
        return "portable sparse attention"
    if dtype != torch.bfloat16 or (config.latent_dim, config.kv_lora_rank) != HOPPER_ROWS:
        return "portable sparse attention: Hopper's takes bf16 rows of {}, values of {}".format(*HOPPER_ROWS)
    return "Hopper's sparse attention"
