"""Notebook 00: the last k bytes."""

from . import wrong


@wrong("keep_last", "no future")
def one_too_far(t, k):
    return list(range(max(0, t - k + 2), t + 2))


@wrong("keep_last", "right bytes")
def without_itself(t, k):
    return list(range(max(0, t - k), t))


@wrong("keep_last", "right bytes")
def one_too_many(t, k):
    return list(range(max(0, t - k), t + 1))


@wrong("keep_last", "right bytes")
def the_first_k(t, k):
    return list(range(min(k, t + 1)))


@wrong("keep_last", "right bytes")
def one_of_them_twice(t, k):
    return [*range(max(0, t - k + 2), t + 1), t]


@wrong("keep_last", "start of the text")
def before_the_text(t, k):
    return list(range(t - k + 1, t + 1))


@wrong("keep_last", "start of the text")
def filled_up_with_zeros(t, k):
    return [max(0, position) for position in range(t - k + 1, t + 1)]


@wrong("keep_last", "start of the text")
def nothing_until_there_are_k(t, k):
    return list(range(t - k + 1, t + 1)) if t + 1 >= k else []


@wrong("keep_last", "start of the text")
def t_itself_left_out_of_short_texts(t, k):
    return list(range(t - k + 1, t + 1)) if t + 1 >= k else list(range(t))


@wrong("keep_last", "no future")
def nothing_returned(t, k):
    list(range(max(0, t - k + 1), t + 1))


@wrong("keep_last", "no future")
def halves_of_positions(t, k):
    return [position + 0.5 for position in range(max(0, t - k + 1), t + 1)]
