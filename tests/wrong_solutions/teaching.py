"""Notebook 13: the target, and how far a guess is from it. `teaching_gradients` has the rest."""

import torch

from . import wrong

# --------------------------------------------------------------------------------------------------------- kl_target


def logits_of(q, kv, scale):
    return torch.einsum("thd,sd->ths", q, kv) * scale


def seen_by(q, kv):
    return torch.ones(len(q), len(kv), dtype=torch.bool).tril(len(kv) - len(q))[:, None]


def target(q, kv, scale):
    return logits_of(q, kv, scale).masked_fill(~seen_by(q, kv), -torch.inf).softmax(dim=-1).mean(dim=1)


@wrong("kl_target", "future hidden")
def future_in_the_target(q, kv, scale):
    return logits_of(q, kv, scale).softmax(dim=-1).mean(dim=1)


@wrong("kl_target", "future hidden")
def future_hidden_after_the_softmax(q, kv, scale):
    return (logits_of(q, kv, scale).softmax(dim=-1) * seen_by(q, kv)).mean(dim=1)


@wrong("kl_target", "future hidden")
def own_token_hidden(q, kv, scale):
    seen = torch.ones(len(q), len(kv), dtype=torch.bool).tril(len(kv) - len(q) - 1)[:, None]
    return logits_of(q, kv, scale).masked_fill(~seen, -1e30).softmax(dim=-1).mean(dim=1)


@wrong("kl_target", "future hidden")
def softmax_over_heads(q, kv, scale):
    return (logits_of(q, kv, scale).softmax(dim=1) * seen_by(q, kv)).mean(dim=1)


@wrong("kl_target", "future hidden")
def softmax_over_queries(q, kv, scale):
    return logits_of(q, kv, scale).masked_fill(~seen_by(q, kv), -torch.inf).softmax(dim=0).mean(dim=1)


@wrong("kl_target", "future hidden")
def logits_only(q, kv, scale):
    return logits_of(q, kv, scale).mean(dim=1) * seen_by(q, kv)[:, 0]


@wrong("kl_target", "future hidden")
def printed_only(q, kv, scale):
    target(q, kv, scale)


@wrong("kl_target", "queries come last")
def queries_first_in_a_long_chunk(q, kv, scale):
    seen = torch.ones(len(q), len(kv), dtype=torch.bool).tril(0 if 2 * len(q) > len(kv) else len(kv) - len(q))
    return logits_of(q, kv, scale).masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1).mean(dim=1)


@wrong("kl_target", "queries come last")
def an_even_number_of_keys_before(q, kv, scale):
    before = len(kv) - len(q)
    seen = torch.ones(len(q), len(kv), dtype=torch.bool).tril(before if before < 2 else before // 2 * 2)
    return logits_of(q, kv, scale).masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1).mean(dim=1)


@wrong("kl_target", "scale")
def no_scale(q, kv, scale):
    return target(q, kv, 1.0)


@wrong("kl_target", "scale")
def a_scale_of_its_own(q, kv, scale):
    return target(q, kv, q.shape[2] ** -0.5 if scale != 1.0 else 1.0)


@wrong("kl_target", "scale")
def scaled_weights(q, kv, scale):
    return target(q, kv, 1.0) * scale


@wrong("kl_target", "mean over heads")
def sum_over_heads(q, kv, scale):
    return target(q, kv, scale) * q.shape[1]


@wrong("kl_target", "mean over heads")
def mean_of_the_queries(q, kv, scale):
    return target(q.mean(dim=1, keepdim=True), kv, scale)


@wrong("kl_target", "mean over heads")
def sum_of_the_logits(q, kv, scale):
    return target(q.sum(dim=1, keepdim=True), kv, scale)


@wrong("kl_target", "mean over heads")
def one_softmax_for_all_heads(q, kv, scale):
    logits = logits_of(q, kv, scale).masked_fill(~seen_by(q, kv), -torch.inf)
    return logits.flatten(1).softmax(dim=1).unflatten(1, logits.shape[1:]).sum(dim=1)


@wrong("kl_target", "mean over heads")
def the_first_head(q, kv, scale):
    return target(q[:, :1], kv, scale)


@wrong("kl_target", "mean over heads")
def the_largest_over_heads(q, kv, scale):
    weights = logits_of(q, kv, scale).masked_fill(~seen_by(q, kv), -torch.inf).softmax(dim=-1).amax(dim=1)
    return weights / weights.sum(dim=1, keepdim=True)


