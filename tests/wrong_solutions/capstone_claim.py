"""Notebook 16: the ablation, the paired interval, the claim."""

import torch

from . import wrong
from ._changed import changed


def broken(exercise, property, name, *changes):
    wrong(exercise, property)(changed(exercise, name, *changes))


# ------------------------------------------------------------------------------------------------------------ ablate


MEAN = "torch.stack([losses(window, method, k)[first:].double().mean() for window in windows])"
broken("ablate", "table", "one_mean_for_all_windows", (MEAN, MEAN + ".mean()"))
broken("ablate", "table", "by_method_alone", ("(method, k): torch", "method: torch"))
broken("ablate", "table", "never_measured", (MEAN, "torch.zeros(count)"))
broken("ablate", "held out", "training_files", ('corpus["held out"]', 'corpus["training"]'))
broken("ablate", "held out", "both_texts", ('corpus["held out"]', "torch.cat(tuple(corpus.values()))"))
broken("ablate", "windows", "no_byte_left_to_predict", ("start + length + 1]", "start + length]"))
broken(
    "ablate",
    "windows",
    "the_first_windows",
    ("torch.linspace(0, len(text) - length - 1, count).long()", "(torch.arange(count) * length)"),
)
broken(
    "ablate",
    "windows",
    "one_window_many_times",
    ("linspace(0, len(text)", "linspace(len(text) - length - 1, len(text)"),
)
WINDOWS = "    windows = [text[start : start + length + 1] for start in starts]\n"
OTHER = "in [text[s + len(method) : s + len(method) + length + 1] for s in starts[:-1] + [starts[-1] - 40]]]"
broken("ablate", "windows", "different_windows_for_each_method", (WINDOWS, ""), ("in windows]", OTHER))
broken(
    "ablate",
    "paired",
    "windows_in_another_order",
    ("in windows]", "in sorted(windows, key=lambda w: hash((method, k, int(w.sum()))))]"),
)


@wrong("ablate", "paired")
def backwards_for_every_second_method(losses, corpus, methods, ks, count, length):
    text, first, table = corpus["held out"], max(ks), {}
    starts = torch.linspace(0, len(text) - length - 1, count).long().tolist()
    for i, method in enumerate(methods):
        for k in ks:
            order = starts[:: 1 if i % 2 == 0 else -1]
            windows = [text[start : start + length + 1] for start in order]
            table[method, k] = [float(losses(window, method, k)[first:].mean()) for window in windows]
    return table


broken(
    "ablate",
    "equal k",
    "twice_the_keys_for_the_window",
    ("losses(window, method, k)[", 'losses(window, method, 2 * k if method == "window" else k)['),
)
broken("ablate", "equal k", "largest_k_for_all", ("losses(window, method, k)[", "losses(window, method, first)["))
broken("ablate", "bytes that count", "all_bytes", ("[first:]", ""))
broken("ablate", "bytes that count", "from_k_on", ("[first:]", "[k:]"))
broken("ablate", "bytes that count", "one_too_early", ("[first:]", "[first - 1 :]"))
broken("ablate", "bytes that count", "one_too_late", ("[first:]", "[first + 1 :]"))
broken("ablate", "bytes that count", "summed", ("double().mean()", "double().sum()"))
broken("ablate", "bytes that count", "sorted_windows", (MEAN, MEAN + ".sort().values"))


# ------------------------------------------------------------------------------------------------------------ paired


broken("paired", "difference", "sign", ("gap = a - b", "gap = b - a"))
broken("paired", "difference", "median", ("float(gap.mean()), float", "float(gap.median()), float"))
broken("paired", "difference", "interval_alone", ("return float(gap.mean()), ", "return "))
broken(
    "paired",
    "paired",
    "unpaired",
    ("error = gap.std() / len(gap) ** 0.5", "error = ((a.var() + b.var()) / len(a)) ** 0.5"),
)
broken("paired", "paired", "texts_spread", ("error = gap.std()", "error = a.std()"))
broken("paired", "two standard errors", "deviation_of_one_window", (" / len(gap) ** 0.5", ""))
broken("paired", "two standard errors", "one_standard_error", ("2 * error", "error"))
broken("paired", "two standard errors", "divided_by_n", ("gap.std()", "gap.std(correction=0)"))
broken("paired", "two standard errors", "of_many_windows", ("2 * error", "1.96 * error"))
broken("paired", "two standard errors", "upper_end_alone", ("float(gap.mean() - 2 * error)", "float(gap.mean())"))


