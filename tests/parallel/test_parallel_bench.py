"""The bench over several GPUs at toy sizes, on a CPU: it measures what it says, and finds a wrong result."""

import pytest
import rungs
from conftest import NEEDS_TRITON

pytestmark = pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)


@pytest.mark.parametrize("what, T", [("prefill", 7), ("training", 3)])
def test_a_row_has_times_of_all_and_no_row_that_differs(worlds, what, T):
    rows = worlds(2).run("bench", what=what, T=T)
    assert rows[0] == rows[1]
    row = rows[0]
    assert row["tokens"] == T and row["ranks"] == 2 and row["rows_that_differ"] == 0.0
    assert row["efficiency"] == pytest.approx(row["alone_ms"] / (2 * row["ms"]))
    assert 0 < row["exchange_ms"] and len(row["select_ms"]) == 2 and min(row["select_ms"]) > 0 and row["imbalance"] >= 0


def test_rows_that_differ_are_counted(worlds):
    from dsa_bench import parallel

    rows = worlds(2).run("bench", what="prefill", T=7, fault="keys in the order of ranks")
    assert rows[0]["rows_that_differ"] > parallel.FLIPPED


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    from dsa_bench import parallel

    monkeypatch.setattr(parallel.torch.cuda, "is_available", lambda: False)
    assert parallel.main([]) == 2 and "CUDA" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parallel.parse(["decode"])
