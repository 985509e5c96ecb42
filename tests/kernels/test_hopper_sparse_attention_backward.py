"""The Hopper kernels of sparse attention's gradient: right at every count of heads, and the same bits at full size."""

import os
import pathlib
import subprocess
import sys

import pytest
import rungs
import torch
from conftest import NEEDS_TRITON
from inputs import assert_same_bits, normal, random_indices

import dsa_ref

ROOT = pathlib.Path(__file__).parents[2]
CHAPTER = ROOT / "kernels" / "book" / "sparse_attention_backward.md"
SCALE = 192**-0.5
ROUNDED = 6e-3  # ||error|| / ||right||: P, dS and rows go through bf16


def inputs(T, S, H, k, device, seed=0, indices=None):
    """Arguments by name, in bf16; out and lse are dsa_kernels' own."""
    import dsa_kernels

    shapes = {"q": (T, H, 576), "kv": (S, 576), "dout": (T, H, 512)}
    generator = torch.Generator(device).manual_seed(seed)  # on the card: a CPU takes long to draw a full size
    given = {name: torch.randn(shape, device=device, generator=generator).bfloat16() for name, shape in shapes.items()}
    given |= {"indices": random_indices(T, S, k, seed=seed, device=device) if indices is None else indices}
    given |= {"scale": SCALE, "v_dim": 512, "dlse": normal(T, H, seed=seed + 5, device=device)}
    forward = {name: given[name] for name in ("q", "kv", "indices", "scale", "v_dim")}
    given["out"], given["lse"] = dsa_kernels.sparse_attention(**forward)
    return given


