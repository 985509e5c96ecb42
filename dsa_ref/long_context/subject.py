"""What reads the context: one layer with random weights on random numbers, or the trained small model on text."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ..config import V32, DSAConfig
from ..nn import DSALayer, SmallModel, load_small_model
from ..nn.layer import Ops
from ..training.corpus import load_corpus

DEFAULTS = {"v32": (1 << 20, 4096), "small": (1 << 16, 1024)}  # tokens and chunk; why 1024: see `read_long_context`


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is known before anything is made. name: "v32", "small" or "config"; config: each layer's, long enough for
    the context; layers: how many; weights: numbers in them and in what lies around them; dtype: theirs."""

    name: str
    config: DSAConfig
    layers: int
    weights: int
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Subject:
    """Layers, and how tokens go through them.

    given(first, last): the input of those tokens, [T, dim] or int64 [T]; forward(given, positions, caches, record) and
    decode(given [1, 1, ...], caches, batch, record): one call of all layers, as `DSALayer` and `SmallModel` have them.
    """

    layers: list[DSALayer]
    given: Callable[[int, int], Tensor]
    forward: Callable[..., Tensor]
    decode: Callable[..., Tensor]


def sizes_of(sizes: str | DSAConfig, longest: int, device: torch.device) -> Sizes:
    """sizes: "v32", "small" or a layer's own config; longest: tokens that it will hold in the end.

    One layer has weights in bf16 on a GPU and in fp32 on a CPU, the small model in fp32.
    Raises: ValueError for another name, TypeError for another type.
    """
    if sizes == "small":
        with torch.device("meta"):
            model = SmallModel()
        config = longer(model.config.attention, longest)
        return Sizes(sizes, config, model.config.n_layers, count(model), torch.float32)
    if isinstance(sizes, str) and sizes != "v32":
        raise ValueError(f"sizes must be 'v32', 'small' or a DSAConfig, got {sizes!r}")
    if not isinstance(sizes, (str, DSAConfig)):
        raise TypeError(f"sizes must be 'v32', 'small' or a DSAConfig, got {type(sizes).__name__}")
    name, config = ("config", sizes) if isinstance(sizes, DSAConfig) else (sizes, V32)
    if not config.index_fp8:
        raise ValueError("sizes must have index_fp8 = True, as decode reads FP8 keys from pages, got False")
    with torch.device("meta"):
        layer = DSALayer(config)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Sizes(name, longer(config, longest), 1, count(layer), dtype)


def longer(config: DSAConfig, longest: int) -> DSAConfig:
    """config with room for `longest` tokens; where YaRN was off, a length alone must not turn it on."""
    if longest <= config.max_seq_len:
        return config
    factor = config.rope_factor if config.yarn else 1.0
    return dataclasses.replace(config, max_seq_len=longest, rope_factor=factor)


def count(module: torch.nn.Module) -> int:
    """The numbers in a module's weights."""
    return sum(weight.numel() for weight in module.parameters())


def make_subject(sizes: Sizes, longest: int, ops: Ops, device: torch.device, seed: int) -> Subject:
    """The layers on their device, and their input. Raises: ValueError for more tokens than the text has."""
    if sizes.name == "small":
        return _small_model(sizes, longest, ops, device)
    return _random_layer(sizes, ops, device, seed)


def _small_model(sizes, longest, ops, device) -> Subject:
    """All layers of the trained model, on Python's standard library: first the files that training left out."""
    text = torch.cat(load_corpus()[::-1])
    if longest > len(text):
        raise ValueError(f"tokens must leave {longest} within the {len(text)} bytes of text, which do not suffice")
    text = text[:longest].long().to(device)
    c = sizes.config
    model = load_small_model(ops=ops, max_seq_len=c.max_seq_len, rope_factor=c.rope_factor).to(device)
    return Subject(
        [block.self_attn for block in model.layers],
        lambda first, last: text[first:last],
        lambda given, positions, caches, record: model(given, positions, caches, record=record),
        model.decode_batch,
    )


def _random_layer(sizes, ops, device, seed) -> Subject:
    """One layer whose products keep the size of what they get, on normal numbers, new ones in each call."""
    c = sizes.config
    with torch.device("meta"):
        layer = DSALayer(c, ops).to(sizes.dtype).requires_grad_(False)
    layer.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, weight in layer.named_parameters():
        if weight.dim() == 2:
            weight.normal_(generator=generator).mul_(weight.shape[1] ** -0.5)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)

    def given(first: int, last: int) -> Tensor:
        numbers = torch.Generator(device).manual_seed(seed + 1 + first)  # anew with every token that is asked for
        return torch.randn(last - first, c.dim, generator=numbers, dtype=sizes.dtype, device=device)

    return Subject(
        [layer],
        given,
        lambda given, positions, caches, record: layer(given, positions, caches[0], record=record),
        lambda given, caches, batch, record=None: layer.decode(given, caches[0], batch, record),
    )
