"""Modules built on the steps: the attention layer, its cache and checkpoints, and a small model."""

from .cache import LayerCache, truncate_caches
from .captured import CapturedStep
from .checkpoint import load_layer, save_checkpoint
from .layer import DSALayer
from .model import ModelConfig, SmallModel, load_small_model

__all__ = [
    "CapturedStep",
    "DSALayer",
    "LayerCache",
    "ModelConfig",
    "SmallModel",
    "load_layer",
    "load_small_model",
    "save_checkpoint",
    "truncate_caches",
]
