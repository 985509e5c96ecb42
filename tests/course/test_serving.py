"""The numbers behind notebook 12's live figures, not only that they change."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from dsa_course.serving.live import LAYOUTS, live_bill, live_page, live_table, pages_chart, row_chart


def controls(figure):
    return {control.description: control for control in figure.children[:-1]}


@pytest.mark.parametrize(
    ("token", "layout", "values", "scale"),
    [(0, 0, 0, 8192), (5, 0, 640, 8212), (63, 0, 8064, 8444), (0, 1, 0, 128), (63, 1, 8316, 8444)],
)
def test_the_bytes_of_a_token(token, layout, values, scale):
    figure = live_page()
    controls(figure)["layout"].value, controls(figure)["token"].value = LAYOUTS[layout], token
    kind = figure.data["kind"].ravel()
    assert (figure.data["values"], figure.data["scale"]) == (values, scale)
    assert (kind[values : values + 128] == 2).all() and (kind[scale : scale + 4] == 3).all()
    assert np.bincount(kind).tolist() == [63 * 128, 63 * 4, 128, 4]
    assert f"token {token} begin at byte {values}" in figure.alt


def test_the_page_table_at_the_start():
    data = live_table().data
    assert data["pages"] == {"A": [0, 2, 3], "B": [1, 4], "C": [0, 2, 5, 6]}
    assert data["lengths"] == {"A": 10, "B": 7, "C": 13} and data["free"] == 5
    assert data["places"][:4] == ["AC0", "AC1", "AC2", "AC3"] and data["places"][12:16] == ["A8", "A9", "", ""]


def test_what_the_page_tables_text_says_of_its_three_questions():
    figure = live_table()
    length, sequence = controls(figure)["its length"], controls(figure)["sequence"]
    length.value = 16
    assert figure.data["pages"]["A"] == [0, 2, 3, 7]
    length.value, sequence.value = 10, "C"
    length.value = 8
    assert figure.data["pages"]["C"] == [0, 2] and figure.data["free"] == 7
    eight = live_table(page_size=8)
    assert set(eight.data["pages"]["A"]) & set(eight.data["pages"]["C"]) == {0}
    assert "Shared pages: 0." in eight.alt


@pytest.mark.parametrize("sequence", "ABC")
@pytest.mark.parametrize("page_size", (2, 4, 8))
def test_every_token_has_one_place_and_every_state_fits_the_pool(sequence, page_size, monkeypatch):
    live_table(sequence, 16, page_size)  # drawn: the longest
    monkeypatch.setattr("dsa_course.serving.live._draw_table", lambda data: Figure(figsize=(1, 1)))
    for length in range(17):
        data = live_table(sequence, length, page_size).data
        assert data["lengths"][sequence] == length
        for name, tokens in data["lengths"].items():
            places = [slot for slot, text in enumerate(data["places"]) if name in text]
            expected = [data["pages"][name][s // page_size] * page_size + s % page_size for s in range(tokens)]
            assert sorted(places) == sorted(expected)
        held = {page for pages in data["pages"].values() for page in pages}
        assert len(held) + data["free"] == 48 // page_size


def test_the_bill():
    data = live_bill().data
    assert (data["here"].dense, data["here"].dsa) == (656 * 131_072, 132 * 131_072 + 656 * 2048)
    assert data["break_even"] == pytest.approx(656 * 2048 / 524) and data["ceiling"] == pytest.approx(656 / 132)
    figure = live_bill(tokens=11)
    assert figure.data["ratio"] < 1 and "2048 tokens" in figure.alt
    controls(figure)["tokens 2^"].value = 12
    assert figure.data["ratio"] > 1


def test_the_still_pictures_count():
    assert "2 selected keys lie in 2 of 3 pages" in pages_chart([3, 64], 130).axes[0].get_title()
    assert [int(tick) for tick in row_chart().axes[0].get_xticks()] == [0, 128, 256, 384, 512, 528, 656]
