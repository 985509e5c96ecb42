"""Modules built on the steps: the attention layer, its checkpoints, a small model and its training."""

from .checkpoint import load_layer, save_checkpoint
from .layer import DSALayer, LayerCache
from .model import ModelConfig, SmallModel, load_small_model

__all__ = ["DSALayer", "LayerCache", "ModelConfig", "SmallModel", "load_layer", "load_small_model", "save_checkpoint"]
