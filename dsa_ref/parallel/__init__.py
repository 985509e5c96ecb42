"""DSA over a group of ranks, on torch.distributed: the same computation as on one, by two plans.

    GatheredLayer    prefill and training: each rank has its share of the queries; the keys of a layer are gathered
    ShardedLayer     decode, and contexts that fit nowhere: each rank has its share of the keys; results are merged

Both are DSALayers of another one's weights. Source: SPEC section 11.
"""

from .gathered import GatheredLayer, gather_held, gather_rows
from .model import new_sharded_caches, over_group
from .ranks import Ranks, join
from .sharded import ShardedLayer, sharded_attention, sharded_select
from .sharded_cache import ShardedCache
from .training import indexer_share, stage_backward, sum_gradients
from .zigzag import Zigzag

__all__ = [
    "GatheredLayer",
    "Ranks",
    "ShardedCache",
    "ShardedLayer",
    "Zigzag",
    "gather_held",
    "gather_rows",
    "indexer_share",
    "join",
    "new_sharded_caches",
    "over_group",
    "sharded_attention",
    "sharded_select",
    "stage_backward",
    "sum_gradients",
]
