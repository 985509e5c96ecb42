"""The trap museum: known ways to get DSA subtly wrong, as data, and what each of them does to a trained model.

    with planted(trap("no relu")):
        ...                                     # the reference is wrong now

`variants` holds the faulty functions, `runs` what is run on them, and `python -m dsa_course.traps` measures the harm.
Planting replaces a function in every module of the reference that uses it, but not in `dsa_ref.testing`, which judges.
A fault in one of the two halves of `lightning_select` is in the whole as well, which becomes its two halves then.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from unittest import mock

import torch

import dsa_ref
from dsa_ref import contracts
from dsa_ref.config import DSAConfig
from dsa_ref.nn.layer import DSALayer, Indexer

from . import variants as faulty

CLASSES = {owner.__name__: owner for owner in (DSAConfig, DSALayer, Indexer)}


@dataclasses.dataclass(frozen=True)
class Trap:
    """One fault: `variant` stands in for `step`, the name of a step function or "Class.attribute".

    caught_by: the pytest node id of a test that fails while it is planted. shows_in: the way of running the small
    model, one of `runs.WAYS`, in which it does harm.
    """

    name: str
    what: str
    symptom: str
    step: str
    variant: Callable
    caught_by: str
    shows_in: str = "one pass"


TRAPS = (
    Trap(
        "unnormalised latent",
        "The indexer's queries come from the query's latent (notebook 06) before its norm, not after it.",
        "One key in some sixty differs; nothing else shows.",
        "DSALayer._index",
        faulty.unnormalised_latent,
        "tests/nn/test_transformers.py::test_same_output_and_same_sets[0-deepseek_v32-plain]",
    ),
    Trap(
        "RMSNorm on k",
        "The indexer's key is divided by its root mean square; its mean is not taken off, nor a bias added.",
        "One key in sixteen differs, and the loss hardly moves.",
        "Indexer.forward",
        faulty.rms_norm_on_k,
        "tests/nn/test_transformers.py::test_same_output_and_same_sets[0-deepseek_v32-plain]",
    ),
    Trap(
        "softmaxed weights",
        "The head weights go through a softmax, as gates elsewhere do: all are positive and sum to 1.",
        "No score is ever negative.",
        "Indexer.forward",
        faulty.softmaxed_weights,
        "tests/nn/test_transformers.py::test_same_output_and_same_sets[0-deepseek_v32-plain]",
    ),
    Trap(
        "bf16 head weights",
        "The head weights are computed in bf16, with 8 binary digits, not in fp32, with 24.",
        "One key in some thousand differs: near-ties at the threshold.",
        "Indexer.forward",
        faulty.bf16_head_weights,
        "tests/nn/test_layer.py::test_indexer_written_out[0]",
    ),
    Trap(
        "weights without their constant",
        "The head weights lack their constant factor Hi^-0.5 · Di^-0.5 (notebook 02).",
        "Same sets, same language loss; the indexer's own loss explodes: the factor is its temperature.",
        "Indexer.forward",
        faulty.weights_without_constant,
        "tests/nn/test_layer.py::test_indexer_written_out[0]",
        "indexer loss",
    ),
    Trap(
        "interleaved indexer RoPE",
        "The indexer's q and k are turned in pairs of neighbours (MLA's, notebook 06), not half-split ones.",
        "Norms and shapes are right, and q·k still depends on the distance alone; half of the keys differ.",
        "rotate_quantize",
        faulty.interleaved_index_rope,
        "tests/steps/test_rotate_quantize.py::test_value_is_the_rotated_vector[reference-shape0]",
    ),
    Trap(
        "half-split RoPE in MLA",
        "MLA's q and k are turned in half-split pairs, the indexer's, not in neighbours (notebook 06).",
        "The first layer selects rightly and attends wrongly: the largest loss, with seven keys in ten right.",
        "rope",
        faulty.half_split_mla_rope,
        "tests/steps/test_rope.py::test_turns_pairs[reference-37-3-8-interleaved]",
    ),
    Trap(
        "RoPE on the wrong end",
        "The indexer's RoPE turns the last numbers of a head, as MLA's does (notebook 06), not the first.",
        "Norms are right, most keys differ, the model breaks.",
        "rotate_quantize",
        faulty.rope_on_the_wrong_end,
        "tests/steps/test_rotate_quantize.py::test_value_is_the_rotated_vector[reference-shape0]",
    ),
    Trap(
        "positions restart",
        "With a cache, the indexer counts the positions of each chunk of new tokens from 0.",
        "One pass is right; chunks select far too many wrong keys.",
        "rotate_quantize",
        faulty.positions_restart,
        "tests/nn/test_layer.py::test_decode_and_chunks_equal_prefill[reference-7-True]",
        "chunks",
    ),
    Trap(
        "one side rotated",
        "The Hadamard rotation (notebook 07) is applied to q and forgotten for k.",
        "Scores are noise: the selection is little better than random, and the model breaks.",
        "rotate_quantize",
        faulty.one_side_rotated,
        "tests/steps/test_rotate_quantize.py::test_value_is_the_rotated_vector[reference-shape0]",
    ),
    Trap(
        "no amax floor",
        "The FP8 scale (notebook 07) comes from the largest magnitude, which is not kept above 1e-4.",
        "All is well until a row is zero, such as padding: 0 / 0 is NaN.",
        "quantize",
        faulty.no_amax_floor,
        "tests/steps/test_quantize.py::test_zeros[reference]",
        "padding",
    ),
    Trap(
        "scale rounded down",
        "The FP8 scale (notebook 07) is rounded down to a power of two, not up: numbers are cut off at 448.",
        "The largest number of a vector loses up to half; a seventh of the keys differ; the loss hardly moves.",
        "quantize",
        faulty.scale_rounded_down,
        "tests/steps/test_quantize.py::test_scale_beside_every_power_of_two[reference]",
    ),
    Trap(
        "no relu",
        "The weighted sum over heads takes the dot products themselves, also the negative ones.",
        "Scores without a floor: heads that see a mismatch vote against the key.",
        "index_scores",
        faulty.no_relu,
        "tests/steps/test_index_scores.py::test_relu_before_the_sum_and_weights_as_they_are[reference]",
    ),
    Trap(
        "weight inside the relu",
        "The head weight, sign and all, is multiplied in before the relu; only a positive factor may be.",
        "Right where all weights are positive; no score is ever negative.",
        "index_scores",
        faulty.weight_inside_the_relu,
        "tests/steps/test_index_scores.py::test_relu_before_the_sum_and_weights_as_they_are[reference]",
    ),
    Trap(
        "key scale left out",
        "The scores are not multiplied by the keys' FP8 scales (notebook 07).",
        "Right where all keys have one scale; wrong by powers of two elsewhere.",
        "index_scores",
        faulty.key_scale_left_out,
        "tests/steps/test_lightning_select.py::test_key_scales_do_matter[reference]",
    ),
    Trap(
        "last key wins ties",
        "Of equal scores at the threshold the last key is kept, not the first.",
        "Two implementations disagree, but only where scores tie. An unstable sort does it now and then.",
        "select_topk",
        faulty.last_key_wins_ties,
        "tests/steps/test_select_topk.py::test_smallest_index_wins_a_tie[reference]",
        "bf16 scores",
    ),
    Trap(
        "threshold with >=",
        "Every key that reaches the k-th largest score is kept, first to last, until the list is full.",
        "Where scores tie, the last keys are missing, even the best of all and the row's own.",
        "select_topk",
        faulty.threshold_with_ge,
        "tests/steps/test_select_topk.py::test_contract[reference-few values-5-257-64]",
        "bf16 scores",
    ),
    Trap(
        "zero padding",
        "Rows that see fewer than k keys are filled up with 0 instead of -1.",
        "Only the first k rows: key 0 is attended to again and again.",
        "select_topk",
        faulty.zero_padding,
        "tests/steps/test_select_topk.py::test_contract[reference-normal-4-9-20]",
    ),
    Trap(
        "own key hidden",
        "With a cache, a row's range ends one key too early: S - T + t in place of S - T + t + 1.",
        "One pass is right; with a cache no row ever selects its own key.",
        "lightning_select",
        faulty.own_key_hidden,
        "tests/steps/test_lightning_select.py::test_exact_on_whole_numbers[reference-dtype0-5-70-16-32-16]",
        "chunks",
    ),
    Trap(
        "future key visible",
        "A row's range ends one key too late: it may select the next key.",
        "A later byte changes the selection and the logits of an earlier one. The loss may fall, as it can peek.",
        "lightning_select",
        faulty.future_key_visible,
        "tests/nn/test_layer.py::test_causality[reference-sparse-True]",
    ),
    Trap(
        "-1 taken as the last row",
        "To attention the index -1 should mean none; here it means the last key, as in Python.",
        "Only the first k rows: they attend to the last key, in their future, again and again.",
        "sparse_attention",
        faulty.minus_one_as_the_last_row,
        "tests/steps/test_sparse_attention.py::test_nothing_selected[reference]",
    ),
    Trap(
        "scale of the latent row",
        "The softmax scale comes from the absorbed query's width, not from the head's (notebook 06).",
        "The first layer's selection is right, and its output is not: the softmax is too flat.",
        "DSAConfig.softmax_scale",
        faulty.scale_of_the_latent_row,
        "tests/steps/test_config.py::test_yarn_only_beyond_the_original_length",
    ),
    Trap(
        "base-2 log-sum-exp",
        "Attention returns its log-sum-exp (notebook 05) to base 2, as some kernels do inside.",
        "The output is right; two parts of a row that are merged by it are weighted wrongly.",
        "sparse_attention",
        faulty.base_2_lse,
        "tests/steps/test_sparse_attention.py::test_one_selected[reference]",
        "merge",
    ),
)


def trap(name) -> Trap:
    """The trap of this name. Raises: ValueError for an unknown one."""
    found = {trap.name: trap for trap in TRAPS}
    if name not in found:
        raise ValueError(f"name must be one of {', '.join(found)}, got {name!r}")
    return found[name]


@torch.no_grad()
def select_in_two_steps(q_idx, k_idx, w, k, k_scale=None, start=None, end=None):
    """`lightning_select` by its definition, through the steps as they are now; the reference's own calls neither."""
    return dsa_ref.select_topk(dsa_ref.index_scores(q_idx, k_idx, w, k_scale, start, end), k, start, end)


