"""Cards other than the one here: FP8 that is read as bytes, tiles that fit, and what is refused before a launch."""

import sys

import pytest
import rungs
import torch
from conftest import NEEDS_TRITON
from inputs import assert_same_bits, index_inputs, normal, selected

if rungs.has_triton():
    import triton
    import triton.language as tl

    import dsa_kernels
    from dsa_kernels import cards, runtime
    from dsa_kernels.rounding import from_e4m3

    SCORES, ATTENTION = (sys.modules[f"dsa_kernels.{name}"] for name in ("index_scores", "sparse_attention"))

    @triton.jit
    def widen(codes_ptr, out_ptr, dtype: tl.constexpr):
        i = tl.arange(0, 256)
        tl.store(out_ptr + i, from_e4m3(tl.load(codes_ptr + i), dtype).to(tl.float32))


pytestmark = pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)
E4M3 = torch.float8_e4m3fn
BF16 = pytest.param("bfloat16", marks=pytest.mark.gpu)  # the interpreter multiplies its bits as integers


@pytest.mark.parametrize("dtype", ("float16", "float32", BF16))
def test_all_codes_of_e4m3(dtype, device):
    """Two zeros, 14 subnormal numbers, 448 and the two NaN among them."""
    codes = torch.arange(256, device=device).to(torch.uint8)
    got, wanted = torch.empty(256, device=device), codes.view(E4M3).float()
    widen[(1,)](codes, got, getattr(tl, dtype))
    assert got.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]
    assert got[[0x01, 0x07, 0x08, 0x7E, 0x81]].tolist() == [2**-9, 7 * 2**-9, 2**-6, 448, -(2**-9)]
    assert_same_bits(got.nan_to_num(), wanted.nan_to_num())


def e4m3_inputs(T, S, Hi, Di, seed, device):
    q_idx, k_idx, w, k_scale = index_inputs(normal, T, S, Hi, Di, seed=seed, device=device)
    k_idx *= 2.0 ** torch.arange(-8, 5, device=device).repeat(S)[:S, None]  # subnormal numbers, too
    return q_idx.to(E4M3), k_idx.to(E4M3), w, k_scale


@pytest.mark.parametrize("seed", (0, 1))
@pytest.mark.parametrize("T, S, Hi, Di", [(37, 100, 16, 32), (7, 257, 1, 32), (1, 64, 3, 40)])
def test_widened_has_the_bits_of_bf16(T, S, Hi, Di, seed, device, poisoned):
    q_idx, k_idx, w, k_scale = e4m3_inputs(T, S, Hi, Di, seed, device)
    got = dsa_kernels.index_scores(q_idx, k_idx, w, k_scale, variant="widened")
    as_bf16 = q_idx.float().bfloat16(), k_idx.float().bfloat16()
    assert_same_bits(got, dsa_kernels.index_scores(*as_bf16, w, k_scale, variant="portable"))
    assert not torch.equal(got, dsa_kernels.index_scores(as_bf16[0] * 2, as_bf16[1], w, k_scale, variant="portable"))


def test_widened_keeps_nan_and_rows_that_see_nothing(device, poisoned):
    q_idx, k_idx, w, k_scale = e4m3_inputs(4, 20, 2, 32, 0, device)
    k_idx.view(torch.uint8)[5, 3] = 0xFF
    start = torch.tensor([0, 0, 6, 20], dtype=torch.int32, device=device)
    end = torch.tensor([20, 0, 20, 20], dtype=torch.int32, device=device)
    scores = dsa_kernels.index_scores(q_idx, k_idx, w, k_scale, start, end, variant="widened")
    assert scores[0].isnan().nonzero().flatten().tolist() == [5]
    assert scores[1:].isnan().sum() == 0 and (scores[[1, 3]] == -torch.inf).all()


@pytest.fixture
def launched(monkeypatch):
    """The pointer types with which scores are computed from now on."""
    seen, kernel = [], SCORES._index_scores

    class Noting:
        def __getitem__(self, grid):
            def launch(*arguments, **options):
                seen.append((arguments[0].dtype, arguments[1].dtype))
                kernel[grid](*arguments, **options)

            return launch

    monkeypatch.setattr(SCORES, "_index_scores", Noting())
    return seen


@pytest.mark.parametrize("variant, dtype", [("widened", torch.uint8), ("portable", E4M3)])
def test_a_selection_by_name_reads_bytes_all_the_way_down(variant, dtype, launched, device, monkeypatch):
    monkeypatch.setattr(runtime, "SCORES_AT_ONCE", 50)
    q_idx, k_idx, w, k_scale = e4m3_inputs(7, 20, 2, 32, 0, device)
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        dtype = torch.uint8
    got = dsa_kernels.lightning_select(q_idx, k_idx, w, 3, k_scale, variant=variant)
    assert launched == [(dtype, dtype)] * 4
    wanted = dsa_kernels.lightning_select(q_idx.float(), k_idx.float(), w, 3, k_scale, variant="portable")
    assert selected(got) == selected(wanted)


