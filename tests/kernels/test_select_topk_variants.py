"""The four ways behind `dsa_kernels.select_topk`: each is exact alone, and those that sample when their luck fails."""

import pytest
import rungs
import torch
from conftest import NEEDS_TRITON
from inputs import best, causal, normal, small_integers

if rungs.has_triton():
    import dsa_kernels

pytestmark = pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)

S = 6000  # more than a list holds, so that the bound matters
HOPPER = pytest.param("hopper", marks=pytest.mark.hopper)


def launch(variant, scores, k, start, end):
    return dsa_kernels.select_topk(scores, k, start, end, variant=variant)


def ends_early(T, device):
    """Ranges that begin and end inside the row; the last is shorter than k."""
    start = torch.arange(3, 3 + T, dtype=torch.int32, device=device)
    end = torch.full_like(start, S - 7)
    end[-1] = start[-1] + 20
    return start, end


def luckless(winners_sampled, k, n=20_000, CAP=4096, SAMPLE=8192):
    """One row whose sample misleads: all its large scores lie where the sample looks, or all where it does not.

    The list that the sample's bound would make is too short, or too long; asserted here, as the kernel computes it.
    """
    place = torch.arange(SAMPLE) // 8 * n // (SAMPLE // 8) + torch.arange(SAMPLE) % 8
    scores = normal(1, n)
    if winners_sampled:
        scores[0, place[: k * 3 // 4]] += 100
    else:
        scores += 100
        scores[0, place] -= 100
    bound = scores[0, place].sort(descending=True).values[int((k * CAP) ** 0.5 * SAMPLE / n)]
    count = int((scores >= bound).sum())
    assert count < k if winners_sampled else count > CAP
    return scores


CASES = {
    "normal": lambda T: normal(T, S),
    "many ties": lambda T: small_integers(T, S),
    "constant": lambda T: torch.zeros(T, S),
    "zeros of both signs": lambda T: torch.where(normal(T, S) > 0, 0.0, -0.0),
    "minus infinity": lambda T: normal(T, S).masked_fill(normal(T, S, seed=1) > -2, -torch.inf),
    "heavy tail": lambda T: normal(T, S) ** 5,
    "rising": lambda T: torch.arange(T * S, dtype=torch.float32).reshape(T, S),
}


@pytest.mark.parametrize("variant", ("radix", "sampled", "listed", HOPPER))
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("k", (7, 50))
def test_each_variant_is_exact(variant, kind, k, device, poisoned):
    scores = CASES[kind](3)
    start, end = ends_early(3, "cpu")
    got = launch(variant, scores.to(device), k, start.to(device), end.to(device)).cpu()
    for row, wanted in zip(got.tolist(), best(scores.numpy(), k, start, end), strict=True):
        assert sorted(row[: len(wanted)]) == wanted and row[len(wanted) :] == [-1] * (k - len(wanted))


@pytest.mark.parametrize("winners_sampled", (True, False))
def test_a_row_that_defeats_the_sample_is_redone(winners_sampled, device, poisoned):
    scores, k = luckless(winners_sampled, 2000), 2000
    start = torch.zeros(1, dtype=torch.int32)
    end = torch.full_like(start, scores.shape[1])
    got = launch("sampled", scores.to(device), k, start.to(device), end.to(device)).cpu()
    assert got.tolist() == best(scores.numpy(), k, start, end)


@pytest.mark.parametrize("variant", ("radix", "sampled", "listed", HOPPER))
def test_short_rows(variant, device, poisoned):
    scores = small_integers(4, 9)
    start, end = causal(4, 9)
    got = launch(variant, scores.to(device), 16, start.to(device), end.to(device)).cpu()
    assert [[s for s in row if s >= 0] for row in got.tolist()] == best(scores.numpy(), 16)


@pytest.mark.parametrize("variant", ("radix", "sampled", "listed", HOPPER))
@pytest.mark.parametrize("place", (0, 2500, S - 8))
def test_nan_is_refused_wherever_it_stands(variant, place, device):
    scores = normal(2, S)
    scores[1, place] = torch.nan
    start = torch.zeros(2, dtype=torch.int32, device=device)
    end = torch.full_like(start, S - 7)
    with pytest.raises(ValueError, match="scores must not be NaN, got NaN in row 1"):
        launch(variant, scores.to(device), 5, start, end)


def test_rows_in_blocks(device, poisoned, monkeypatch):
    """Lists for two rows at a time, and one left over."""
    monkeypatch.setattr("dsa_kernels.topk.listed.ROWS_AT_ONCE", 2)
    scores = normal(5, S)
    start, end = ends_early(5, "cpu")
    got = launch("listed", scores.to(device), 20, start.to(device), end.to(device)).cpu()
    assert [sorted(row) for row in got.tolist()] == best(scores.numpy(), 20, start, end)


@pytest.mark.parametrize("variant", ("sampled", "listed"))
def test_a_program_takes_many_rows(variant, device, poisoned, monkeypatch):
    """One program walks over seven rows, in the scan and in the redo, where the constant ones overflow their lists."""
    for algorithm in ("listed", "radix"):
        monkeypatch.setattr(f"dsa_kernels.topk.{algorithm}.PROGRAMS", 1)
        monkeypatch.setattr(f"dsa_kernels.topk.{algorithm}.multiprocessors", lambda tensor: 1)
    scores = normal(7, 9000)
    scores[[0, 3, 4, 6]] = 1.0
    start, end = torch.zeros(7, dtype=torch.int32), torch.full((7,), 9000, dtype=torch.int32)
    got = launch(variant, scores.to(device), 20, start.to(device), end.to(device)).cpu()
    assert [sorted(row) for row in got.tolist()] == best(scores.numpy(), 20, start, end)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ("sampled", "listed", HOPPER))
def test_rows_that_no_sample_can_bound(variant, device):
    """All but a few scores tie, so every list overflows, and all rows are redone."""
    scores = torch.zeros(64, 100_000, device=device)
    scores[:, 50_000:50_100] = normal(64, 100, device=device).abs() + 1
    start = torch.zeros(64, dtype=torch.int32, device=device)
    end = torch.full_like(start, 100_000)
    luckless, radix = (launch(name, scores, 2048, start, end).sort(dim=1).values for name in (variant, "radix"))
    assert torch.equal(luckless, radix) and radix[0].tolist()[:3] == [0, 1, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("T, S", [(8, 1 << 20), (300, 70_000), (37, 40_000)])
@pytest.mark.parametrize("winners", ("anywhere", "in one list"))
@pytest.mark.parametrize("variant", ("listed", HOPPER))
def test_lists_of_long_rows(variant, T, S, winners, device, poisoned):
    """Few rows are shared by many programs, many are not; winners in one list overflow it, and the row is redone."""
    scores = normal(T, S, seed=T, device=device)
    if winners == "in one list":
        scores[:, 5::1024] += 100
        scores[:, 69::64] += 50
    start, end = causal(T, S, device)
    listed, radix = (launch(name, scores, 2048, start, end).sort(dim=1).values for name in (variant, "radix"))
    assert torch.equal(listed, radix)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ("sampled", "listed", HOPPER))
def test_the_same_bits_every_time(variant, device):
    scores = normal(300, 70_000, device=device)
    start, end = causal(300, 70_000, device)
    first = launch(variant, scores, 2048, start, end)
    assert all(torch.equal(first, launch(variant, scores, 2048, start, end)) for _ in range(20))


@pytest.mark.hopper
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("S", (65_000, 65_537, 300_001))
def test_hopper_is_chosen_for_many_rows(S, dtype, device, poisoned, monkeypatch):
    """All three sizes of its sample, ranges anywhere, types with many ties; few rows are left to be redone."""
    T = 600
    scores = normal(T, S, device=device).to(dtype)
    start = torch.arange(T, dtype=torch.int32, device=device) * 7
    end = torch.clamp(start + torch.arange(T, dtype=torch.int32, device=device) * (S // T + 1), max=S)
    from dsa_kernels.hopper import select_topk as hopper

    flags = []
    select = hopper.select_topk
    monkeypatch.setattr(hopper, "select_topk", lambda *args: (select(*args), flags.append(args[-1].clone())))
    chosen, radix = (launch(name, scores, 2048, start, end).sort(dim=1).values for name in (None, "radix"))
    assert torch.equal(chosen, radix)
    assert len(flags) == 1 and int(flags[0].sum()) <= T // 50


@pytest.mark.parametrize("T", (0, 2))
@pytest.mark.parametrize(
    "variant, k, reason",
    [
        ("fast", 5, "variant must be one of hopper, portable, listed, .* got 'fast'"),
        ("listed", 2049, r'variant "listed" needs min\(k, S\) <= 2048, got 2049'),
        ("sampled", 8193, r'variant "sampled" needs min\(k, S\) <= 8192, got 8193'),
    ],
)
def test_a_variant_that_cannot_serve(variant, k, reason, T, device):
    with pytest.raises(ValueError, match=reason):
        dsa_kernels.select_topk(normal(T, 9000, device=device), k, variant=variant)


def test_hopper_needs_what_this_machine_may_not_have(device):
    """The interpreter has no Gluon, another GPU not the capability; Hopper has k's limit."""
    interpreted = dsa_kernels.mode() == "interpreter"
    needs = r"a GPU of compute capability 9.0|min\(k, S\) <= 2048"
    reason = "a triton with Gluon, and no interpreter" if interpreted else needs
    with pytest.raises(ValueError, match=f'variant "hopper" needs ({reason})'):
        dsa_kernels.select_topk(normal(2, 9000, device=device), 2049, variant="hopper")


@pytest.mark.parametrize("variant", (None, "portable", "radix", "listed"))
def test_variants_by_name(variant, device, poisoned):
    scores = small_integers(3, 40).to(device)
    got = dsa_kernels.select_topk(scores, 6, variant=variant).cpu()
    start, end = causal(3, 40)
    assert [sorted(row) for row in got.tolist()] == best(scores.cpu().numpy(), 6, start, end)
