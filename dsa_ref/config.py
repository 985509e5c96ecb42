"""Sizes and constants of one DSA attention layer, and two presets: V3.2's own and a tiny one."""

import dataclasses
import math
import os
from collections.abc import Mapping

from .hf_config import hf_fields


@dataclasses.dataclass(frozen=True)
class DSAConfig:
    """Everything that fixes a layer's shapes and arithmetic. The defaults are DeepSeek-V3.2-Exp's (671B), without YaRN.

    Lengths are in tokens, dims in elements. YaRN, which `V32` has, is asked for by a `rope_factor` above 1. Raises
    TypeError for a size that is no int or a switch that is no bool, ValueError for a size below 1, a constant that is
    not positive, a rope_factor below 1, an odd RoPE width, an indexer head that is not a power of two (the Hadamard
    rotation needs one) or narrower than its RoPE part, an unknown index_rope or index_pattern.

    Source: DeepSeek-V3.2-Exp report, section 2, and its published inference configuration; SPEC section 9.
    """

    dim: int = 7168  # model width
    n_heads: int = 128  # H, query heads
    q_lora_rank: int = 1536  # width of the query latent, shared by MLA and the indexer
    kv_lora_rank: int = 512  # width of the key-value latent, which is also the value in MQA mode
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64  # R, in MLA and in the indexer alike
    v_head_dim: int = 128
    index_n_heads: int = 64  # Hi
    index_head_dim: int = 128  # Di
    index_topk: int = 2048  # k
    index_fp8: bool = True  # rotate and quantise the indexer's q and k; False: score them as they are
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_factor: float = 1.0  # YaRN stretches the context by this much; 1: no YaRN
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_seq_len: int = 4096  # the context before YaRN
    max_seq_len: int = 163840  # YaRN needs this to exceed original_seq_len
    mscale: float = 1.0  # config.json's mscale_all_dim; 0: no correction of the softmax scale
    index_rope: str = "half"  # the indexer's RoPE layout: "half" (V3.2) or "interleaved" (GLM-5)
    mha_keys: int = 0  # in inference, rows that see no more keys attend in MHA mode; 0: index_topk; 1: as good as none
    index_pattern: str = ""  # a letter a layer: "F" has an indexer, "S" shares a selection; "": all have one

    def __post_init__(self) -> None:
        kinds = {int: ("an int", int), float: ("a number", (int, float)), bool: ("a bool", bool)}
        kinds[str] = ("a str", str)
        for field in dataclasses.fields(self):
            value, (kind, types) = getattr(self, field.name), kinds[field.type]
            if not isinstance(value, types) or isinstance(value, bool) != (field.type is bool):
                raise TypeError(f"{field.name} must be {kind}, got {value!r}")
            least = 0 if field.name == "mha_keys" else 1
            if field.type is int and value < least:
                raise ValueError(f"{field.name} must be at least {least}, got {value}")
            if field.name == "rope_factor" and value < 1:
                raise ValueError(f"rope_factor must be at least 1 (no YaRN), got {value!r}")
            if field.type is float and not 0 < value < math.inf and (field.name, value) != ("mscale", 0):
                raise ValueError(f"{field.name} must be positive and finite, got {value!r}")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even (RoPE turns pairs), got {self.qk_rope_head_dim}")
        if self.index_head_dim & (self.index_head_dim - 1):
            raise ValueError(f"index_head_dim must be a power of two (Hadamard), got {self.index_head_dim}")
        if self.index_head_dim < self.qk_rope_head_dim:
            raise ValueError(
                f"index_head_dim must be at least qk_rope_head_dim = {self.qk_rope_head_dim}, got {self.index_head_dim}"
            )

        if self.yarn and self.rope_theta <= 1:
            raise ValueError(
                f"rope_theta must be above 1 with YaRN, which divides by its logarithm, got {self.rope_theta}"
            )
        if self.index_rope not in ("half", "interleaved"):
            raise ValueError(f"index_rope must be 'half' or 'interleaved', got {self.index_rope!r}")
        if set(self.index_pattern) - {"F", "S"} or self.index_pattern.startswith("S"):
            raise ValueError(f"index_pattern must consist of F and S and begin with F, got {self.index_pattern!r}")

    @classmethod
    def from_hf(cls, source: str | os.PathLike | Mapping) -> "DSAConfig":
        """The attention of a model from its Hugging Face `config.json`: DeepSeek-V3.2's family or GLM-5's.

        source: the file, the directory that holds it, or its fields as a mapping. Fields that it lacks have
        transformers' values. `index_fp8` is not in the file and stays True. SPEC section 9 has what is read.

        Raises: ValueError for another model_type, another RoPE than default and YaRN, and any other field that may
        change the attention and is not known, by its name; TypeError for values of a wrong type; FileNotFoundError.
        """
        return cls(**hf_fields(source))

    @property
    def yarn(self) -> bool:
        """Whether RoPE's frequencies, and with them the softmax scale, are YaRN's."""
        return self.rope_factor > 1 and self.max_seq_len > self.original_seq_len

    @property
    def most_mha_keys(self) -> int:
        """How many keys a row may see to attend in MHA mode, where `DSALayer` has a choice: `mha_keys`, or index_topk.

        Up to index_topk keys nothing is left out, and no score is needed. Beyond, the selection becomes a mask, and by
        FLOPs MHA mode stays cheaper up to k · 278,528 / 81,920, some 7 K keys in V3.2's sizes. A mask costs more than
        FLOPs say: on an H200 no threshold between index_topk and twice that was faster than index_topk itself.
        """
        return self.mha_keys or self.index_topk

    @property
    def latent_dim(self) -> int:
        """D, the width of one cached row and of a query in MQA mode: 576 in V3.2."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def has_indexer(self, layer_index: int) -> bool:
        """Whether a layer of the model has an indexer; one without reuses the selection of the nearest before it.

        Raises: TypeError for an index that is no int, ValueError for one that is not in `index_pattern`.
        """
        if isinstance(layer_index, bool) or not isinstance(layer_index, int):
            raise TypeError(f"layer_index must be an int, got {layer_index!r}")
        if self.index_pattern and not 0 <= layer_index < len(self.index_pattern):
            known = len(self.index_pattern)
            raise ValueError(f"layer_index must be in [0, {known}), the layers of index_pattern, got {layer_index}")
        return not self.index_pattern or self.index_pattern[layer_index] == "F"

    @property
    def softmax_scale(self) -> float:
        """The factor on q·k: (nope + rope)^-0.5, times m² under YaRN with m = 0.1 · mscale · ln(factor) + 1."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        if self.yarn:
            scale *= (0.1 * self.mscale * math.log(self.rope_factor) + 1.0) ** 2
        return scale


V32 = DSAConfig(rope_factor=40.0)
TINY = DSAConfig(
    dim=64,
    n_heads=4,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    index_n_heads=16,  # fewer heads give many exact ties at 0: P(score = 0) = 2^-Hi on random data
    index_head_dim=16,
    index_topk=8,
    rope_factor=40.0,  # YaRN is off, but a longer max_seq_len turns it on
    original_seq_len=4096,
    max_seq_len=4096,
)
