"""The order of the course, in one table: what links notebooks to their neighbours, and which part of DSA each is about.

A notebook is listed before it is written: `written` gives those that are there, and nothing links to another.
"""

import dataclasses
import pathlib

SOURCE = pathlib.Path(__file__).parents[1] / "solutions"


@dataclasses.dataclass(frozen=True)
class Notebook:
    """One notebook. `stem` is its file's name without .ipynb; `lit` names what `schematic` lights for it."""

    stem: str
    title: str
    minutes: int
    lit: tuple = ()

    @property
    def number(self) -> str:
        return self.stem.partition("_")[0]


STEPS = ("index_scores", "select_topk", "sparse_attention")
COURSE = (
    Notebook("00_start_here", "Start here", 20, STEPS),
    Notebook("01_dense_attention", "Dense attention and its bill", 60, ("sparse_attention",)),
    Notebook("02_index_scores", "The lightning indexer", 75, ("index_scores",)),
    Notebook("03_select_topk", "Selection is a contract", 60, ("select_topk",)),
    Notebook("04_gather", "Gather, don't mask", 75, ("sparse_attention",)),
    Notebook("04b_every_step_twice", "Every step, twice", 30, STEPS),
    Notebook("05_online_softmax", "Softmax in blocks", 60, ("sparse_attention",)),
    Notebook("06_mla", "MLA and two RoPEs", 75, ("sparse_attention", "kv")),
    Notebook("07_quantize", "Eight bits for a scout", 60, ("index_scores", "k_idx")),
    Notebook("08_triton_index_scores", "Triton by hand: the indexer kernel", 90, ("index_scores",)),
    Notebook("09_triton_sparse_attention", "Triton: sparse attention", 120, ("sparse_attention",)),
    Notebook("10_gpu_selection", "Selecting on a GPU", 75, ("select_topk",)),
    Notebook("11_ladder", "The ladder to Hopper's speed", 90, STEPS),
    Notebook("12_serving", "Serving: caches, pages, decode", 75, ("k_idx", "kv")),
    Notebook("12b_your_own_model", "Your own model", 30, STEPS),
    Notebook("13_teaching", "Teaching the scout", 100, ("index_scores",)),
    Notebook("14_million", "A million tokens", 60, STEPS),
    Notebook("15_trap_museum", "The trap museum", 60, STEPS),
    Notebook("16_capstone", "Capstone: DSA in a small GPT", 120, STEPS),
    Notebook("17_beyond_one_gpu", "Beyond one GPU", 60, STEPS),
)


def written(folder=SOURCE) -> list[Notebook]:
    """The notebooks of the table that are in `folder`, in order.

    Raises: ValueError for a notebook there that the table does not have.
    """
    there = {path.stem for path in folder.glob("*.ipynb")}
    if unknown := sorted(there - {notebook.stem for notebook in COURSE}):
        raise ValueError(f"notebooks must stand in the table of notebooks/maintain/course.py, got {', '.join(unknown)}")
    return [notebook for notebook in COURSE if notebook.stem in there]
