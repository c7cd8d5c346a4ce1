"""Token mixers of the Qwen3.5 and Qwen3-Next family, one module each.

A mixer's module holds everything about it: its layers with the checkpoint's weight names, its caches, and the bytes of
its states and scratch. Caches are mlx_lm's; their batched forms work too.
"""

from .attention import GatedAttention
from .gated_delta import GatedDeltaNet

MIXERS: dict[str, type[GatedAttention] | type[GatedDeltaNet]] = {
    "full_attention": GatedAttention,
    "linear_attention": GatedDeltaNet,
}
"""Mixers by their name in config.json's layer_types."""
