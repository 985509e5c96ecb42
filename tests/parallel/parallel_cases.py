"""What the tests run on every rank of a world, and, with the same arguments, on one rank in their own process.

`fault` names a wrong variant that is put in the place of the right code while a case runs: each must be found out.
"""

import dataclasses
import os
import time
from unittest import mock

import rungs
import torch
import torch.distributed as dist
from parallel_faults import planted
from torch.utils.checkpoint import checkpoint

from dsa_ref import TINY, DSALayer, LayerCache
from dsa_ref.nn import ModelConfig, SmallModel
from dsa_ref.parallel import (
    GatheredLayer,
    Ranks,
    ShardedCache,
    ShardedLayer,
    Zigzag,
    gathered,
    new_sharded_caches,
    over_group,
    sharded,
    stage_backward,
    training,
)
from dsa_ref.parallel.generate import generate_over_group

# Inputs and models, the same wherever they are made -------------------------------------------------------------------


def config_of(**fields):
    return dataclasses.replace(TINY, **fields)


def layer_of(seed, ops="reference", dtype=torch.float32, **fields):
    torch.manual_seed(seed)
    return DSALayer(config_of(**fields), ops=rungs.load(ops)).to(dtype)


def packed(lengths):
    """positions int64 [T] of sequences of these lengths."""
    return torch.cat([torch.arange(length) for length in lengths])


def tokens_of(lengths, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), TINY.dim, generator=generator).to(dtype)


def model_of(seed, ops="reference", vocab_size=256, **fields):
    torch.manual_seed(seed)
    fields = {"index_fp8": False} | fields
    model = SmallModel(ModelConfig(2, 32, vocab_size, config_of(**fields)), ops=rungs.load(ops))
    for weight in model.parameters():
        if weight.dim() == 2:  # larger than at a training's start, where the indexer's loss is next to nothing
            torch.nn.init.normal_(weight, std=0.2)
    return model


def windows_of(n, length, seed):
    return torch.randint(0, 256, (n, length + 1), generator=torch.Generator().manual_seed(seed))


