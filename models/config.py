"""Architecture of a dense decoder, as numbers. Standard library only, so that `roofline` can read it.

Letters used everywhere: L layers, D width, N query heads, K kv heads, H head size, F ffw, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape of a Llama-like decoder (Llama, Qwen2, Qwen3, SmolLM3, Mistral are settings of it)."""

    family: str = "llama"
    """Which family's Hugging Face names and defaults apply: llama, mistral, qwen2, qwen3, smollm3."""
    vocab_size: int
    """V, rows of the embedding [tokens]."""
    width: int
    """D, size of the residual stream."""
    num_layers: int
    """L."""
    num_heads: int
    """N, query heads."""
    num_kv_heads: int
    """K, key and value heads; divides N."""
    head_size: int
    """H; N * H need not equal D."""
    ffw_size: int
    """F, inner size of the MLP."""
    max_positions: int = 2048
    """Longest sequence the position encoding was made for [tokens]."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    gated_mlp: bool = True
    """True: down(silu(gate(x)) * up(x)). False: down(silu(up(x)))."""
    qk_norm: bool = False
    """RMSNorm over each head of q and k before RoPE (Qwen3)."""
    qkv_bias: bool = False
    """Bias on the q, k, v projections (Qwen2)."""
    tied_embeddings: bool = True
    """The head is the transposed embedding; False: a matrix of its own."""
    no_rope_layers: tuple[int, ...] = ()
    """Indices of layers without rotary encoding (SmolLM3: every fourth)."""
    bos_token_id: int | None = None
    """Token that starts a text, if the family uses one."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                f"use one of {[k for k in range(1, self.num_heads + 1) if self.num_heads % k == 0]} kv heads"
            )
        if self.head_size % 2:
            raise ValueError(
                f"head_size={self.head_size} is odd; RoPE rotates pairs, use an even size"
            )
        if any(not 0 <= i < self.num_layers for i in self.no_rope_layers):
            raise ValueError(
                f"no_rope_layers={self.no_rope_layers} must lie in 0..{self.num_layers - 1}"
            )

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer: attention, MLP, norms, biases."""
        q, kv = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        attention = self.width * (q + 2 * kv) + q * self.width
        mlp = (3 if self.gated_mlp else 2) * self.width * self.ffw_size
        norms = 2 * self.width + (2 * self.head_size if self.qk_norm else 0)
        return attention + mlp + norms + ((q + 2 * kv) if self.qkv_bias else 0)

    @property
    def num_parameters(self) -> int:
        """All parameters; a tied head counts once."""
        embeddings = self.vocab_size * self.width * (1 if self.tied_embeddings else 2)
        return embeddings + self.num_layers * self.layer_parameters + self.width

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes of keys and values that one cached token takes over all layers: 2 L K H bytes."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * bytes_per_value
