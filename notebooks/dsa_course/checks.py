"""One check for each exercise of the course: `checks.index_scores(my_index_scores)` prints ✓ and the properties that
hold, or says which one is broken, where, and why that usually is. `checking` explains how they are made.
"""

from .capstone.check import layer
from .capstone.check_cached import cached
from .capstone.check_claim import ablate, claim, paired
from .checking import Check
from .dense_attention.check import attention_bytes, attention_flops, bill_growth, dense_attention
from .gather.check import attended_pairs, gather_rows, gathered_attention, pays_from
from .gpu_selection.check import lower_bound, ordered_bits, threshold_select
from .gpu_selection.check_kernel import selection_kernel
from .index_scores.check import counterexample, head_weights, index_scores, zero_probability
from .ladder.check import programs_that_fit, roofline, time_after
from .ladder.check_machine import measure, ring_waits
from .ladder.check_profile import predict_table, read_profile
from .million.check import chunk_ms, dollars, half_from
from .million.check_limits import most_tokens, needed_keys
from .mla.check import absorb, cache_bytes, rope, softmax_scale
from .online_softmax.check import log_sum_exp, merge_parts, online_update
from .online_softmax.check_work import block_attention
from .quantize.check import hadamard, quantize
from .quantize.check_scores import flips, scores_from_fp8
from .ranks.check import candidates, winners, zigzag
from .ranks.check_sums import group_gradient, rank_attention
from .recall.check import recall, window_selection
from .select_topk.check import check_selection, select_topk
from .serving.check import merge_splits, step_bytes
from .serving.check_pages import pack_page, paged_scores, slots_of
from .start.check import three_lines
from .start.check_last import keep_last
from .teaching.check import kl_loss, kl_target
from .teaching.check_gradients import kl_gradients, lesson_loss
from .teaching.check_record import verdict
from .traps.check import diagnose, match_symptoms, rope_probe
from .triton_index_scores.check import copy_kernel, planted_bug_kernel, row_sum_kernel, tile_cost
from .triton_index_scores.check_kernel import index_scores_kernel
from .triton_online_softmax.check import merge_kernel, row_lse_kernel
from .triton_sparse_attention.check import gather_kernel, sparse_attention_kernel
from .your_own_model.check import same_logits

ALL = {value.name: value for value in list(globals().values()) if isinstance(value, Check)}