@pytest.mark.parametrize("step", ("index_scores", "lightning_select"))
def test_what_is_not_fp8_cannot_be_widened(step, device):
    q_idx, k_idx, w, k_scale = index_inputs(normal, 3, 9, 2, 32, device=device)
    more = {"k": 2} if step == "lightning_select" else {}
    with pytest.raises(ValueError, match='variant "widened" needs float8_e4m3fn, got float32'):
        getattr(dsa_kernels, step)(q_idx, k_idx, w, k_scale=k_scale, variant="widened", **more)
    with pytest.raises(ValueError, match='variant must be "portable", "hopper", "widened" or None, got \'wide\''):
        getattr(dsa_kernels, step)(q_idx, k_idx, w, k_scale=k_scale, variant="wide", **more)


@pytest.mark.parametrize("number, bytes_read", [(80, True), (86, True), (89, False), (90, False), (120, False)])
def test_cards_without_e4m3_read_bytes(number, bytes_read, launched, device, monkeypatch):
    monkeypatch.setattr(cards, "card_of", lambda tensor: cards.KNOWN[number])
    dsa_kernels.index_scores(*e4m3_inputs(3, 9, 2, 32, 0, device), variant="portable")
    assert launched == [(torch.uint8, torch.uint8) if bytes_read else (E4M3, E4M3)]


@pytest.mark.parametrize(
    "H, VP, RP, wanted", [(128, 512, 64, (64, 64, 8)), (16, 512, 64, (16, 64, 4)), (8, 64, 16, (16, 64, 4))]
)
def test_hoppers_tiles(H, VP, RP, wanted):
    assert ATTENTION.tiles(cards.KNOWN[90], H, VP, RP, 2) == wanted


@pytest.mark.parametrize(
    "number, wanted", [(80, (64, 32, 8)), (86, (32, 32, 8)), (89, (32, 32, 8)), (100, (64, 32, 8)), (120, (32, 32, 8))]
)
def test_smaller_cards_have_smaller_tiles(number, wanted):
    assert ATTENTION.tiles(cards.KNOWN[number], 128, 512, 64, 2) == wanted


@pytest.mark.parametrize(
    "number, loaded, wanted",
    [(90, 1, (256, 64, 4)), (90, 2, (256, 64, 4)), (86, 2, (128, 64, 4)), (80, 1, (256, 64, 8))],
)
def test_tiles_of_scores(number, loaded, wanted):
    multiplied = 1 if number == 90 and loaded == 1 else 2
    assert SCORES.tiles(cards.KNOWN[number], 64, 128, loaded, multiplied) == wanted


@pytest.mark.parametrize("number", (80, 86, 90))
def test_what_no_tile_can_hold_is_refused(number):
    """Before the launch, with both numbers."""
    room = f"{cards.KNOWN[number].shared_memory:,}"
    with pytest.raises(ValueError, match=rf"q must be narrower on this GPU .* of 4160 columns takes .*{room}"):
        ATTENTION.tiles(cards.KNOWN[number], 128, 4096, 64, 4)
    with pytest.raises(
        ValueError, match=rf"q_idx must be narrower on this GPU .* 64 heads of 2048 dims takes .*{room}"
    ):
        SCORES.tiles(cards.KNOWN[number], 64, 2048, 4, 4)


@pytest.fixture
def compiled(monkeypatch):
    """Kernels that do not interpret, as far as the checks before a launch can tell."""
    monkeypatch.setattr(runtime, "INTERPRETED", False)


def test_old_cards_are_refused(compiled, monkeypatch):
    monkeypatch.setattr(cards, "card_of", lambda tensor: cards.Card((7, 5), 65_536, 40))
    with pytest.raises(ValueError, match="scores must be on a GPU of compute capability 8.0 or newer, got 7.5"):
        dsa_kernels.select_topk(normal(2, 9), 3)


def test_other_makers_cards_are_refused(compiled, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.2")
    with pytest.raises(ValueError, match="x must be on an NVIDIA GPU, got one of ROCm 7.2: use dsa_ref there"):
        dsa_kernels.hadamard(normal(2, 32))


@pytest.mark.gpu
def test_this_card_says_what_it_has():
    card, properties = cards.card_of(torch.empty(1, device="cuda")), torch.cuda.get_device_properties()
    assert card.capability == torch.cuda.get_device_capability()
    assert card.multiprocessors == properties.multi_processor_count
    assert card.shared_memory == properties.shared_memory_per_block_optin