def replaced(trap):
    """What planting replaces: {(module or class, attribute): the function that stands in for it}."""
    owner, _, attribute = trap.step.rpartition(".")
    if owner:
        return {(CLASSES[owner], attribute): trap.variant}
    steps = {attribute: trap.variant}
    if attribute in ("index_scores", "select_topk"):
        steps["lightning_select"] = select_in_two_steps
    # Each module that imported a step has its own name for it.
    modules = [module for name, module in sys.modules.items() if f"{name}.".startswith("dsa_ref.")]
    return {
        (module, step): variant
        for module in modules
        for step, variant in steps.items()
        if vars(module).get(step) is getattr(dsa_ref, step) and module.__name__ != "dsa_ref.testing"
    }


@contextlib.contextmanager
def planted(trap):
    """The reference with this fault in it, until the block ends."""
    with contextlib.ExitStack() as stack:
        # A key named twice is refused; two of the traps name one, and show what happens where nobody looks.
        stack.enter_context(mock.patch.object(contracts, "check_distinct", lambda indices: None))
        # A layer without gradients runs small steps that do several of these at once; so it is written out here.
        stack.enter_context(mock.patch.object(dsa_ref.nn.layer, "serves", lambda *_: False))
        for (place, attribute), variant in replaced(trap).items():
            stack.enter_context(mock.patch.object(place, attribute, variant))
        yield
