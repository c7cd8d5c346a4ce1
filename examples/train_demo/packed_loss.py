"""The training loss of packed rows, from a Qwen3_5MoeForCausalLM's own parameters and equal to its forward pass.

transformers' pass loops over the experts and waits for the GPU. Here every shape is fixed, so that a step can be
captured as a CUDA graph: all experts are computed, and those not chosen get weight zero. Documents of a row do not see
each other. Matrix products are in bfloat16 where ``dtype`` says so, the residual stream and the delta rule in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import Qwen3_5MoeForCausalLM

CHUNK = 64  # tokens of a row whose delta-rule updates are solved for together
FORGET = -30.0  # log decay at a document's first token


def linear(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Compute x W^T with both rounded to ``dtype``."""
    return F.linear(x.to(dtype), weight.to(dtype))


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute the root-mean-square norm of float32 x, times ``weight``."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


class UnitLowerInverse(torch.autograd.Function):
    """Inverses of I + A for strictly lower triangular A of shape (..., CHUNK, CHUNK), from blocks of 1 up to CHUNK."""

    @staticmethod
    def forward(ctx, lower: torch.Tensor) -> torch.Tensor:
        index = torch.arange(CHUNK, device=lower.device)
        size = 1
        inverse = torch.eye(CHUNK, device=lower.device, dtype=lower.dtype).expand_as(lower)
        while size < CHUNK:
            block = index // size
            below = (block[:, None] % 2 == 1) & (block[None] == block[:, None] - 1)
            between = torch.where(below, lower, 0.0)
            inverse = inverse - (between if size == 1 else inverse @ between @ inverse)
            size *= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        (inverse,) = ctx.saved_tensors
        turned = inverse.transpose(-1, -2)
        return -(turned @ grad @ turned)


def delta_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """Apply the gated delta rule by chunks (Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464), float32.

    Args:
        q: Normalised and scaled. Shape (B, H, T, D), T a multiple of CHUNK; so are k (normalised) and v.
        log_decay: Shape (B, H, T).
        beta: Shape (B, H, T).

    Returns:
        Shape (B, H, T, D).
    """
    q, k, v, log_decay, beta = (x.unflatten(2, (-1, CHUNK)) for x in (q, k, v, log_decay, beta))
    total = log_decay.cumsum(-1)
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~causal, float("-inf")).exp()
    k_beta = k * beta[..., None]
    system = (k_beta @ k.transpose(-1, -2)) * decay
    inverse = UnitLowerInverse.apply(system.tril(-1))
    within = (q @ k.transpose(-1, -2)) * decay
    values = inverse @ (v * beta[..., None])
    read = inverse @ (k_beta * total.exp()[..., None])
    q = q * total.exp()[..., None]
    k = (k * (total[..., -1:] - total).exp()[..., None]).transpose(-1, -2)
    kept = total[..., -1].exp()[..., None, None]
    state = torch.zeros(*q.shape[:2], q.shape[-1], v.shape[-1], device=q.device, dtype=q.dtype)
    out = []
    for i in range(q.shape[2]):
        new = values[:, :, i] - read[:, :, i] @ state
        out.append(q[:, :, i] @ state + within[:, :, i] @ new)
        state = state * kept[:, :, i] + k[:, :, i] @ new
    return torch.stack(out, dim=2).flatten(2, 3)