def error_of(got, wanted):
    """||got - wanted|| / ||wanted|| in float64, where they lie; NaN is no number that a test could allow."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def exact(given):
    """(dq, dkv, target) of the reference in float64, with its own out and lse."""
    forward = {name: given[name] for name in ("q", "kv", "indices", "scale", "v_dim")}
    forward |= {name: forward[name].double() for name in ("q", "kv")}
    out, lse = dsa_ref.sparse_attention(**forward)
    dout, dlse = given["dout"].double(), given["dlse"].double()
    return dsa_ref.sparse_attention_backward(**forward, out=out, lse=lse, dout=dout, dlse=dlse)


def check(given, wanted, **options):
    import dsa_kernels

    results = dsa_kernels.sparse_attention_backward(**given, variant="hopper", **options)
    for name, got, value in zip(("dq", "dkv", "target"), results, wanted, strict=True):
        assert error_of(got, value) < (1e-4 if name == "target" else ROUNDED), name
    assert (results[2][given["indices"] < 0] == 0).all()
    return results


@pytest.mark.hopper
@pytest.mark.parametrize("H, k", [(128, 2048), (128, 1), (64, 100), (96, 129), (16, 640), (1, 63)])
def test_every_count_of_heads_on_hopper(device, poisoned, monkeypatch, H, k):
    """Lists that are no whole tiles, an empty row; both ways to sum; one lot of queries, and several."""
    given = inputs(37, 3000, H, k, device)
    wanted = exact(given)
    whole = check(given, wanted)
    check(given, wanted, sums="atomic")
    monkeypatch.setattr("dsa_kernels.runtime.GRADIENTS_AT_ONCE", 5 << 20)
    parts = check(given, wanted)
    for got, value in zip((parts[0], parts[2]), (whole[0], whole[2]), strict=True):
        assert_same_bits(got, value)
    assert (whole[0][0] == 0).all()


@pytest.mark.hopper
@pytest.mark.parametrize("part", ("dlse", "dout", "lse"))
def test_what_lacks_a_part_is_found_on_hopper(device, part):
    given = inputs(37, 3000, 128, 700, device)
    wanted = exact(given)
    check(given, wanted)
    given[part] = torch.zeros_like(given[part]) if part == "dlse" else given[part] * 1.02
    with pytest.raises(AssertionError):
        check(given, wanted)


@pytest.mark.hopper
def test_large_logits_nan_and_rows_without_keys_on_hopper(device):
    import dsa_kernels

    given = inputs(9, 3000, 128, 700, device) | {"dlse": None}
    given["indices"][3] = -1
    names = ("q", "kv", "indices", "scale", "v_dim")
    given["q"] = given["q"] * 30
    given["out"], given["lse"] = dsa_kernels.sparse_attention(*(given[name] for name in names))
    for got in dsa_kernels.sparse_attention_backward(**given, variant="hopper"):
        assert got.isfinite().all()
    given["q"][5, 7, 3] = torch.nan
    given["out"], given["lse"] = dsa_kernels.sparse_attention(*(given[name] for name in names))
    dq, dkv, target = dsa_kernels.sparse_attention_backward(**given, variant="hopper")
    keys = {s for s in given["indices"][5].tolist() if s >= 0}
    assert dq[5, 7].isnan().all() and int(dq.isnan().any(dim=-1).sum()) == 1
    assert set(dkv.isnan().any(dim=1).nonzero().flatten().tolist()) == keys
    assert int(target.isnan().any(dim=1).sum()) == 1 and (dq[3] == 0).all()


@pytest.mark.hopper
@pytest.mark.parametrize("H", (128, 64))
def test_full_size_is_right_and_the_same_bits_each_time(device, H):
    """4096 queries at the end of 8192 positions: sixty calls, against the portable kernels and the reference."""
    import dsa_kernels

    T, S, k = 4096, 8192, 2048
    generator = torch.Generator(device).manual_seed(0)
    lists = []
    for t in range(0, T, 512):
        visible = torch.arange(S - T + t, S - T + t + 512, device=device)
        lots = torch.rand(512, S, device=device, generator=generator)
        lots.masked_fill_(torch.arange(S, device=device) > visible[:, None], -1.0)
        lists.append(lots.topk(k).indices.int())
    given = inputs(T, S, H, k, device, indices=torch.cat(lists))
    first = dsa_kernels.sparse_attention_backward(**given, variant="hopper")
    for _ in range(60):
        again = dsa_kernels.sparse_attention_backward(**given, variant="hopper")
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    portable = dsa_kernels.sparse_attention_backward(**given, variant="portable")
    for got, value in zip(first, portable, strict=True):
        assert error_of(got, value) < ROUNDED
    rows = torch.arange(0, T, 257, device=device)
    dq, _, target = exact({n: x[rows] if n not in ("kv", "scale", "v_dim") else x for n, x in given.items()})
    assert error_of(first[0][rows], dq) < ROUNDED and error_of(first[2][rows], target) < 1e-4


def test_memory_map_of_the_chapter_adds_up():
    """`test_compile` compares the sums with the compiler's."""
    text = CHAPTER.read_text(encoding="utf-8").partition("## Memory map")[2].partition("## Barriers")[0]
    table = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    for column in (1, 3):
        *parts, total = (int(row[column].replace(",", "")) for row in table[2:] if row[column])
        assert len(parts) >= 4 and sum(parts) == total <= 232_448


def test_queries_at_once_fill_the_card():
    """A lot fits into the memory it may take, and the card has no half-empty last round."""
    if not rungs.has_triton():
        pytest.skip(NEEDS_TRITON)
    code = (
        "from dsa_kernels.hopper.sparse_attention_backward import queries_at_once as n; "
        "print(n(4096, 128, 2048, True, 132), n(4096, 64, 2048, True, 132), n(100, 128, 2048, True, 132), "
        "n(9, 128, 1 << 24, True, 132))"
    )
    found = list(map(int, run(code).split()))
    assert found[0] % 66 == 0 and found[1] % 66 == 0 and found[2:] == [100, 1]
    assert found[0] * 2048 * (2 * 128 * 2 + 576 * 2) <= 7 << 29


def run(code, **environment):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path} | environment
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