def selection_inputs(T, S, seed, ties):
    """q_idx, k_idx, w, start, end. ties: small whole numbers, which give many equal scores, exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (T, 4, 16), (S, 16), (T, 4)
    if ties:
        tensors = [torch.randint(-1, 2, shape, generator=generator).float() for shape in shapes]
    else:
        tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    start = torch.randint(0, S // 2, (T,), generator=generator, dtype=torch.int32)
    end = torch.randint(S // 2, S + 1, (T,), generator=generator, dtype=torch.int32)
    end[0] = start[0]  # a row that sees nothing
    return *tensors, start, end


def dealt(S, size, seed, empty):
    """places int32 of each rank: all S dealt at random, none to the ranks in `empty`."""
    takers = torch.tensor([rank for rank in range(size) if rank not in empty])
    owner = takers[torch.randint(0, len(takers), (S,), generator=torch.Generator().manual_seed(seed))]
    return [(owner == rank).nonzero()[:, 0].int() for rank in range(size)]


# Cases: on one rank of a group ----------------------------------------------------------------------------------------


def layer_forward(
    lengths, seed, ops="reference", attention="sparse", fault=None, grad=False, dtype=torch.float32, repeated=False,
    **fields,
):  # fmt: skip
    """Own rows, the layer's output on them and the record of the selection; with `grad`, gradients of all.

    repeated: under activation checkpointing, which runs the layer again in the backward pass.
    """
    layer, group = layer_of(seed, ops, dtype, **fields), Ranks()
    rows = Zigzag(sum(lengths), group.size).rows(group.rank)
    x, positions, record = tokens_of(lengths, seed, dtype)[rows].requires_grad_(grad), packed(lengths)[rows], []
    with planted(fault), torch.set_grad_enabled(grad):
        over, more = GatheredLayer(layer), {"attention": attention, "record": record}
        y = checkpoint(over, x, positions, use_reentrant=False, **more) if repeated else over(x, positions, **more)
        found = {"rows": rows, "y": y.detach(), "indices": record[0].get("indices"), "lse": record[0]["lse"].detach()}
        if grad:
            (y * weights_of(lengths, seed)[rows]).sum().backward()
            training.sum_gradients(layer.parameters())
            found |= {"dx": x.grad, "weights": [w.grad for w in layer.parameters()]}
    return found


def uses_of_modules(T, indexer):
    """How often a prompt of T tokens calls each module of a layer on this rank."""
    layer, group, uses = two_layers(0)[not indexer], Ranks(), {}
    for name, module in layer.named_modules():
        module.register_forward_hook(lambda *_, name=name: uses.update({name: uses.get(name, 0) + 1}))
    rows, over = Zigzag(T, group.size).rows(group.rank), GatheredLayer(layer)
    over.rows_at_once, over.keys_at_once = 2, 3
    indices = None if indexer else rows[:, None].int()
    over(tokens_of([T], 0)[rows], rows, ShardedCache(TINY, T, indexer=indexer), indices=indices)
    return uses


def shared_selection(lengths, seed):
    """Two layers, the second without an indexer: own rows, and its output by either plan (see `two_layers`)."""
    first, second = two_layers(seed)
    rows = Zigzag(sum(lengths), Ranks().size).rows(Ranks().rank)
    x, positions, record = tokens_of(lengths, seed), packed(lengths), []
    gathered = GatheredLayer(first)(x[rows], positions[rows], record=record)
    gathered = GatheredLayer(second)(gathered, positions[rows], indices=record[0]["indices"])
    caches = [ShardedCache(TINY, sum(lengths), indexer=indexer) for indexer in (True, False)]
    y = ShardedLayer(first)(x, positions, caches[0], record=record)
    return rows, gathered, ShardedLayer(second)(y, positions, caches[1], indices=record[1]["indices"])


def two_layers(seed):
    torch.manual_seed(seed)
    return [DSALayer(TINY, indexer=indexer).requires_grad_(False) for indexer in (True, False)]


def weights_of(lengths, seed):
    """What a test multiplies the output by, so that each place of its gradient is another number."""
    return torch.randn(sum(lengths), TINY.dim, generator=torch.Generator().manual_seed(seed + 1))


def train(n, length, stage, seed, ops="reference", fault=None, times=1, **fields):
    """The losses, and the gradient of each parameter by its name, after `times` passes."""
    model = model_of(seed, ops, **fields)
    over = over_group(model, GatheredLayer)
    with planted(fault):
        for _ in range(times):
            losses = training.stage_backward(over, windows_of(n, length, seed), stage)
    return losses, {name: parameter.grad for name, parameter in model.named_parameters()}


def select(T, S, k, seed, ties=False, ops="reference", empty=(), fault=None):
    """The selection over keys that are dealt at random, and attention over it."""
    group = Ranks()
    q_idx, k_idx, w, start, end = selection_inputs(T, S, seed, ties)
    q, kv = attention_inputs(T, S, seed)
    places = dealt(S, group.size, seed, empty)[group.rank]
    mine, steps = places.long(), rungs.load(ops)
    if fault == "local places":  # taken for those in the sequence
        places, fault = torch.arange(len(places), dtype=torch.int32), None
    with planted(fault):
        indices = sharded.sharded_select(q_idx, k_idx[mine], w, k, places, start, end, group, ops=steps)
        out, lse = sharded.sharded_attention(q, kv[mine], indices, 0.3, 8, places, group, ops=steps)
    return indices, out, lse


def attention_inputs(T, S, seed):
    generator = torch.Generator().manual_seed(seed + 2)
    return torch.randn(T, 4, 12, generator=generator), torch.randn(S, 12, generator=generator)


def generate(
    prompt, more, chunk, seed, prefill=True, ops="reference", fault=None, rows_at_once=5, parts=None, recording=False,
    **fields,
):  # fmt: skip
    """Logits of a prompt's rows on this rank, then those of the tokens that follow, chunk by chunk, on all ranks.

    parts: the lengths of what the prompt comes in; recording: by the step that keeps a record.
    """
    model, group = model_of(seed, ops, **fields).requires_grad_(False), Ranks()
    text = windows_of(1, prompt + more, seed)[0, : prompt + more]
    caches, found, before = new_sharded_caches(model, prompt + more + 2 * len(parts or [])), [], 0
    with planted(fault), mock.patch.multiple(GatheredLayer, rows_at_once=rows_at_once, keys_at_once=3):
        for length in (parts or [prompt]) if prefill else []:
            rows = before + Zigzag(length, group.size).rows(group.rank)
            record = [] if recording else None
            found.append((rows, over_group(model, GatheredLayer)(text[rows], rows, caches, record=record)))
            before += length
        decoding = over_group(model, ShardedLayer)
        for first in range(prompt if prefill else 0, prompt + more, chunk):
            last = min(first + chunk, prompt + more)
            found.append((torch.arange(first, last), decoding(text[first:last], torch.arange(first, last), caches)))
    return found, [cache.held for cache in caches]


def refused(call, changes):
    """What a call raises for which rank 1 has other arguments; then all make one alike: the group must still work."""
    group, raised = Ranks(), None
    try:
        CALLS[call](group, **(changes if group.rank == 1 else {}))
    except (ValueError, TypeError) as error:
        raised = type(error).__name__, str(error)
    return raised, layer_forward([9], seed=0)["y"].isfinite().all()


def gathered_call(
    group, fewer=0, dim=64, dtype=torch.float32, fields=None, poison=False, attention="sparse", shift=0, grad=False,
    cache=None, at_once=5,
):  # fmt: skip
    rows = Zigzag(11, group.size).rows(group.rank)
    rows = rows[: len(rows) - fewer]
    x, positions = tokens_of([11], 0)[rows, :dim].to(dtype), packed([11])[rows] + shift
    if poison:
        x[0] = torch.nan
    layer = layer_of(0, **(fields or {})).to(dtype).requires_grad_(grad)
    gathering = GatheredLayer(layer)
    gathering.rows_at_once = at_once
    gathering(x, positions, LayerCache(TINY, 20) if cache else None, attention)


def behind_call(group, shift=0, start=None, before=9, of=None, lost=0, none=False, grad=False, room=20):
    """The next 11 tokens behind 9, of which rank r holds every third. start: where another sequence begins."""
    layer, cache = layer_of(0).requires_grad_(grad), ShardedCache(TINY, 3 + room)
    rows, own = Zigzag(11, group.size).rows(group.rank), torch.arange(group.rank if of is None else of, 9, group.size)
    own = own[: len(own) - lost]
    indexed = torch.ones(9, TINY.index_head_dim).to(torch.float8_e4m3fn), torch.ones(9)
    cache.append_own(own, before, torch.ones(len(own), TINY.latent_dim), *(part[: len(own)] for part in indexed))
    positions = 9 + rows + shift
    if start is not None:
        positions[start:] -= positions[start].item()
    try:
        GatheredLayer(layer)(tokens_of([11], 0)[rows], positions, None if none else cache)
    except (ValueError, TypeError):
        assert cache.length == before and cache.held == len(own)  # also where rows were stored before it failed
        raise


def sharded_call(
    group, T=3, seed=0, dtype=torch.float32, fields=None, before=0, capacity=9, attention="sparse", cached=None
):
    config = config_of(**(fields or {}))
    cache = ShardedCache(config, capacity, cached or dtype)
    cache.length = before
    layer = layer_of(0, **(fields or {})).to(dtype).requires_grad_(False)
    ShardedLayer(layer)(tokens_of([T], seed, dtype), torch.arange(before, before + T), cache, attention)


def training_call(group, stage="sparse", n=2, seed=0, token=None, share=1.0):
    windows = windows_of(n, 7, seed)
    if token is not None:
        windows[0, 0] = token
    stage_backward(over_group(model_of(0), GatheredLayer), windows, stage, share)


def model_call(group, plan=GatheredLayer, token=None, count=None):
    """A whole model: what it refuses before its first layer."""
    rows = Zigzag(7, group.size).rows(group.rank) if plan is GatheredLayer else torch.arange(3)
    text, model = windows_of(1, 7, 0)[0, rows], model_of(0).requires_grad_(False)
    if token is not None:
        text[0] = token
    caches = new_sharded_caches(model, 7)
    over_group(model, plan)(text, rows, caches[:count])


def tries_again(plan):
    """Between two layers rank 1 fails, and calls the model again while the others are in its second layer: what is
    raised then, the caches' lengths, and logits of a call of all."""
    model, ranks, caught = model_of(0).requires_grad_(False), Ranks(), []
    text, rows = windows_of(1, 7, 0)[0], Zigzag(7, ranks.size).rows(ranks.rank)
    rows = rows if plan == "GatheredLayer" else torch.arange(3)
    over, caches = over_group(model, getattr(sharded, plan, GatheredLayer)), new_sharded_caches(model, 7)

    def fails(*_):
        raise OSError("once")

    hook = model.layers[0].gate_proj.register_forward_hook(fails) if ranks.rank == 1 else None
    for _ in range(1 + (ranks.rank == 1)):
        try:
            over(text[rows], rows, caches)
        except (OSError, ValueError) as error:
            caught.append(str(error))
        if hook:
            hook.remove()
    lengths = [cache.length for cache in caches]
    return caught, lengths, rows, over(text[rows], rows, caches)


