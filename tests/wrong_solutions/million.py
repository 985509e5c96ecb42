"""Notebook 14: money, a chunk's model, half the cost. `million_limits` has memory and k."""

import math

import numpy as np

from dsa_ref import V32, cost

from . import wrong

# ----------------------------------------------------------------------------------------------------------- dollars


@wrong("dollars", "a chunk")
def milliseconds_as_seconds(ms, tokens, layers, price):
    return ms * layers / tokens * 1e6 / 3600 * price


@wrong("dollars", "a chunk")
def a_price_a_second(ms, tokens, layers, price):
    return ms / 1e3 * layers / tokens * 1e6 * price


@wrong("dollars", "a chunk")
def for_a_thousand(ms, tokens, layers, price):
    return ms / 1e3 * layers / tokens * 1e3 / 3600 * price


@wrong("dollars", "a chunk")
def for_the_call(ms, tokens, layers, price):
    return ms / 1e3 * layers / 3600 * price


@wrong("dollars", "a chunk")
def printed_only(ms, tokens, layers, price):
    return None


@wrong("dollars", "layers")
def one_layer(ms, tokens, layers, price):
    return ms / 1e3 / tokens * 1e6 / 3600 * price


@wrong("dollars", "layers")
def a_gpu_a_layer_in_half_the_time(ms, tokens, layers, price):
    return ms / 1e3 * (layers + 1) / 2 / tokens * 1e6 / 3600 * price


@wrong("dollars", "price")
def two_dollars(ms, tokens, layers, price):
    return ms / 1e3 * layers / tokens * 1e6 / 3600 * 2.0


@wrong("dollars", "price")
def whole_dollars_an_hour(ms, tokens, layers, price):
    return ms / 1e3 * layers / tokens * 1e6 / 3600 * int(price)


@wrong("dollars", "a step")
def calls_rounded_up_from_thousands(ms, tokens, layers, price):
    return ms / 1e3 * layers / max(tokens, 1000) * 1e6 / 3600 * price


# ---------------------------------------------------------------------------------------------------------- chunk_ms

SIZES = cost.matrices(V32)
INDEXER = SIZES["index_q"] + SIZES["index_k"] + SIZES["index_weights"]


def model(T, S, speed, rest_ms, **changed):
    """The right answer, with some counts replaced: products, dense_products, scores, sparse, dense: FLOPs."""
    work = cost.prefill_cost(V32, T, S)
    every = 2 * T * sum(SIZES.values())
    flops = {
        "products": every, "dense_products": every - 2 * T * INDEXER, "scores": work.indexer, "sparse": work.sparse,
        "dense": work.dense,
    } | changed  # fmt: skip
    dsa = flops["products"] / speed["products"] + flops["scores"] / speed["scores"] + flops["sparse"] / speed["sparse"]
    dense = flops["dense_products"] / speed["products"] + flops["dense"] / speed["heads"]
    return 1e3 * dsa + rest_ms, 1e3 * dense + rest_ms


@wrong("chunk_ms", "products")
def one_flop_a_multiply_and_add(T, S, speed, rest_ms):
    return model(T, S, speed, rest_ms, products=T * sum(SIZES.values()))


@wrong("chunk_ms", "products")
def old_tokens_again(T, S, speed, rest_ms):
    return model(T, S, speed, rest_ms, products=2 * S * sum(SIZES.values()))


@wrong("chunk_ms", "products")
def without_the_indexers_matrices(T, S, speed, rest_ms):
    return model(T, S, speed, rest_ms, products=2 * T * (sum(SIZES.values()) - INDEXER))


@wrong("chunk_ms", "products")
def seconds(T, S, speed, rest_ms):
    dsa, dense = model(T, S, speed, 0.0)
    return dsa / 1e3 + rest_ms, dense / 1e3 + rest_ms


@wrong("chunk_ms", "products")
def the_longest_part_only(T, S, speed, rest_ms):
    return rest_ms, rest_ms


@wrong("chunk_ms", "products")
def one_number(T, S, speed, rest_ms):
    return model(T, S, speed, rest_ms)[0]


@wrong("chunk_ms", "scores")
def indexer_scores_k_keys(T, S, speed, rest_ms):
    return model(T, S, speed, rest_ms, scores=cost.index_flops_per_pair(V32) * T * V32.index_topk)


@wrong("chunk_ms", "scores")
def the_future_is_scored(T, S, speed, rest_ms):
    return model(T, S, speed, rest_ms, scores=cost.index_flops_per_pair(V32) * T * S)


@wrong("chunk_ms", "scores")
def the_indexer_is_free(T, S, speed, rest_ms):
    return model(T, S, speed, rest_ms, scores=0)


@wrong("chunk_ms", "scores")
def one_index_head(T, S, speed, rest_ms):
    return model(T, S, speed, rest_ms, scores=2 * V32.index_head_dim * cost.causal_pairs(T, S))


@wrong("chunk_ms", "attention")
def sparse_on_every_key(T, S, speed, rest_ms):
    return model(T, S, speed, rest_ms, sparse=cost.prefill_cost(V32, T, S).dense_mqa)


@wrong("chunk_ms", "attention")
def sparse_in_mha_mode(T, S, speed, rest_ms):
    return model(T, S, speed, rest_ms, sparse=cost.mha_flops_per_pair(V32) * T * V32.index_topk)


@wrong("chunk_ms", "dense")
def dense_in_mqa_mode(T, S, speed, rest_ms):
    return model(T, S, speed, rest_ms, dense=cost.prefill_cost(V32, T, S).dense_mqa)


@wrong("chunk_ms", "dense")
def dense_not_causal(T, S, speed, rest_ms):
    return model(T, S, speed, rest_ms, dense=cost.mha_flops_per_pair(V32) * T * S)


@wrong("chunk_ms", "dense")
def dense_with_an_indexer(T, S, speed, rest_ms):
    return model(T, S, speed, rest_ms, dense_products=2 * T * sum(SIZES.values()))


@wrong("chunk_ms", "rest")
def nothing_else(T, S, speed, rest_ms):
    return model(T, S, speed, 0.0)


@wrong("chunk_ms", "rest")
def the_rest_for_dsa_only(T, S, speed, rest_ms):
    return model(T, S, speed, rest_ms)[0], model(T, S, speed, 0.0)[1]


@wrong("chunk_ms", "within 10 % of the record")
def to_ten_milliseconds(T, S, speed, rest_ms):
    if math.inf in speed.values():
        return model(T, S, speed, rest_ms)
    return tuple(round(ms, -1) for ms in model(T, S, speed, rest_ms))


# --------------------------------------------------------------------------------------------------------- half_from


def first(tokens, reached):
    return next((n for n, yes in zip(tokens, reached, strict=True) if yes), None)


def marginal(tokens, dsa, dense):
    return first(tokens, [2 * a <= b for a, b in zip(dsa, dense, strict=True)])


def whole(tokens, dsa, dense):
    return marginal(tokens, np.cumsum(dsa), np.cumsum(dense))


@wrong("half_from", "marginal")
def the_other_way_round(tokens, dsa, dense):
    return whole(tokens, dsa, dense), marginal(tokens, dsa, dense)


@wrong("half_from", "marginal")
def equal_instead_of_half(tokens, dsa, dense):
    return first(tokens, [a <= b for a, b in zip(dsa, dense, strict=True)]), whole(tokens, dsa, dense)


@wrong("half_from", "marginal")
def the_number_of_the_chunk(tokens, dsa, dense):
    numbers = range(len(tokens))
    return marginal(numbers, dsa, dense), whole(numbers, dsa, dense)


@wrong("half_from", "marginal")
def dense_is_half(tokens, dsa, dense):
    return marginal(tokens, dense, dsa), whole(tokens, dense, dsa)


@wrong("half_from", "marginal")
def the_last_chunk(tokens, dsa, dense):
    return tokens[-1], whole(tokens, dsa, dense)


@wrong("half_from", "whole prompt")
def marginal_twice(tokens, dsa, dense):
    return (marginal(tokens, dsa, dense),) * 2


@wrong("half_from", "whole prompt")
def the_mean_of_ratios(tokens, dsa, dense):
    ratios = np.cumsum(np.array(dsa) / np.array(dense)) / np.arange(1, len(dsa) + 1)
    return marginal(tokens, dsa, dense), first(tokens, ratios <= 0.5)


@wrong("half_from", "whole prompt")
def only_dense_added_up(tokens, dsa, dense):
    return marginal(tokens, dsa, dense), marginal(tokens, dsa, np.cumsum(dense))


@wrong("half_from", "exactly half")
def less_than_half(tokens, dsa, dense):
    sums = np.cumsum(dsa), np.cumsum(dense)
    return tuple(
        first(tokens, [2 * a < b for a, b in zip(*pair, strict=True)]) for pair in ((dsa, dense), sums)
    )  # fmt: skip


@wrong("half_from", "never")
def the_end_if_never(tokens, dsa, dense):
    return tuple(found or tokens[-1] for found in (marginal(tokens, dsa, dense), whole(tokens, dsa, dense)))


@wrong("half_from", "never")
def infinite_if_never(tokens, dsa, dense):
    return tuple(found or math.inf for found in (marginal(tokens, dsa, dense), whole(tokens, dsa, dense)))


@wrong("half_from", "a recorded prompt")
def tens_of_milliseconds(tokens, dsa, dense):
    if len(tokens) > 10:
        dsa, dense = [round(a, -1) for a in dsa], [round(b, -1) for b in dense]
    return marginal(tokens, dsa, dense), whole(tokens, dsa, dense)


@wrong("half_from", "a recorded prompt")
def the_first_six(tokens, dsa, dense):
    return marginal(tokens[:6], dsa[:6], dense[:6]), whole(tokens[:6], dsa[:6], dense[:6])