broken("paired", "difference", "absolute_differences", ("gap = a - b", "gap = (a - b).abs()"))
broken("paired", "difference", "rounded_to_float32", ("gap = a - b", "gap = a.float() - b.float()"))
broken(
    "paired",
    "difference",
    "means_in_float32",
    ("float(gap.mean()), float", "float(a.float().mean() - b.float().mean()), float"),
)
broken(
    "paired",
    "two standard errors",
    "no_end_below_0",
    ("float(gap.mean() - 2 * error)", "max(0.0, float(gap.mean() - 2 * error))"),
)
broken(
    "ablate",
    "equal k",
    "dense_with_all_keys",
    ("losses(window, method, k)", "losses(window, method, length if method == 'dense' else k)"),
)
broken("ablate", "windows", "windows_of_int64", ("losses(window, method, k)", "losses(window.long(), method, k)"))

# ------------------------------------------------------------------------------------------------------------- claim


broken("claim", "fields", "no_interval_field", ('        "interval": (low, high),\n', ""))
broken("claim", "fields", "no_control_field", ('        "control": control,\n', ""))
broken("claim", "fields", "a_k_that_nobody_measured", ('"k": k', '"k": 64'))
broken("claim", "fields", "nothing_was_not_shown", ('"not shown": "That', '"not shown": "" and "That'))
GAPS = "key=lambda k: float((table['window', k] - table['indexer', k]).mean())"
broken(
    "claim", "k beforehand", "the_k_that_came_out_best", ("k, control = 16,", f"k, control = max((8, 16, 32), {GAPS}),")
)
broken("claim", "control", "random_for_a_control", ('k, control = 16, "window"', 'k, control = 16, "random"'))
broken("claim", "control", "dense_for_a_control", ('k, control = 16, "window"', 'k, control = 16, "dense"'))
broken("claim", "control", "oracle_for_a_control", ('k, control = 16, "window"', 'k, control = 16, "attention itself"'))
broken("claim", "losses", "losses_of_another_k", ("float(table[name, k].mean())", "float(table[name, 32].mean())"))
broken("claim", "losses", "typed_numbers", ("float(table[name, k].mean())", "1.46"))
broken("claim", "losses", "best_window_only", ("float(table[name, k].mean())", "float(table[name, k].min())"))
broken("claim", "losses", "dense_left_out", ('("dense", "indexer", control)', '("indexer", control)'))
broken("claim", "interval", "sign_of_the_difference", ('"difference": difference', '"difference": -difference'))
broken(
    "claim", "interval", "no_interval_around_it", ('"interval": (low, high)', '"interval": (difference, difference)')
)
broken("claim", "interval", "interval_none", ('"interval": (low, high)', '"interval": None'))
broken(
    "claim",
    "interval",
    "unpaired_interval",
    ("float(gap.std())", 'float(table[control, k].var() + table["indexer", k].var()) ** 0.5'),
)
broken("claim", "verdict", "better_whatever_it_holds", ('"verdict": verdict', '"verdict": "better"'))
broken("claim", "verdict", "better_by_the_mean_alone", ("if low > 0 else", "if difference > 0 else"))
broken("claim", "words", "always", ("cost {size} less", "always cost {size} less"))
broken("claim", "words", "proves", ('"better": f"With k', '"better": f"This proves that with k'))
broken(
    "claim",
    "words",
    "one_sentence_for_all",
    ("claims[verdict]", 'f"With k = {k}, indexer and window differ by {size}."'),
)
broken("claim", "words", "no_number", ("cost {size} less", "cost less"))
broken(
    "claim",
    "words",
    "k_unsaid",
    ('"better": f"With k = {k}, keys', '"better": f"Keys'),
    ('the last {k} (window).",\n        "worse', 'the last ones (window).",\n        "worse'),
)
broken("claim", "words", "text_unsaid", ("held-out windows", "windows"))
broken("claim", "words", "windows_uncounted", ("{len(gap)} held-out windows", "held-out windows"))
broken("claim", "words", "windows_of_another_day", ("{len(gap)} held-out windows", "six held-out windows"))
broken(
    "claim", "words", "text_not_held_out", ("held-out windows of Python source", "windows, not held out from training")
)
