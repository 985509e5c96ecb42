"""Are selections of long rows exactly the contract's? `python -m dsa_bench.exact [--log FILE]`, on a GPU.

`select_topk` on 10,240 rows of 128K scores, as many of 1M and 1,200 of 4M from four distributions, and
`lightning_select` on at least as many rows whose key scales follow the same four shapes, are compared with
`dsa_ref.select_topk`, row for row, as sets. Then rows that hurt, of both: ties, equal scores, rows shorter than k, all
winners in one list, side by side, or beside the sample. And 100 runs must give the same bits. Exit code 1 if anything
differs.
"""

import argparse
import sys

import torch

import dsa_kernels
import dsa_ref
from dsa_kernels.topk.sample import sampled_keys
from dsa_ref.records import output_file, write_log

from . import inputs, measure
from .cases import K
from .checks import PAIRS_AT_ONCE

LONG = {131072: 2560, 1 << 20: 2560, 1 << 22: 300}  # keys: rows of each distribution
FUSED_ROWS = 512  # enough for the fused kernel to be chosen
MANY_ROWS = 300  # enough for the top-k of many rows to be chosen
REPEATS = 100


def differing(got, want):
    """How many rows differ as sets."""
    return int((got.sort(dim=1).values != want.sort(dim=1).values).any(dim=1).sum())


