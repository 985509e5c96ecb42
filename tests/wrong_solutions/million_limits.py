"""Notebook 14: memory, and the keys that hold most of the attention."""

import math

import torch

from . import wrong

# ------------------------------------------------------------------------------------------------------- most_tokens


@wrong("most_tokens", "one layer")
def bytes_not_tokens(free_bytes, layers, cache_bytes, work_bytes):
    return free_bytes - layers * cache_bytes - work_bytes


@wrong("most_tokens", "one layer")
def a_share(free_bytes, layers, cache_bytes, work_bytes):
    return free_bytes / (layers * cache_bytes + work_bytes)


@wrong("most_tokens", "one layer")
def mebibytes(free_bytes, layers, cache_bytes, work_bytes):
    return (free_bytes >> 20) // (layers * cache_bytes + work_bytes)


@wrong("most_tokens", "all layers")
def one_cache(free_bytes, layers, cache_bytes, work_bytes):
    return max(0, free_bytes // (cache_bytes + work_bytes))


@wrong("most_tokens", "one works")
def all_work_at_once(free_bytes, layers, cache_bytes, work_bytes):
    return max(0, free_bytes // (layers * (cache_bytes + work_bytes)))


@wrong("most_tokens", "one works")
def caches_only(free_bytes, layers, cache_bytes, work_bytes):
    return max(0, free_bytes // (layers * cache_bytes))


@wrong("most_tokens", "one works")
def work_of_one_token(free_bytes, layers, cache_bytes, work_bytes):
    return max(0, (free_bytes - work_bytes) // (layers * cache_bytes))


@wrong("most_tokens", "whole tokens")
def rounded_up(free_bytes, layers, cache_bytes, work_bytes):
    return max(0, math.ceil(free_bytes / (layers * cache_bytes + work_bytes)))


@wrong("most_tokens", "whole tokens")
def through_floats(free_bytes, layers, cache_bytes, work_bytes):
    return max(0, int(free_bytes / (layers * cache_bytes + work_bytes)))


@wrong("most_tokens", "nothing fits")
def fewer_than_none(free_bytes, layers, cache_bytes, work_bytes):
    return free_bytes // (layers * cache_bytes + work_bytes)


@wrong("most_tokens", "nothing fits")
def at_least_one(free_bytes, layers, cache_bytes, work_bytes):
    return max(1, free_bytes // (layers * cache_bytes + work_bytes))


# ------------------------------------------------------------------------------------------------------- needed_keys


def needed(weights, share):
    return int((weights.sort(descending=True).values.cumsum(0) < share).sum()) + 1


@wrong("needed_keys", "one key")
def one_too_few(weights, share):
    return needed(weights, share) - 1


@wrong("needed_keys", "one key")
def a_mean(weights, share):
    return float(share / weights.mean())


@wrong("needed_keys", "one key")
def keys_above_the_share(weights, share):
    return int((weights >= 1 - share).sum()) - 1


@wrong("needed_keys", "one key")
def smallest_first(weights, share):
    return int((weights.sort().values.cumsum(0) < share).sum()) + 1


@wrong("needed_keys", "one key")
def never_written(weights, share):
    return math.nan


@wrong("needed_keys", "largest first")
def in_the_keys_order(weights, share):
    return int((weights.cumsum(0) < share).sum()) + 1


@wrong("needed_keys", "exactly the share")
def more_than_the_share(weights, share):
    return min(len(weights), int((weights.sort(descending=True).values.cumsum(0) <= share).sum()) + 1)


@wrong("needed_keys", "all of it")
def every_key_for_everything(weights, share):
    return len(weights) if share == 1 else needed(weights, share)


@wrong("needed_keys", "a trained model")
def at_most_sixty_four(weights, share):
    return needed(weights.sort(descending=True).values[:64], share)


@wrong("needed_keys", "a trained model")
def in_half_precision(weights, share):
    return needed(weights.to(torch.float16), share)
