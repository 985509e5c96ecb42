"""What one rank does wrong is an error on all ranks, which names it, and never a hang; the group works afterwards."""

import parallel_cases as cases
import pytest
import torch
from parallel_worlds import World

from dsa_ref import TINY
from dsa_ref.nn import DSALayer
from dsa_ref.parallel import (
    GatheredLayer,
    Ranks,
    ShardedCache,
    Zigzag,
    indexer_share,
    join,
    new_sharded_caches,
    over_group,
)

REFUSED = {  # call, what rank 1 brings, the error on all ranks
    "fewer rows": ("gathered", {"fewer": 1}, "ValueError", "x must hold"),
    "another width": ("gathered", {"dim": 32}, "ValueError", "rank 1: x must have shape"),
    "another dtype": ("gathered", {"dtype": torch.float64}, "ValueError", "dtype must be the same on all ranks"),
    "another k": ("gathered", {"fields": {"index_topk": 4}}, "ValueError", "index_topk must be the same"),
    "another config": ("gathered", {"fields": {"rope_theta": 500.0}}, "ValueError", "config must be the same"),
    "another attention": ("gathered", {"attention": "dense"}, "ValueError", "attention must be the same"),
    "an unknown attention": ("gathered", {"attention": "linear"}, "ValueError", "rank 1: attention must be one of"),
    "another sequence's positions": ("gathered", {"shift": 1}, "ValueError", "rank 1: positions must count up from 0"),
    "a NaN": ("gathered", {"poison": True}, "ValueError", "rank 1: k_idx must be finite"),
    "gradients": ("gathered", {"grad": True}, "ValueError", "rows must be the same on all ranks"),
    "a cache of one rank": ("gathered", {"cache": True}, "TypeError", "rank 1: cache must be a ShardedCache"),
    "blocks of no rows": ("gathered", {"at_once": -1}, "ValueError", "rank 1: rows_at_once must be at least 1"),
    "another place behind a cache": ("behind", {"shift": 1}, "ValueError", "rank 1: positions must continue the cache"),
    "two sequences behind a cache": ("behind", {"start": 2}, "ValueError", "positions must continue the cache, got 0"),
    "a cache of another length": ("behind", {"before": 8}, "ValueError", "length must be the same on all ranks"),
    "another rank's rows": ("behind", {"of": 0}, "ValueError", "caches must hold each token once, got none of token 1"),
    "a row that is missing": ("behind", {"lost": 1}, "ValueError", "caches must hold 20 rows in all"),
    "no cache": ("behind", {"none": True}, "ValueError", "cache must be the same on all ranks"),
    "gradients with a cache": ("behind", {"grad": True}, "ValueError", "rank 1: x and weights must not require"),
    "a cache without room": ("behind", {"room": 0}, "ValueError", "rank 1: cache must hold"),
    "more queries": ("sharded", {"T": 4}, "ValueError", "rows must be the same on all ranks, got 3 on rank 0, 4 on 1"),
    "other queries": ("sharded", {"seed": 1}, "ValueError", "x must be the same on all ranks"),
    "a longer cache": ("sharded", {"before": 2}, "ValueError", "length must be the same on all ranks"),
    "a full cache": ("sharded", {"capacity": 1, "T": 6}, "ValueError", "rank 1: cache must hold"),
    "a cache of another dtype": ("sharded", {"cached": torch.float64}, "TypeError", "rank 1: kv must have dtype"),
    "dense over sharded keys": ("sharded", {"attention": "dense"}, "ValueError", "rank 1: attention must be 'sparse'"),
    "another stage": ("training", {"stage": "dense"}, "ValueError", "stage must be the same on all ranks"),
    "other windows": ("training", {"seed": 1}, "ValueError", "values must be the same on all ranks"),
    "a token that is none": ("training", {"token": 256}, "ValueError", "rank 1: tokens must lie in"),
    "other weights": ("weights", {"seed": 1}, "ValueError", "weights must be the same on all ranks"),
    "a text that is none": ("model", {"token": 256}, "ValueError", "rank 1: tokens must lie in"),
    "another kind of tokens": ("model", {"token": -1}, "ValueError", "rank 1: tokens must lie in"),
    "too few caches": ("model", {"count": 1}, "ValueError", "rank 1: caches must be 2 distinct ones"),
    "one parameter": ("gradients", {"wrong": "one"}, "TypeError", "rank 1: parameters must be those of a module"),
    "names of parameters": ("gradients", {"wrong": "names"}, "TypeError", "rank 1: parameters must be"),
    "sparse gradients": ("gradients", {"wrong": "sparse"}, "ValueError", "rank 1: parameters must have dense"),
    "another share": ("training", {"share": float("nan")}, "ValueError", "rank 1: share must be a finite number"),
    "the other plan": ("mixed", {"other": True}, "ValueError", "call must be the same on all ranks"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_one_rank_brings_is_an_error_on_all(worlds, name):
    call, changes, kind, message = REFUSED[name]
    found = worlds(3).run("refused", call=call, changes=changes)
    for raised, works in found:
        assert raised[0] == kind and message in raised[1], raised
        assert works


def test_what_is_right_is_refused_nowhere(worlds):
    for call in cases.CALLS:
        assert all(raised is None for raised, _ in worlds(3).run("refused", call=call, changes={}))


def test_ranks_agree_or_say_what_differs(worlds):
    for own, message in worlds(3).run("agrees"):
        assert own == [{"mine": 0}, {"mine": 1}, {"mine": 2}]
        assert "must fit into" in message


@pytest.mark.parametrize("plan", ["GatheredLayer", "ShardedLayer"])
def test_a_rank_that_tries_again_alone_is_not_taken_for_another_layers(worlds, plan):
    model, text = cases.model_of(0).requires_grad_(False), cases.windows_of(1, 7, 0)[0]
    wanted = model(text[: 7 if plan == "GatheredLayer" else 3])
    for rank, (caught, lengths, rows, logits) in enumerate(worlds(2).run("tries_again", plan=plan)):
        assert caught == ["once"] * rank + ["layer must be the same on all ranks, got 1 on rank 0, 0 on 1"]
        assert lengths == [0, 0]
        torch.testing.assert_close(logits, wanted[rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["message", "rows", "backward"])
def test_a_rank_that_is_killed_ends_in_an_error_on_all_others(where):
    world = World(3)
    try:
        outcomes = world.outcomes("dies", rank=1, where=where)
        assert outcomes[1] is None and world.processes[1].exitcode in (None, 7)
        for rank in (0, 2):
            message, seconds = outcomes[rank]
            assert f"rank {rank} of 3" in message and "another rank has ended" in message
            assert seconds < 30  # at once, and not after the group's 60 seconds
    finally:
        world.close()


def test_a_rank_that_does_not_come_is_an_error_after_the_timeout():
    world = World(2, timeout=1.0)
    try:
        message, seconds = world.outcomes("late", rank=1, seconds=2.0)[0]
        assert "did not come within the group's timeout" in message and 0.9 < seconds < 20
    finally:
        world.close()


def test_there_must_be_a_group():
    with pytest.raises(ValueError, match="not initialized"):
        Ranks()
    with pytest.raises(ValueError, match="not initialized"):
        GatheredLayer(DSALayer(TINY))
    with pytest.raises(TypeError, match="layer must be a DSALayer"):
        GatheredLayer(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="plan must be"):
        over_group(cases.model_of(0), DSALayer)
    with pytest.raises(ValueError, match="model must hold a DSALayer"):
        over_group(torch.nn.Linear(1, 1), GatheredLayer)


@pytest.mark.parametrize(
    "timeout, kind",
    [*((bad, ValueError) for bad in (0, -1.0, 1e-9, 1e300, float("inf"), float("nan"))), ("60", TypeError)],
)
def test_join_needs_a_timeout(timeout, kind):
    with pytest.raises(kind, match="timeout"):
        join(timeout)


def test_join_needs_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun"):
        join()


def test_a_share_of_the_loss_needs_a_step_of_its_layer():
    with pytest.raises(TypeError, match="layer must be a GatheredLayer, got DSALayer"):
        indexer_share(DSALayer(TINY), {}, 4)
    layer = GatheredLayer.__new__(GatheredLayer)
    with pytest.raises(ValueError, match="step must be what a GatheredLayer with an indexer recorded, got none of"):
        indexer_share(layer, {"q": 1, "kv": 1, "lse": 1, "start": 1, "end": 1}, 4)
    with pytest.raises(TypeError, match="rows must be an int"):
        indexer_share(layer, dict.fromkeys(("q_idx", "k_idx", "w", "start", "end", "q", "kv", "lse")), 4.0)


def test_a_sharded_cache_is_no_cache_of_a_layer_alone():
    cache, x = ShardedCache(TINY, 5), torch.randn(2, TINY.dim)
    with pytest.raises(TypeError, match="ShardedCache"), torch.no_grad():
        DSALayer(TINY)(x, torch.arange(2), cache)
    assert cache.length == 0 and cache.held == 0


def test_a_sharded_cache_forgets_what_lies_behind_its_length():
    cache = ShardedCache(TINY, 5)
    rows = (
        torch.arange(5.0)[:, None].expand(-1, TINY.latent_dim),
        torch.zeros(5, 16).to(torch.float8_e4m3fn),
        torch.ones(5),
    )
    places = torch.tensor([0, 2, 5, 6, 9])
    cache.append_own(places, 10, *rows)
    assert cache.held == 5 and cache.length == 10
    cache.truncate(6)
    assert cache.held == 3 and cache.rows()[0][:, 0].tolist() == [0.0, 1.0, 2.0]
    cache.append_own(torch.tensor([7]), 8, *(part[4:] for part in rows))
    assert (
        cache.held == 4 and cache.places[:4].tolist() == [0, 2, 5, 7] and cache.rows()[0][:, 0].tolist() == [0, 1, 2, 4]
    )
    with pytest.raises(ValueError, match="on this rank"):
        cache.check_own_room(2)


def test_a_sharded_cache_made_in_inference_mode_or_under_another_default_device():
    for around in (torch.inference_mode, lambda: torch.device("meta")):
        with around():
            cache = ShardedCache(TINY, 5, device="cpu")
        rows = torch.ones(1, TINY.latent_dim), torch.zeros(1, 16).to(torch.float8_e4m3fn), torch.ones(1)
        cache.append_own(torch.tensor([3]), 4, *rows)
        assert cache.held == 1 and cache.places[0] == 3


@pytest.mark.parametrize("T, size, rank", [(-1, 2, 0), (4, 0, 0), (4, 2, 2), (4, 2, -1), (4.0, 2, 0), (4, "2", 0)])
def test_shares_are_those_of_ranks(T, size, rank):
    with pytest.raises((ValueError, TypeError), match="T must|size must|rank must"):
        Zigzag(T, size).rows(rank)


def test_rows_are_those_of_shares():
    shares = Zigzag(7, 2)
    with pytest.raises(ValueError, match=r"everyone must have shape \[2, 4, ...\], got \[2, 3, 5\]"):
        shares.in_order(torch.zeros(2, 3, 5))
    for rows in (torch.zeros(9, 2), torch.zeros(5), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"rows must have shape \[7, ...\]"):
            shares.by_rank(rows)


def test_gathered_rows_are_those_of_a_share(worlds):
    for message in worlds(2).run("gathers_others"):
        assert message == ["rows must be tensors of"] * 4, message


def test_caches_are_a_small_models():
    with pytest.raises(TypeError, match="model must be a SmallModel, got Linear"):
        new_sharded_caches(torch.nn.Linear(1, 1), 4)


def test_what_json_cannot_hold_is_announced(worlds):
    """An error before a message was sent reaches the others, whatever its text: they would wait for it."""
    for text, received in (("\u2192", "\\u2192"), ("\0", "\0"), ('\n"', '\n"')):
        for message in worlds(2).run("unsendable", text=text):
            assert message.startswith("rank 1: ") and received in message


@pytest.mark.parametrize("more", [{"LOCAL_RANK": "2"}, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}])
def test_there_must_be_a_gpu_for_each_process(more, monkeypatch):
    """All ranks of a host are refused, where they can know it."""
    for name, value in ({"RANK": "2", "WORLD_SIZE": "3"} | more).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="at most the number of GPUs here, 2, got 3"):
        join()