def selected_wrong(scores, ranges):
    """How many rows of `select_topk` differ from the reference's, which takes some at a time."""
    got = dsa_kernels.select_topk(scores, K, *ranges)
    parts = torch.arange(len(scores)).split(max(1, PAIRS_AT_ONCE // scores.shape[1]))
    rows = [slice(int(part[0]), int(part[-1]) + 1) for part in parts]
    return sum(differing(got[r], dsa_ref.select_topk(scores[r], K, *(x[r] for x in ranges))) for r in rows)


def selection_rows(distribution, S, rows):
    """(rows, rows that differ) of `select_topk`, in blocks of its own seed."""
    wrong, at_once = 0, max(MANY_ROWS, PAIRS_AT_ONCE // S)
    for seed, first in enumerate(range(0, rows, at_once)):
        count = min(at_once, rows - first)
        wrong += selected_wrong(inputs.score_matrix(distribution, count, S, seed=seed), inputs.causal_ranges(count, S))
    return rows, wrong


def fused_rows(given, ranges):
    """(rows, rows that differ) of `lightning_select`, against the reference's choice from the kernels' own scores."""
    q_idx, k_idx, w, k_scale = given
    got = dsa_kernels.lightning_select(q_idx, k_idx, w, K, k_scale, *ranges)
    wrong, at_once = 0, PAIRS_AT_ONCE // len(k_idx)
    for first in range(0, len(q_idx), at_once):
        part = slice(first, first + at_once)
        bounds = [x[part] for x in ranges]
        scores = dsa_kernels.index_scores(q_idx[part], k_idx, w[part], k_scale, *bounds, variant="portable")
        wrong += differing(got[part], dsa_ref.select_topk(scores, K, *bounds))
    return len(q_idx), wrong


def shaped(distribution, T, S, seed):
    """Inputs whose key scales follow a distribution's shape, so that the scores do."""
    q_idx, k_idx, w, k_scale = inputs.indexer_inputs(T, S, seed=seed)
    generator = torch.Generator("cuda").manual_seed(seed)
    uniform = torch.rand(S, generator=generator, device="cuda")
    if distribution == "bursty":
        k_scale = k_scale * torch.where(uniform[::128].repeat_interleave(128)[:S] < 1 / 64, 5.0, 1.0)
    elif distribution == "recency":
        k_scale = k_scale * (1 + 6 * torch.exp((torch.arange(S, device="cuda") - S) / 2048.0))
        k_scale[:4] *= 8
    elif distribution == "heavy-tailed":
        k_scale = k_scale / uniform.clamp(min=1e-7).pow(1 / 3)
    return q_idx, k_idx, w, k_scale


def short_ranges(T, S):
    """Rows from a random key on, each nine keys longer than the one before, the last ones longer than k."""
    start = torch.randint(0, S, (T,), device="cuda", dtype=torch.int32)
    return start, torch.minimum(start + torch.arange(T, device="cuda", dtype=torch.int32) * 9, start * 0 + S)


def hard_scores(T=FUSED_ROWS, S=1 << 20):
    """{name: (scores, ranges)} that defeat a sample or a list of `select_topk`, or tie."""
    scores = inputs.score_matrix("independent", T, S)
    key, causal = torch.arange(S, device="cuda"), inputs.causal_ranges(T, S)
    return {
        "ties": (scores.mul(4).round(), causal),
        "all scores equal": (torch.zeros_like(scores), causal),
        "rows shorter than k": (scores, short_ranges(T, S)),
        "winners in one list": (scores + 100 * (key % 128 == 5), causal),
        "winners side by side": (scores + 100 * (key // 4096 == S // 8192), causal),
    }


def hard_cases(T=FUSED_ROWS, S=65536):
    """{name: (inputs, ranges)} that defeat a sample or a list of `lightning_select`, or tie."""
    q_idx, k_idx, w, k_scale = inputs.indexer_inputs(T, S)
    key = torch.arange(S, device="cuda")
    beside = torch.ones(S, dtype=torch.bool, device="cuda")
    nobody = torch.zeros(1, dtype=torch.int32, device="cuda")
    beside[sampled_keys(k_idx, key.float(), nobody, nobody)[1].long()] = False  # scales number the keys here
    beside &= key % 24 == 0
    causal = inputs.causal_ranges(T, S)
    few = (k_idx.float() > 100).to(k_idx.dtype), torch.ones_like(k_scale)
    positive = w.abs()
    return {
        "ties": ((q_idx, few[0], w.sign(), few[1]), causal),
        "all scores equal": ((q_idx, k_idx, torch.zeros_like(w), k_scale), causal),
        "rows shorter than k": ((q_idx, k_idx, w, k_scale), short_ranges(T, S)),
        "winners in one list": ((q_idx, k_idx, positive, k_scale * torch.where(key % 64 == 5, 64.0, 1.0)), causal),
        "winners beside the sample": ((q_idx, k_idx, positive, k_scale * torch.where(beside, 64.0, 1.0)), causal),
    }


def same_bits():
    """How many of REPEATS further runs differ from the first, of either step."""
    q_idx, k_idx, w, k_scale = inputs.indexer_inputs(FUSED_ROWS, 65536)
    scores = inputs.score_matrix("independent", MANY_ROWS, 131072)
    calls = {
        "lightning_select": lambda: dsa_kernels.lightning_select(q_idx, k_idx, w, K, k_scale),
        "select_topk": lambda: dsa_kernels.select_topk(scores, K),
    }
    first = {name: call() for name, call in calls.items()}
    return {name: sum(not torch.equal(first[name], call()) for _ in range(REPEATS)) for name, call in calls.items()}


@torch.no_grad()
def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dsa_bench.exact", description="Compare long selections.")
    parser.add_argument("--log", type=output_file, help="JSON to write")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("dsa_bench.exact compares on a CUDA GPU, and torch finds none here.", file=sys.stderr)
        return 2
    found = []

    def note(step, case, rows, wrong):
        found.append({"step": step, "case": case, "rows": rows, "differing": wrong})
        print(f"{step:<17} {case:<40} {rows:>6} rows, {wrong} differ", flush=True)

    for S, rows in LONG.items():
        for seed, distribution in enumerate(inputs.DISTRIBUTIONS):
            note("select_topk", f"{distribution}, {S} keys", *selection_rows(distribution, S, rows))
            count = max(rows, FUSED_ROWS)
            given = shaped(distribution, count, S, seed)
            note("lightning_select", f"{distribution}, {S} keys", *fused_rows(given, inputs.causal_ranges(count, S)))
    for name, (scores, ranges) in hard_scores().items():
        note("select_topk", name, len(scores), selected_wrong(scores, ranges))
    for name, (given, ranges) in hard_cases().items():
        note("lightning_select", name, *fused_rows(given, ranges))
    for step, wrong in same_bits().items():
        note(step, f"the same bits in {REPEATS} more runs", REPEATS, wrong)
    if options.log:
        record = {"provenance": measure.environment(arguments, "dsa_bench.exact"), "cases": found}
        write_log("dsa_bench.exact", options.log, record)
    return int(any(case["differing"] for case in found))


if __name__ == "__main__":
    sys.exit(main())