def gradients_call(group, wrong=None):
    weights = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.ones(2, 2)
    if wrong == "sparse":
        weights[1].grad = torch.ones(2, 2).to_sparse()
    training.sum_gradients(weights[0] if wrong == "one" else ["w"] if wrong == "names" else iter(weights))


def weights_call(group, seed=0):
    over_group(model_of(seed), GatheredLayer)


def mixed_call(group, other=False):
    (sharded_call if other else gathered_call)(group)


CALLS = {"gathered": gathered_call, "behind": behind_call, "sharded": sharded_call, "training": training_call,
         "mixed": mixed_call, "weights": weights_call, "model": model_call, "gradients": gradients_call}  # fmt: skip


def dies(rank, where):
    """One rank's process ends in the middle of a call; what the others raise, and after how many seconds."""
    messages = iter(range(100))

    def ends_in(owner, name, after):
        original = getattr(owner, name)

        def ending(*arguments):
            if next(messages) >= after:
                os._exit(7)
            return original(*arguments)

        setattr(owner, name, ending)

    if Ranks().rank == rank:
        # "rows": two messages are sent, each by an all-gather, and then the rows
        ends_in(Ranks, *{"message": ("agree", 0), "rows": ("all_gather", 2), "backward": ("reduce_scatter", 0)}[where])
    begun = time.monotonic()
    try:
        layer_forward([11], seed=0, grad=True)
    except RuntimeError as error:
        return str(error), time.monotonic() - begun
    return None


