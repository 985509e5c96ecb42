"""The presets, what follows from them, and what a configuration refuses."""

import dataclasses
import math

import pytest

from dsa_ref import TINY, V32, DSAConfig


def test_v32_is_the_default_but_for_yarn():
    """The figures of the published configuration, and the widths that follow: 576 a latent row, 192^-0.5 · m²."""
    assert V32 == DSAConfig(rope_factor=40.0) and not DSAConfig().yarn
    assert DSAConfig().softmax_scale == pytest.approx(192**-0.5, rel=1e-12)
    assert (V32.n_heads, V32.index_n_heads, V32.index_head_dim, V32.index_topk) == (128, 64, 128, 2048)
    assert V32.latent_dim == 576 and V32.yarn
    assert V32.softmax_scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2, rel=1e-12)


def test_yarn_only_beyond_the_original_length():
    assert not dataclasses.replace(V32, max_seq_len=4096).yarn
    assert dataclasses.replace(V32, max_seq_len=4096).softmax_scale == pytest.approx(192**-0.5, rel=1e-12)
    assert dataclasses.replace(V32, max_seq_len=4097).yarn
    assert not dataclasses.replace(V32, rope_factor=1.0).yarn
    assert not TINY.yarn and TINY.softmax_scale == pytest.approx(24**-0.5, rel=1e-12)


def test_mscale_counts():
    assert dataclasses.replace(V32, mscale=0.0).softmax_scale == pytest.approx(192**-0.5, rel=1e-12)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        V32.index_topk = 1


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("rope_factor", 0.0, ValueError),
        ("rope_factor", 0.5, ValueError),
        ("rope_factor", math.inf, ValueError),
        ("rope_factor", math.nan, ValueError),
        ("norm_eps", math.nan, ValueError),
        ("rope_theta", math.inf, ValueError),
        ("mscale", -1.0, ValueError),
        ("rope_theta", "1e4", TypeError),
        ("beta_fast", True, TypeError),
        ("index_fp8", "no", TypeError),
        ("index_rope", "neox", ValueError),
        ("index_rope", None, TypeError),
        ("index_pattern", "FsF", ValueError),
        ("index_pattern", "SF", ValueError),
        ("index_pattern", ("F", "S"), TypeError),
    ],
)
def test_constants(name, value, error):
    with pytest.raises(error, match=name):
        dataclasses.replace(TINY, **{name: value})


INTS = [field.name for field in dataclasses.fields(DSAConfig) if field.type in (int, "int")]


def test_the_list_of_int_fields_is_not_empty():
    assert {"dim", "n_heads", "index_topk", "max_seq_len"} <= set(INTS)


@pytest.mark.parametrize("name", sorted(set(INTS) - {"mha_keys"}))
@pytest.mark.parametrize("value, error", [(0, ValueError), (-8, ValueError), (2.0, TypeError), (True, TypeError)])
def test_sizes(name, value, error):
    with pytest.raises(error, match=name):
        dataclasses.replace(TINY, **{name: value})


@pytest.mark.parametrize("value, error", [(-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_how_many_keys_a_row_in_mha_mode_sees(value, error):
    with pytest.raises(error, match="mha_keys"):
        dataclasses.replace(TINY, mha_keys=value)
    assert TINY.most_mha_keys == TINY.index_topk and V32.most_mha_keys == 2048
    assert dataclasses.replace(TINY, mha_keys=5).most_mha_keys == 5


@pytest.mark.parametrize("name, value", [("qk_rope_head_dim", 7), ("index_head_dim", 24), ("index_head_dim", 4)])
def test_widths(name, value):
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(TINY, **{name: value})


def test_which_layers_have_an_indexer():
    shared = dataclasses.replace(TINY, index_pattern="FSSF")
    assert [shared.has_indexer(i) for i in range(4)] == [True, False, False, True]
    assert TINY.has_indexer(10**6)
    for index in ("0", True, 1.0):
        with pytest.raises(TypeError, match="layer_index must be an int"):
            shared.has_indexer(index)
    for index in (-1, 4):
        with pytest.raises(ValueError, match=r"layer_index must be in \[0, 4\)"):
            shared.has_indexer(index)