def delta_mixer(layer, x: torch.Tensor, starts: torch.Tensor, padding: torch.Tensor, dtype) -> torch.Tensor:
    """Apply a GatedDeltaNet layer. x is normalised, shape (B, T, hidden); starts and padding (B, T)."""
    tokens = x.shape[1]
    k_heads, v_heads, size = layer.num_k_heads, layer.num_v_heads, layer.head_k_dim
    qkv = linear(x, layer.in_proj_qkv.weight, dtype).masked_fill(padding[..., None], 0).float()
    taps = layer.conv1d.weight[:, 0]
    padded = F.pad(qkv, (0, 0, taps.shape[1] - 1, 0))
    mixed = sum(padded[:, i : i + tokens] * taps[:, i] for i in range(taps.shape[1]))
    q, k, v = F.silu(mixed).split([k_heads * size, k_heads * size, v_heads * size], dim=-1)
    q, k, v = (y.unflatten(-1, (-1, size)).transpose(1, 2) for y in (q, k, v))
    q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-6) * size**-0.5
    k = k * torch.rsqrt(k.square().sum(-1, keepdim=True) + 1e-6)
    q, k = (y.repeat_interleave(v_heads // k_heads, dim=1) for y in (q, k))
    step = F.softplus(linear(x, layer.in_proj_a.weight, dtype).float() + layer.dt_bias)
    log_decay = (-layer.A_log.exp() * step).masked_fill(starts[..., None], FORGET).transpose(1, 2)
    beta = linear(x, layer.in_proj_b.weight, dtype).float().sigmoid().transpose(1, 2)
    y = delta_rule(q, k, v, log_decay, beta).transpose(1, 2)
    gate = linear(x, layer.in_proj_z.weight, dtype).float().unflatten(-1, (-1, size))
    y = rms_norm(y, layer.norm.weight) * F.silu(gate)
    return linear(y.flatten(2), layer.out_proj.weight, dtype)


def attention_mixer(
    layer, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor, dtype
) -> torch.Tensor:
    """Apply a gated full attention layer. rope: cosine and sine (B, 1, T, rotary / 2); mask (B, 1, T, T)."""
    size = layer.head_dim

    def turned(y: torch.Tensor) -> torch.Tensor:
        cos, sin = rope
        half = cos.shape[-1]
        first, second, rest = y[..., :half], y[..., half : 2 * half], y[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(dtype)

    q, gate = linear(x, layer.q_proj.weight, dtype).unflatten(-1, (-1, 2 * size)).chunk(2, dim=-1)
    k = linear(x, layer.k_proj.weight, dtype).unflatten(-1, (-1, size))
    v = linear(x, layer.v_proj.weight, dtype).unflatten(-1, (-1, size)).transpose(1, 2)
    q = turned(rms_norm(q.float(), 1 + layer.q_norm.weight).transpose(1, 2))
    k = turned(rms_norm(k.float(), 1 + layer.k_norm.weight).transpose(1, 2))
    k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for y in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    return linear((y * gate.sigmoid()).flatten(2), layer.o_proj.weight, dtype)


def experts(layer, x: torch.Tensor, chosen_experts: int, dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Apply routed and shared experts. x is normalised. Also returns each expert's share of tokens and mean probability."""
    probabilities = linear(x, layer.gate.weight, torch.float32).softmax(-1)
    least = probabilities.topk(chosen_experts, dim=-1).values[..., -1:]
    sent = probabilities >= least
    weights = probabilities * sent
    weights = weights / weights.sum(-1, keepdim=True)
    gate_up, down = layer.experts.gate_up_proj, layer.experts.down_proj
    gate, up = linear(x, gate_up.flatten(0, 1), dtype).unflatten(-1, (len(gate_up), 2, -1)).unbind(-2)
    inner = (F.silu(gate) * up * weights[..., None].to(dtype)).flatten(-2)
    y = linear(inner, down.transpose(0, 1).flatten(1), dtype)
    shared = layer.shared_expert
    inner = F.silu(linear(x, shared.gate_proj.weight, dtype)) * linear(x, shared.up_proj.weight, dtype)
    shared_y = linear(inner, shared.down_proj.weight, dtype)
    gate = linear(x, layer.shared_expert_gate.weight, dtype).sigmoid()
    return y + gate * shared_y, sent.float().mean((0, 1)), probabilities.mean((0, 1))


COMPILED = tuple(torch.compile(f, dynamic=False, fullgraph=True) for f in (delta_mixer, attention_mixer, experts))


def packed_loss(
    model: Qwen3_5MoeForCausalLM,
    ids: torch.Tensor,
    learnt: torch.Tensor,
    positions: torch.Tensor,
    dtype: torch.dtype,
    *,
    pad: int,
    compiled: bool = False,
) -> torch.Tensor:
    """Mean loss over the learnt tokens, plus the router's balancing term.

    Args:
        model: Its parameters, in float32, get the gradients.
        ids: Shape (B, T), T a multiple of CHUNK; so are learnt (bool) and positions (within the document).
        dtype: Dtype of matrix products.
        pad: Id between documents.
        compiled: Let PyTorch's compiler fuse each layer.
    """
    config, tokens = model.config, ids.shape[1]
    mix_delta, attend, route = COMPILED if compiled else (delta_mixer, attention_mixer, experts)
    starts, padding = positions == 0, ids == pad
    document = starts.cumsum(1)
    order = torch.arange(tokens, device=ids.device)
    mask = ((document[:, :, None] == document[:, None]) & (order[:, None] >= order))[:, None]
    rotary = int(config.head_dim * config.rope_parameters["partial_rotary_factor"])
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, rotary, 2, device=ids.device) / rotary)
    angles = (positions[..., None].float() * frequencies)[:, None]
    rope = (angles.cos(), angles.sin())

    h = F.embedding(ids, model.model.embed_tokens.weight)
    sent, probability = [], []
    for layer in model.model.layers:
        x = rms_norm(h, 1 + layer.input_layernorm.weight)
        if layer.block_type == "linear_attention":
            h = h + mix_delta(layer.linear_attn, x, starts, padding, dtype)
        else:
            h = h + attend(layer.self_attn, x, rope, mask, dtype)
        y, layer_sent, layer_probability = route(
            layer.mlp, rms_norm(h, 1 + layer.post_attention_layernorm.weight), config.num_experts_per_tok, dtype
        )
        h = h + y
        sent.append(layer_sent)
        probability.append(layer_probability)
    balance = (torch.stack(sent).mean(0) * torch.stack(probability).mean(0)).sum() * config.num_experts
    logits = linear(rms_norm(h, 1 + model.model.norm.weight), model.lm_head.weight, dtype)
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    wanted = learnt[:, 1:].flatten()
    return (each * wanted).sum() / wanted.sum() + config.router_aux_loss_coef * balance