def late(rank, seconds):
    """The rank comes too late."""
    if Ranks().rank == rank:
        time.sleep(seconds)
    begun = time.monotonic()
    try:
        layer_forward([11], seed=0)
    except RuntimeError as error:
        return str(error), time.monotonic() - begun
    return None


def twins():
    """Whether a model over the group has the model's own weights under their names, and has left the model alone."""
    model = model_of(0)
    over = over_group(model, GatheredLayer)
    same = all(a is b for a, b in zip(model.parameters(), over.parameters(), strict=True))
    kinds = [type(block.self_attn).__name__ for block in (*model.layers, *over.layers)]
    model.double()  # both, since the weights are one
    dtypes = {weight.dtype for weight in over.parameters()}
    return same, list(model.state_dict()) == list(over.state_dict()), kinds, dtypes


def gathers_others():
    """What `gather_rows` says of rows that are no share: the text before the numbers."""
    shares, ranks, found = Zigzag(7, 2), Ranks(), []
    n = shares.count(ranks.rank)
    for rows in ([], [torch.zeros(n + 1, 2)], [torch.zeros(n, 2), torch.zeros(n - 1)], [torch.tensor(1.0)]):
        try:
            gathered.gather_rows(rows, shares, ranks)
        except ValueError as error:
            found.append(str(error).rsplit(" ", str(error).count(" ") - 4)[0])
    return found


def agrees():
    """What `agree` gives back, and how it takes a message that is too long."""
    group = Ranks(dist.group.WORLD)
    own = group.agree({"same": 1}, {"mine": group.rank})
    try:
        group.agree({"long": "x" * 3000})
    except ValueError as error:
        return own, str(error)


def bytes_after(prompt, tokens, seed, other=None, fault=None, fields=None, draws=0, vocab_size=256, **options):
    """The bytes that continue a prompt, as a list. other: the prompt of rank 1."""
    model = model_of(seed, vocab_size=vocab_size, **(fields or {})).requires_grad_(False)
    if other is not None and Ranks().rank == 1:
        prompt = other
    with planted(fault):
        return list(generate_over_group(model, prompt, tokens, seed=draws, **options))


def unsendable(text):
    """What both ranks hear where rank 1 fails with many times this text, which is longer in a message."""
    ranks = Ranks()
    try:
        with ranks.failing_together():
            if ranks.rank == 1:
                try:
                    ranks.agree({"share": torch.ones(1)})
                except TypeError as error:
                    raise ValueError(text * 900) from error
            ranks.agree({"share": 1.0})
    except ValueError as error:
        return str(error) if ranks.rank == 0 else f"rank 1: {str(error)} {ascii(str(error))}"