@wrong("kl_target", "queries come last")
def query_t_at_position_t(q, kv, scale):
    seen = torch.ones(len(q), len(kv), dtype=torch.bool).tril()[:, None]
    return logits_of(q, kv, scale).masked_fill(~seen, -torch.inf).softmax(dim=-1).mean(dim=1)


@wrong("kl_target", "large logits")
def not_shifted(q, kv, scale):
    exponentials = logits_of(q, kv, scale).exp() * seen_by(q, kv)
    return (exponentials / exponentials.sum(dim=-1, keepdim=True)).mean(dim=1)


@wrong("kl_target", "large logits")
def one_shift_for_all_heads(q, kv, scale):
    logits = logits_of(q, kv, scale).masked_fill(~seen_by(q, kv), -torch.inf)
    exponentials = (logits - logits.amax(dim=(1, 2), keepdim=True)).exp()
    return (exponentials / exponentials.sum(dim=-1, keepdim=True)).mean(dim=1)


@wrong("kl_target", "trained model")
def eight_is_too_many(q, kv, scale):
    return target(q[:, :4], kv, scale)


# ----------------------------------------------------------------------------------------------------------- kl_loss


def mask_of(indices, S):
    mask = torch.zeros(len(indices), S + 1, dtype=torch.bool)
    return mask.scatter(1, torch.where(indices < 0, S, indices).long(), True)[:, :S]


def loss(scores, p, mask, weigh="p", rows=None, renormalise_p=True):
    p = p.masked_fill(~mask, 0.0)
    if renormalise_p:
        p = p / p.sum(dim=1, keepdim=True).clamp(min=1e-300)
    log_p = torch.where(p > 0, p, 1.0).log()
    log_guess = scores.masked_fill(~mask, -torch.inf).log_softmax(dim=1).masked_fill(~mask, 0.0)
    if weigh == "guess":
        log_p, log_guess, p = log_guess, log_p, log_guess.exp() * mask
    alive = int(mask.any(dim=1).sum())
    return (p * (log_p - log_guess)).sum() / max(1, alive if rows is None else rows)


@wrong("kl_loss", "every key")
def reversed_kl(scores, p, indices):
    return loss(scores, p, mask_of(indices, scores.shape[1]), weigh="guess")


@wrong("kl_loss", "every key")
def cross_entropy(scores, p, indices):
    mask = mask_of(indices, scores.shape[1])
    guess = scores.masked_fill(~mask, -torch.inf).log_softmax(dim=1).masked_fill(~mask, 0.0)
    return -(p * guess).sum() / len(p)


@wrong("kl_loss", "every key")
def the_other_sign(scores, p, indices):
    return -loss(scores, p, mask_of(indices, scores.shape[1]))


@wrong("kl_loss", "every key")
def sum_over_rows(scores, p, indices):
    return loss(scores, p, mask_of(indices, scores.shape[1]), rows=1)


@wrong("kl_loss", "every key")
def in_bits(scores, p, indices):
    return loss(scores, p, mask_of(indices, scores.shape[1])) / torch.tensor(2.0).log()


@wrong("kl_loss", "every key")
def scores_without_softmax(scores, p, indices):
    mask = mask_of(indices, scores.shape[1])
    return (p * (p.clamp(min=1e-30).log() - scores.masked_fill(~mask, 0.0))).sum() / len(p)


@wrong("kl_loss", "every key")
def squares(scores, p, indices):
    return ((scores.softmax(dim=1) - p) ** 2).sum(dim=1).mean()


@wrong("kl_loss", "selected keys alone")
def on_every_visible_key(scores, p, indices):
    return loss(scores, p, ~scores.isinf())


@wrong("kl_loss", "selected keys alone")
def target_not_renormalised(scores, p, indices):
    return loss(scores, p, mask_of(indices, scores.shape[1]), renormalise_p=False)


@wrong("kl_loss", "selected keys alone")
def guess_not_renormalised(scores, p, indices):
    mask = mask_of(indices, scores.shape[1])
    p = p * mask / (p * mask).sum(dim=1, keepdim=True)
    terms = torch.xlogy(p, p) - p * scores.log_softmax(dim=1).masked_fill(~mask, 0.0)
    return terms.sum(dim=1).mean()


@wrong("kl_loss", "selected keys alone")
def neither_renormalised(scores, p, indices):
    mask = mask_of(indices, scores.shape[1])
    terms = torch.xlogy(p, p) - p * scores.log_softmax(dim=1).masked_fill(~mask, 0.0)
    return (terms * mask).sum(dim=1).mean()


