"""What somebody who wants to run a checkpoint sparsely needs to know of it and of this machine, as text.

Which family and sizes, whether the files are whole, what would run, and what memory it takes. No weight is read.
"""

import os
import pathlib
import textwrap

from ...config import DSAConfig
from ...hf_config import CONFIG, read_config
from . import memory
from .files import read_weights, runs, scale_suffix, their_config
from .machine import Machine, this_machine, version, what_runs
from .memory import Sizes

COLUMNS, LABEL = 80, 13
UNBROKEN = "\u00a0"  # the blank between a number and its unit, as long as lines are wrapped
CHUNK = 4096  # tokens a pass, of `generate(prefill_chunk_size=)`
MOST_LISTED = 8  # lines of a kind
TITLES = {"deepseek_v32": "DeepSeek-V3.2", "glm_moe_dsa": "GLM-5"}


def report(
    directory: str | os.PathLike, tokens: int | None = None, batch: int = 1, machine: Machine | None = None
) -> tuple[str, int]:
    """(the report, how many faults the directory's files have).

    tokens: of each of `batch` sequences, whose memory is counted; None: the model's longest context. machine: None is
    this one.

    Raises: ValueError, TypeError or FileNotFoundError for a directory that is none, a config.json that is missing, of
    another family, or with a field that `DSAConfig.from_hf` or transformers refuses, and for a damaged index.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        got = "a file" if directory.exists() else "nothing there"
        raise ValueError(f"{directory} must be a directory that holds {CONFIG}, got {got}")
    fields = read_config(directory)
    config = DSAConfig.from_hf(fields)
    suffix, theirs = scale_suffix(fields), their_config(fields)
    machine = this_machine() if machine is None else machine
    weights = read_weights(directory, theirs, suffix, _keeps_fp8(fields, machine))
    sizes = Sizes(
        config,
        theirs.num_hidden_layers,
        theirs.model_type == "glm_moe_dsa",
        weights.dtype.itemsize,
        theirs.num_experts_per_tok,
        theirs.moe_intermediate_size,
        theirs.intermediate_size,
    )
    tokens = config.max_seq_len if tokens is None else tokens
    parts = [
        _model(directory, fields, config, sizes),
        _weights(weights, sizes, fields, machine),
        _machine(machine, config, weights.dtype),
        _memory(weights, sizes, machine, tokens, batch),
    ]
    text = "\n\n".join("\n".join(lines) for lines in parts)
    return text.replace(UNBROKEN, " "), len(weights.wrong)


def _model(directory, fields, config, sizes):
    """Family, layers, attention, context."""
    own = [i for i in range(sizes.layers) if config.has_indexer(i)]
    shared = sizes.layers - len(own)
    layers = (
        f"{len(own)} with an indexer, {shared} that share another's selection" if shared else "each with an indexer"
    )
    yarn = f", by YaRN from {config.original_seq_len:,}" if config.yarn else ""
    c = config
    return [
        f"{TITLES[fields['model_type']]} (model_type {fields['model_type']})",
        *_line("directory", str(directory)),
        *_line("layers", f"{sizes.layers}: {layers}"),
        *_line("attention", f"{c.n_heads} heads of {c.qk_nope_head_dim} + {c.qk_rope_head_dim}, values of "
               f"{c.v_head_dim}; cached of a token: {c.kv_lora_rank} + {c.qk_rope_head_dim} numbers"),
        *_line("indexer", f"{c.index_n_heads} heads of {c.index_head_dim}, selects k = {c.index_topk:,} keys"),
        *_line("context", f"{c.max_seq_len:,} tokens{yarn}"),
    ]  # fmt: skip


def _weights(weights, sizes, fields, machine):
    """What the files have, lack, and become."""
    lines = ["weights (headers read, no weight)"]
    stored = ", ".join(f"{_size(size)} {name}" for name, size in sorted(weights.by_dtype.items()))
    lines += _line("files", f"{weights.tensors:,} tensors; loaded of them: {stored or 'none'}")
    if weights.beyond:
        lines += _line("not loaded", f"layer {runs(weights.beyond)}, past the model's {sizes.layers} (multi-token "
                       f"prediction): {_size(sum(weights.beyond.values()))}")  # fmt: skip
    lines += _lines("ignored", weights.ignored)
    lines += _quantised(fields, machine)
    return lines + (_lines("wrong", weights.wrong) or _line("whole", _compared(fields)))


def _compared(fields):
    if scale_suffix(fields) is None:
        return "all files are there; names of this quantisation's tensors were not compared"
    return "all tensors that transformers loads are there, with config.json's shapes"


def _keeps_fp8(fields, machine):
    """Whether FP8 weights are still FP8 when transformers runs them. compressed-tensors unpacks what it has loaded."""
    quantization = fields.get("quantization_config") or {}
    return quantization.get("quant_method") == "fp8" and not quantization.get("dequantize") and machine.keeps_fp8


def _quantised(fields, machine):
    """What a quantization_config means for transformers and for make_sparse."""
    quantization = fields.get("quantization_config")
    if quantization is None:
        return []
    method = quantization.get("quant_method")
    packages = {"fp8": ["accelerate", "kernels"], "compressed-tensors": ["compressed-tensors"]}.get(method, [])
    needs = ", ".join(f"{name} ({version(name) or 'not installed'})" for name in packages)
    lines = _line("quantised", f"{method}: transformers needs {needs or 'the package of that method'}")
    if method == "fp8" and not _keeps_fp8(fields, machine):
        why = "config.json says dequantize" if machine.keeps_fp8 else "no GPU of compute capability 8.9 is here"
        return lines + _line("", f"{why}, so transformers makes bf16 of FP8 when it loads: kv_b_proj is then a plain "
                             "matrix")  # fmt: skip
    return lines + _line("", "make_sparse reads kv_b_proj by a product with unit vectors in every layer at every call; "
                         "loading with dequantize=True in the quantization_config spares that")  # fmt: skip


def _machine(machine, config, dtype):
    """Versions, the card, and what would run."""
    lines = ["this machine"]
    kernels = "dsa_kernels found" if machine.kernels else "no dsa_kernels"
    lines += _line("software", f"transformers {machine.transformers}, torch {machine.torch}, "
                   f"{f'triton {machine.triton}' if machine.triton else 'no triton'}, {kernels}")  # fmt: skip
    if machine.capability is None:
        lines += _line("hardware", f"no GPU; {_size(machine.free)} of RAM free")
    else:
        lines += _line("hardware", f"{machine.cards} x {machine.card}, compute capability "
                       f"{'.'.join(map(str, machine.capability))}; {_size(machine.free)} free")  # fmt: skip
    for call, what in what_runs(machine, config, dtype):
        lines += [*_line("runs", call), *_line("", f"  {what}", indent=2)]
    return lines


def _memory(weights, sizes, machine, tokens, batch):
    """What it takes to prefill so many tokens, in one pass and in chunks, and how far one gets."""
    kernels, cuda = machine.why_not is None, machine.capability is not None
    token, longest = memory.cache_bytes_per_token(sizes), sizes.config.max_seq_len

    def prefill(tokens, chunk):
        return memory.prefill(sizes, tokens, chunk, batch, kernels, cuda)

    def needed(tokens, chunk):
        return weights.memory + batch * tokens * token + prefill(tokens, chunk).most

    chunks = max(tokens, longest), CHUNK  # one pass, however long; or some
    passes = [prefill(tokens, chunk) for chunk in chunks]
    rows = [
        ("", ["prompt at once", f"chunks of {CHUNK:,}"]),
        ("weights", [_size(weights.memory)] * 2),
        (f"cache, {_size(token)} a token", [_size(batch * tokens * token)] * 2),
        ("besides, in a pass: hidden states", [_size(one.hidden) for one in passes]),
        ("  and a layer's sparse attention", [_size(one.attention) for one in passes]),
        ("  or its MLP, which is transformers'", [_size(one.mlp) for one in passes]),
        ("together, at most at once", [_size(needed(tokens, chunk)) for chunk in chunks]),
    ]
    if machine.free is not None:
        far = [memory.longest(lambda n, chunk=chunk: needed(n, chunk), machine.free, longest) for chunk in chunks]
        rows += [
            ("free here", [_size(machine.free)] * 2),
            ("fits", ["yes" if needed(tokens, chunk) <= machine.free else "no" for chunk in chunks]),
            ("longest that fits, in tokens", [f"{n:,}" for n in far]),
        ]
    dense = [memory.dense_attention(sizes, tokens, chunk, batch) for chunk in chunks]
    rows += [("sdpa's attention of a layer, at least", [_size(size) for size in dense])]
    sequences = "1 sequence" if batch == 1 else f"{batch} sequences"
    past = f", past the model's {longest:,}" if tokens > longest else ""
    lines = [f"memory for {sequences} of {tokens:,} tokens{past}, in {_name(weights.dtype)}"]
    lines += [f"  {label:<40}{one:>18}{other:>20}" for label, (one, other) in rows]
    lines += _line("chunks", f"model.generate(..., prefill_chunk_size={CHUNK})")
    lines += _line("logits", "generate makes those of the last token; model(...) of all, without logits_to_keep=1")
    if machine.free is not None and weights.memory > machine.free:
        lines += _line("too large", "the weights alone take more than is free here: more GPUs, or device_map with "
                       "offloading, which is slow")  # fmt: skip
    if machine.cards > 1:
        lines += _line("GPUs", f"free is what {machine.cards} have together, as device_map spreads the layers")
    return lines


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _size(count):
    """Bytes as text."""
    if count is None:
        return "unknown"
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power:
            return f"{count / (1 << power):,.1f}{UNBROKEN}{unit}"
    return f"{count}{UNBROKEN}bytes"


def _lines(label, texts):
    """A line or more for each text, not too many."""
    lines = []
    for n, text in enumerate(texts[:MOST_LISTED]):
        lines += _line(label if n == 0 else "", text)
    return lines + (_line("", f"and {len(texts) - MOST_LISTED} more") if len(texts) > MOST_LISTED else [])


def _line(label, text, indent=0):
    """`label  text` in 80 columns, further lines under the text."""
    return textwrap.wrap(
        text, COLUMNS, initial_indent=f"  {label:<{LABEL - 2}}", subsequent_indent=" " * (LABEL + indent),
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip
