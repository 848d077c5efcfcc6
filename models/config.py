"""Architecture of a dense decoder, as numbers. Standard library only, so that `roofline` can read it.

Letters used everywhere: L layers, D width, N query heads, K kv heads, H head size, F ffw, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """How the rotary frequencies of a context of `original_max_positions` are stretched.

    linear (arXiv:2306.15595 eq. 4): every frequency divided by `factor`.
    llama3 (Llama 3.1, rope_scaling.py of meta-llama/llama-models): only the slow ones, those that turn
    less than `low_frequency_factor` times over the original context; those that turn more than
    `high_frequency_factor` times stay; between the two, a linear mixture.
    yarn (arXiv:2309.00071 section 3.2): the same idea with a ramp over the pairs, from `beta_fast` to
    `beta_slow` turns, and cosine and sine multiplied by `attention_factor`.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_positions: int = 0
    """Longest sequence before stretching [tokens]; unused by linear."""
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """yarn: the ends of the ramp are rounded outwards to whole pairs."""
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        if not self.factor >= 1:
            raise ValueError(f"rope scaling factor={self.factor} must be at least 1")
        if self.kind != "linear" and self.original_max_positions < 1:
            raise ValueError(
                f"rope scaling original_max_positions={self.original_max_positions} must be positive"
            )
        if self.kind == "llama3" and not self.high_frequency_factor > self.low_frequency_factor > 0:
            raise ValueError(
                f"rope scaling low_frequency_factor={self.low_frequency_factor} must lie between 0 and "
                f"high_frequency_factor={self.high_frequency_factor}"
            )
        if self.kind == "yarn" and not self.beta_fast > self.beta_slow > 0:
            raise ValueError(
                f"rope scaling beta_slow={self.beta_slow} must lie between 0 and "
                f"beta_fast={self.beta_fast}"
            )


LORA_TARGETS = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "attention_out",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
}  # fmt: skip
"""Weights that an adapter can be put on: their name in transformers and peft, and ours."""
ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """Shape of a low-rank adapter (arXiv:2106.09685): what is trained in place of the weights."""

    rank: int
    """r."""
    alpha: float
    """The adapter's product is multiplied by alpha / r."""
    targets: tuple[str, ...]
    """Weights that have one, by our names."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank={self.rank} must be at least 1; usual: 8 to 64")
        if not self.alpha > 0:
            raise ValueError(
                f"lora.alpha={self.alpha} must be positive; usual: once or twice the rank"
            )

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    @classmethod
    def of(cls, rank: int, alpha: float, targets: str) -> Lora:
        """targets: `all-linear`, or names of LORA_TARGETS separated by commas.

        Raises: ValueError for a rank, an alpha or a target that cannot be.
        """
        names = [name.strip() for name in targets.split(",")]
        if targets == ALL_LINEAR:
            names = list(LORA_TARGETS)
        for name in names:
            if name not in LORA_TARGETS:
                raise ValueError(
                    f"lora.targets={targets!r} names {name!r}; write {ALL_LINEAR}, or some of "
                    f"{','.join(LORA_TARGETS)}"
                )
        chosen = tuple(own for theirs, own in LORA_TARGETS.items() if theirs in names)
        return cls(rank=rank, alpha=alpha, targets=chosen)


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
    rope_scaling: RopeScaling | None = None
    """How they are stretched for longer sequences than pretraining's."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    gated_mlp: bool = True
    """True: down(silu(gate(x)) * up(x)). False: down(silu(up(x)))."""
    num_experts: int = 0
    """E, MLPs of a layer that a router chooses from (for predictions: `models` computes dense
    decoders only); 0: one MLP and no router."""
    experts_per_token: int = 0
    """MLPs that each token goes through."""
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
    lora: Lora | None = None
    """The adapter that is trained in place of the weights, if any; no other size counts it."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                f"use one of {[k for k in range(1, self.num_heads + 1) if self.num_heads % k == 0]} kv heads"
            )
        if not (self.num_experts == self.experts_per_token == 0
                or 1 <= self.experts_per_token <= self.num_experts):  # fmt: skip
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must lie in 1..num_experts="
                f"{self.num_experts}, or both be 0"
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
        mlp = max(1, self.num_experts) * self.mlp_parameters + self.width * self.num_experts
        norms = 2 * self.width + (2 * self.head_size if self.qk_norm else 0)
        return attention + mlp + norms + ((q + 2 * kv) if self.qkv_bias else 0)

    @property
    def mlp_parameters(self) -> int:
        """Parameters of one MLP."""
        return (3 if self.gated_mlp else 2) * self.width * self.ffw_size

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets: all, but of the experts only those it goes through."""
        idle = self.num_experts - self.experts_per_token
        return self.num_parameters - self.num_layers * idle * self.mlp_parameters

    @property
    def num_parameters(self) -> int:
        """All parameters; a tied head counts once."""
        embeddings = self.vocab_size * self.width * (1 if self.tied_embeddings else 2)
        return embeddings + self.num_layers * self.layer_parameters + self.width

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes of keys and values that one cached token takes over all layers: 2 L K H bytes."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * bytes_per_value