@wrong("kl_loss", "selected keys alone")
def minus_one_is_the_last_key(scores, p, indices):
    total, rows = 0.0, 0
    for t in range(len(p)):
        keys = indices[t].unique().long()
        keys = keys[~scores[t, keys].isinf()]
        if (indices[t] >= 0).any():
            target = p[t, keys] / p[t, keys].sum()
            total += (torch.xlogy(target, target) - target * scores[t, keys].log_softmax(dim=0)).sum()
            rows += 1
    return total / max(rows, 1)


@wrong("kl_loss", "zero in the target")
def log_of_zero(scores, p, indices):
    mask = mask_of(indices, scores.shape[1])
    total, rows = 0.0, 0
    for t in range(len(p)):
        if mask[t].any():
            target = p[t, mask[t]] / p[t, mask[t]].sum()
            total += (target * (target.log() - scores[t, mask[t]].log_softmax(dim=0))).sum()
            rows += 1
    return total / max(rows, 1)


def on_eight_bits(scores, p, indices):
    return loss(scores, p, mask_of(indices.to(torch.int8).int(), scores.shape[1]))


def on_sixteen_bits(scores, p, indices):
    return loss(scores, p, mask_of(indices.to(torch.int16).int(), scores.shape[1]))


for bits in (on_eight_bits, on_sixteen_bits):
    wrong("kl_loss", "selected keys alone")(bits)


@wrong("kl_loss", "selected keys alone")
def a_row_is_empty_if_it_begins_with_none(scores, p, indices):
    rows = indices[:, 0] >= 0
    return loss(scores[rows], p[rows], mask_of(indices[rows], scores.shape[1]))


@wrong("kl_loss", "empty rows")
def the_first_empty_row_ends_it(scores, p, indices):
    rows = (indices >= 0).any(dim=1).cumprod(dim=0).bool()
    return loss(scores[rows], p[rows], mask_of(indices[rows], scores.shape[1]))


@wrong("kl_loss", "zero in the target")
def a_thousandth_added(scores, p, indices):
    return loss(scores, p + 1e-3 * (p == 0), mask_of(indices, scores.shape[1]))


@wrong("kl_loss", "empty rows")
def divided_by_the_padded_length(scores, p, indices):
    return loss(scores, p, mask_of(indices, scores.shape[1]), rows=len(p))


@wrong("kl_loss", "empty rows")
def no_row_at_all(scores, p, indices):
    mask = mask_of(indices, scores.shape[1])
    return loss(scores, p, mask, rows=1) / mask.any(dim=1).sum()


@wrong("kl_loss", "large scores")
def not_shifted_either(scores, p, indices):
    mask = mask_of(indices, scores.shape[1])
    p = p * mask / (p * mask).sum(dim=1, keepdim=True).clamp(min=1e-300)
    lse = (scores.exp() * mask).sum(dim=1).clamp(min=1e-300).log()
    log_guess = (scores - lse[:, None]).masked_fill(~mask, 0.0)
    return (torch.xlogy(p, p) - p * log_guess).sum() / mask.any(dim=1).sum().clamp(min=1)


@wrong("kl_loss", "large scores")
def log_of_the_softmax(scores, p, indices):
    mask = mask_of(indices, scores.shape[1])
    p = p * mask / (p * mask).sum(dim=1, keepdim=True).clamp(min=1e-300)
    guess = scores.masked_fill(~mask, -torch.inf).softmax(dim=1).nan_to_num().clamp(min=1e-30)
    return (torch.xlogy(p, p) - p * guess.log()).sum() / mask.any(dim=1).sum().clamp(min=1)


@wrong("kl_loss", "trained model")
def the_first_hundred_numbers(scores, p, indices):
    return loss(scores, p, mask_of(indices[:, :40], scores.shape[1]))


# ----------------------------------------------------------------------------------------------------------- verdict


def sides(ratios, errors, above, below):
    return (1 if above else 0) - (1 if below else 0) if len(ratios) > 1 else 0


@wrong("verdict", "clear cases")
def the_ratio_against_nothing(ratios, errors):
    return int(all(ratio > 2 * error for ratio, error in zip(ratios, errors, strict=True)))


@wrong("verdict", "clear cases")
def never_below(ratios, errors):
    return int(len(ratios) > 1 and all(r - 2 * e > 1 for r, e in zip(ratios, errors, strict=True)))


@wrong("verdict", "clear cases")
def the_sign_turned(ratios, errors):
    both = list(zip(ratios, errors, strict=True))
    return sides(ratios, errors, all(r + 2 * e < 1 for r, e in both), all(r - 2 * e > 1 for r, e in both))


