"""A small Llama-style decoder over bytes: RMSNorm, rotary positions, SwiGLU, causal attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Linear = Callable[..., Any]
"""Makes a linear layer: ``linear(inputs, outputs, use_bias=, kernel_init=, rngs=)``.

``nnx.Linear`` is one. Its kernel is ``(inputs, outputs)``.
"""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of the decoder.

    Attributes:
      vocab_size: number of symbols; 256 for bytes.
      width: length of the residual stream.
      depth: number of blocks.
      heads: attention heads; the head size ``width / heads`` must be even for the rotation.
      rope_base: base of the rotary frequencies.
      qk_norm: whether queries and keys pass a LayerNorm, per head and with the same scale for all
        heads. It keeps attention logits from growing at high learning rates.
    """

    vocab_size: int = 256
    width: int = 128
    depth: int = 4
    heads: int = 4
    rope_base: float = 10_000.0
    qk_norm: bool = False

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.heads) < 1:
            raise ValueError(f"width, depth and heads must be at least 1, got {self}")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width must be a multiple of 2 * heads = {2 * self.heads}, got {self.width}"
            )

    @property
    def mlp_width(self) -> int:
        """8/3 of the width, rounded up to a multiple of 32: three matrices cost what two did."""
        return -(-8 * self.width // 96) * 32


def rotate(x: jax.Array, base: float) -> jax.Array:
    """Turns each pair (first half, second half) of a head by an angle that grows with position.

    Args:
      x: queries or keys, ``(batch, time, heads, head_dim)``.
      base: pair ``i`` of ``n`` turns by ``position * base**(-i/n)``.
    """
    time, half = x.shape[1], x.shape[-1] // 2
    frequency = base ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.outer(jnp.arange(time, dtype=jnp.float32), frequency)[None, :, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)  # (1, time, 1, half)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


class Attention(nnx.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, linear: Linear, *, rngs: nnx.Rngs):
        width = config.width
        self.config = config
        into, out_of = _initializers(config)
        self.q_proj = linear(width, width, use_bias=False, kernel_init=into, rngs=rngs)
        self.k_proj = linear(width, width, use_bias=False, kernel_init=into, rngs=rngs)
        self.v_proj = linear(width, width, use_bias=False, kernel_init=into, rngs=rngs)
        self.o_proj = linear(width, width, use_bias=False, kernel_init=out_of, rngs=rngs)
        if config.qk_norm:
            self.q_norm = nnx.LayerNorm(width // config.heads, rngs=rngs)
            self.k_norm = nnx.LayerNorm(width // config.heads, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(batch, time, width)`` to the same shape; position t sees 0..t."""
        heads = (*x.shape[:2], self.config.heads, -1)
        q, k = self.q_proj(x).reshape(heads), self.k_proj(x).reshape(heads)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, self.config.rope_base), rotate(k, self.config.rope_base)
        v = self.v_proj(x).reshape(heads)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.reshape(x.shape))


class MLP(nnx.Module):
    """SwiGLU: a gate and a value, multiplied, and back to the width."""

    def __init__(self, config: ModelConfig, linear: Linear, *, rngs: nnx.Rngs):
        width, inner = config.width, config.mlp_width
        into, out_of = _initializers(config)
        self.gate_proj = linear(width, inner, use_bias=False, kernel_init=into, rngs=rngs)
        self.up_proj = linear(width, inner, use_bias=False, kernel_init=into, rngs=rngs)
        self.down_proj = linear(inner, width, use_bias=False, kernel_init=out_of, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(batch, time, width)`` to the same shape."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """Attention, then the MLP, each added to the residual stream after a norm on its input."""

    def __init__(self, config: ModelConfig, linear: Linear, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.attention = Attention(config, linear, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.mlp = MLP(config, linear, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(batch, time, width)`` to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nnx.Module):
    """Bytes in, logits of the next byte out.

    Args:
      config: the shape.
      linear: what makes the seven projections of each block; a quantised layer goes here. The
        embedding and the head stay as they are.
      rngs: the source of the initial weights.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, linear: Linear = nnx.Linear):
        into, _ = _initializers(config)
        self.embed = nnx.Embed(config.vocab_size, config.width, embedding_init=into, rngs=rngs)
        self.layers = nnx.List([Block(config, linear, rngs=rngs) for _ in range(config.depth)])
        self.final_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.lm_head = nnx.Linear(
            config.width, config.vocab_size, use_bias=False, kernel_init=into, rngs=rngs
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits ``(batch, time, vocab)`` for integer tokens ``(batch, time)``."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.final_norm(x))


def _initializers(config: ModelConfig) -> tuple[Any, Any]:
    """GPT-2's: 0.02, less where a matrix writes into a residual stream with 2*depth writers."""
    return nnx.initializers.normal(0.02), nnx.initializers.normal(0.02 / (2 * config.depth) ** 0.5)
