"""Wrong variants of what runs over several ranks, each to be found out by the tests: `with planted(name): ...`."""

import contextlib
from unittest import mock

import torch

from dsa_ref.parallel import GatheredLayer, Ranks, ShardedLayer, Zigzag, gathered, sharded, training


def local_ranges(self, positions, cache):
    """Local positions taken for global ones: the i-th own row sees i + 1 keys."""
    self.runs = []
    end = torch.arange(1, len(positions) + 1, dtype=torch.int32)
    return {"start": torch.zeros_like(end), "end": end}


def padding_seen(self, everyone):
    """The gathered rows as they lie, padding and all."""
    return everyone.flatten(0, 1)[: self.T]


def gathered_order(self, everyone):
    """Ranks one after the other, without padding: not the sequence's order."""
    return torch.cat([everyone[rank, : self.count(rank)] for rank in range(self.size)])


def places_ignored(rows, places, counts, ranks):
    """Rows behind each other as the ranks hold them."""
    first = sum(counts[: ranks.rank])
    return original_held(rows, torch.arange(first, first + len(places), dtype=torch.int32), counts, ranks)


def own_gradient(self, parts):
    """No sum over ranks: what other ranks' rows asked of this rank's keys is lost."""
    return parts[self.rank]


def mean_gradient(self, parts):
    return original_reduce_scatter(self, parts) / self.size


def twice(parameters, group=None):
    """Gradients summed over ranks two times."""
    parameters = list(parameters)
    original_sum(parameters, group)
    original_sum(parameters, group)


def not_at_all(parameters, group=None):
    """Each rank keeps the gradient of its own share."""


def by_own_rows(layer, step, rows, target=None):
    """KL divided by the rank's rows instead of the group's."""
    return original_share(layer, step, max(1, len(step["w"])), target)


def mean_merge(outs, lses):
    return outs.mean(dim=0), lses.logsumexp(dim=0)


def by_rank(keys):
    """Candidates in the order of ranks, those that are none behind: of equal scores the first rank's is kept."""
    return (keys < 0).byte().sort(dim=1, stable=True).indices


def own_best(keys, scores, group):
    """No exchange of candidates: each rank keeps the k best of its own."""
    nothing = torch.full((len(keys), keys.shape[1] * (group.size - 1)), -1, dtype=torch.int32)
    return torch.cat((keys, nothing), dim=1), torch.cat((scores, nothing.to(scores.dtype)), dim=1)


def every_own_place(self, before, T):
    """Every rank keeps every new token: each is then there N times."""
    return torch.arange(before, before + T)


original_reduce_scatter, original_sum = Ranks.reduce_scatter, training.sum_gradients
original_share, original_held = training.indexer_share, gathered.gather_held
FAULTS = {
    "local positions for global": lambda: mock.patch.object(GatheredLayer, "_ranges", local_ranges),
    "padding seen": lambda: mock.patch.object(Zigzag, "in_order", padding_seen),
    "keys in the order of ranks": lambda: mock.patch.object(Zigzag, "in_order", gathered_order),
    "places ignored": lambda: mock.patch.object(gathered, "gather_held", places_ignored),
    "gradient of own rows alone": lambda: mock.patch.object(Ranks, "reduce_scatter", own_gradient),
    "mean of gradients": lambda: mock.patch.object(Ranks, "reduce_scatter", mean_gradient),
    "gradient counted twice": lambda: mock.patch.object(training, "sum_gradients", twice),
    "gradients not summed": lambda: mock.patch.object(training, "sum_gradients", not_at_all),
    "mean over own rows": lambda: mock.patch.object(training, "indexer_share", by_own_rows),
    "merge by mean": lambda: mock.patch.object(sharded, "merge_parts", mean_merge),
    "ties by rank": lambda: mock.patch.object(sharded, "by_place", by_rank),
    "own candidates alone": lambda: mock.patch.object(sharded, "candidates", own_best),
    "every rank keeps all": lambda: mock.patch.object(ShardedLayer, "_own", every_own_place),
}


def planted(fault):
    return FAULTS[fault]() if fault else contextlib.nullcontext()