@wrong("verdict", "two errors")
def whatever_is_above_one(ratios, errors):
    return sides(ratios, errors, all(r > 1 for r in ratios), all(r < 1 for r in ratios))


@wrong("verdict", "two errors")
def one_error(ratios, errors):
    both = list(zip(ratios, errors, strict=True))
    return sides(ratios, errors, all(r - e > 1 for r, e in both), all(r + e < 1 for r, e in both))


@wrong("verdict", "two errors")
def three_errors(ratios, errors):
    both = list(zip(ratios, errors, strict=True))
    return sides(ratios, errors, all(r - 3 * e > 1 for r, e in both), all(r + 3 * e < 1 for r, e in both))


@wrong("verdict", "two errors")
def one_percent_for_all(ratios, errors):
    return sides(ratios, errors, all(r > 1.01 for r in ratios), all(r < 0.99 for r in ratios))


def verdict_by(ratios, errors, errors_away=2.0):
    both = list(zip(ratios, errors, strict=True))
    above, below = (all(side * (r - 1) > errors_away * e for r, e in both) for side in (1, -1))
    return sides(ratios, errors, above, below)


@wrong("verdict", "two errors")
def a_normal_quantile(ratios, errors):
    return verdict_by(ratios, errors, 1.96)


@wrong("verdict", "two errors")
def just_two_errors(ratios, errors):
    both = list(zip(ratios, errors, strict=True))
    return sides(ratios, errors, all(r - 2 * e >= 1 for r, e in both), all(r + 2 * e <= 1 for r, e in both))


@wrong("verdict", "two errors")
def errors_times_the_ratio(ratios, errors):
    return verdict_by(ratios, [r * e for r, e in zip(ratios, errors, strict=True)])


@wrong("verdict", "two errors")
def errors_over_the_ratio(ratios, errors):
    return verdict_by(ratios, [e / r for r, e in zip(ratios, errors, strict=True)])


@wrong("verdict", "two errors")
def errors_that_seeds_shrink(ratios, errors):
    return verdict_by(ratios, [e / len(errors) ** 0.5 for e in errors])


@wrong("verdict", "every seed")
def any_seed(ratios, errors):
    both = list(zip(ratios, errors, strict=True))
    return sides(ratios, errors, any(r - 2 * e > 1 for r, e in both), any(r + 2 * e < 1 for r, e in both))


@wrong("verdict", "every seed")
def the_mean_of_the_seeds(ratios, errors):
    r, e = sum(ratios) / len(ratios), sum(errors) / len(errors)
    return sides(ratios, errors, r - 2 * e > 1, r + 2 * e < 1)


@wrong("verdict", "every seed")
def the_first_seed(ratios, errors):
    return sides(ratios, errors, ratios[0] - 2 * errors[0] > 1, ratios[0] + 2 * errors[0] < 1)


@wrong("verdict", "each seed's own error")
def the_least_error(ratios, errors):
    e = min(errors)
    return sides(ratios, errors, all(r - 2 * e > 1 for r in ratios), all(r + 2 * e < 1 for r in ratios))


@wrong("verdict", "each seed's own error")
def the_mean_error(ratios, errors):
    e = sum(errors) / len(errors)
    return sides(ratios, errors, all(r - 2 * e > 1 for r in ratios), all(r + 2 * e < 1 for r in ratios))


@wrong("verdict", "each seed's own error")
def the_largest_error(ratios, errors):
    return verdict_by(ratios, [max(errors)] * len(errors))


@wrong("verdict", "each seed's own error")
def both_lists_sorted(ratios, errors):
    return verdict_by(sorted(ratios), sorted(errors))


@wrong("verdict", "each seed's own error")
def the_error_of_the_seed_before(ratios, errors):
    return verdict_by(ratios, errors[-1:] + errors[:-1])


@wrong("verdict", "one seed")
def a_single_seed_decides(ratios, errors):
    both = list(zip(ratios, errors, strict=True))
    return int(all(r - 2 * e > 1 for r, e in both)) - int(all(r + 2 * e < 1 for r, e in both))


@wrong("verdict", "one seed")
def three_seeds_at_least(ratios, errors):
    both = list(zip(ratios, errors, strict=True))
    found = sides(ratios, errors, all(r - 2 * e > 1 for r, e in both), all(r + 2 * e < 1 for r, e in both))
    return found if len(ratios) > 2 else 0
