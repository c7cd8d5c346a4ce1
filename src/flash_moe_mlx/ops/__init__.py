"""The maths of a streamed MoE layer: each operation is a reference, a GPU kernel and one dispatcher.

The model calls the dispatchers and nothing else, so a Mac or CUDA user runs the kernels by default.
``FLASH_MOE_REFERENCE=1`` makes every dispatcher run its reference: the one debug switch.
"""

from .backend import backend, use_kernels
from .dequant_matvec import dequant_matvec
from .expert_ffn import expert_ffn
from .expert_ffn_combine import expert_ffn_combine
from .gated_delta import conv1d_silu, gated_delta
from .gated_delta_step import gated_delta_conv_step
from .moe_combine import moe_combine
from .norm_matvec import matvec_residual, norm_matvec
from .qk_norm_rope import qk_norm_rope
from .router_topk import router_topk

__all__ = [
    "backend",
    "conv1d_silu",
    "dequant_matvec",
    "expert_ffn",
    "expert_ffn_combine",
    "gated_delta",
    "gated_delta_conv_step",
    "matvec_residual",
    "moe_combine",
    "norm_matvec",
    "qk_norm_rope",
    "router_topk",
    "use_kernels",
]
