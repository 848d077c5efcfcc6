"""The same shapes in transformers and PyTorch: python -m benchmarks.gpu.peers_torch, started by the suite.

Same protocol as `benchmarks.gpu.worker`, `benchmarks.gpu.protocol`. Needs torch and transformers, not jax.
- generate: one batch of all samples, bfloat16 weights, sampling at temperature 1, every sample to its
  limit; with the dynamic cache, and with the static one, which transformers compiles.
- train: forward, clipped policy loss, backward, gradient clipping, fused AdamW on float32 parameters
  with bfloat16 autocast. The sequences that jaxrl packs into rows stand in rows of their own, all of one
  length, so nothing is padding on either side. Logits exist for a chunk of tokens at a time, made again
  in backward, as in jaxrl; attention is PyTorch's scaled_dot_product_attention.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu.cases import GPU, MAX_ROUNDS, TINY, WARM_UPS, Case, Scale
from benchmarks.gpu.protocol import ERROR_CHARACTERS, connect, told
from benchmarks.record import spread

ROUNDS = 3
"""Least of each case: a rollout takes many seconds."""
COMPILES = ("generate-static", "train-compiled")
"""Peers whose first calls compile; one call warms the others up."""
ATTENTION = "sdpa"
CLIP = 0.2
Result = dict[str, Any]


class Peer:
    """One model in PyTorch."""

    def __init__(self, scale: Scale, case: Case, device: str) -> None:
        shape = scale.models[case.model]
        self.scale, self.case, self.device = scale, case, device
        self.dtype = getattr(torch, scale.dtype)
        self.generator = torch.Generator(device).manual_seed(0)
        config = transformers.Qwen3Config(
            vocab_size=shape.vocab_size, hidden_size=shape.width,
            num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_size,
            intermediate_size=shape.ffw_size, max_position_embeddings=shape.max_positions,
            rope_theta=shape.rope_theta, rms_norm_eps=shape.norm_eps,
            tie_word_embeddings=shape.tied_embeddings, bos_token_id=None, eos_token_id=None,
            pad_token_id=0, attn_implementation=ATTENTION,
        )  # fmt: skip
        with torch.device(device):
            self.model = transformers.Qwen3ForCausalLM(config)
        assert self.model.config._attn_implementation == ATTENTION
        torch.set_float32_matmul_precision("high")  # as jax: float32 products through TF32
        parameters = sum(p.numel() for p in self.model.parameters())
        assert parameters == shape.num_parameters, (parameters, shape.num_parameters)

    def tokens(self, rows: int, tokens: int) -> torch.Tensor:
        """Random ids [rows, tokens]."""
        vocab = self.scale.models[self.case.model].vocab_size
        return torch.randint(0, vocab, (rows, tokens), device=self.device, generator=self.generator)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def generation(self) -> tuple[Callable[[], None], int]:
        """(one rollout, tokens that it samples)."""
        shape = self.scale.rollout
        self.model.to(self.dtype).eval()
        prompts = self.tokens(shape.prompts, shape.prompt_tokens)
        inputs = prompts.repeat_interleave(shape.group, dim=0)
        static = {"cache_implementation": "static"} if self.case.peer == "generate-static" else {}

        def once() -> None:
            with torch.inference_mode():
                out = self.model.generate(
                    inputs, attention_mask=torch.ones_like(inputs), do_sample=True,
                    max_new_tokens=shape.new_tokens, temperature=1.0, top_k=0, top_p=1.0, **static,
                )  # fmt: skip
            assert out.shape == (shape.samples, shape.length), out.shape

        return once, shape.samples * shape.new_tokens

    def training(self) -> tuple[Callable[[], None], int]:
        """(one optimizer step, tokens that it trains on)."""
        length = self.scale.sequence
        total = self.case.rows * self.case.tokens
        tokens = self.tokens(total // length, length)
        self.model.train()
        if self.case.remat == "block":
            self.model.gradient_checkpointing_enable()
        layers = self.model.model
        if self.case.peer == "train-compiled":
            layers = torch.compile(layers)
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0,
            fused=self.device == "cuda",
        )  # fmt: skip
        mask = (torch.arange(length - 1, device=self.device) >= length // 2 - 1).expand(
            tokens.shape[0], -1
        )
        sampler = torch.full(mask.shape, -10.0, device=self.device)
        advantages = torch.where(self.tokens(tokens.shape[0], 1) % 2 == 0, 1.0, -1.0)

        def once() -> None:
            optimizer.zero_grad(set_to_none=True)
            with self._precision():
                hidden = layers(input_ids=tokens, use_cache=False).last_hidden_state
                logprobs = self._logprobs(hidden[:, :-1], tokens[:, 1:])
            ratio = torch.exp(logprobs - sampler)
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            gain = torch.minimum(ratio * advantages, clipped * advantages)
            loss = -(gain * mask).sum() / mask.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()

        return once, total

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=self.dtype)

    def _logprobs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the targets; logits of `chunk_tokens` tokens exist at once."""

        def chunk(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            logits = self.model.lm_head(hidden).float()
            chosen = logits.gather(-1, targets[:, None])[:, 0]
            return chosen - torch.logsumexp(logits, dim=-1)

        flat = hidden.reshape(-1, hidden.shape[-1]).split(self.scale.chunk_tokens)
        wanted = targets.reshape(-1).split(self.scale.chunk_tokens)
        parts = [
            checkpoint(chunk, h, t, use_reentrant=False) for h, t in zip(flat, wanted, strict=True)
        ]
        return torch.cat(parts).reshape(targets.shape)


def run_case(scale: Scale, case: Case, device: str) -> Result:
    """Measure one case; {"status": "no room"} when it does not fit the device."""
    if device == "cuda" and not torch.cuda.is_available():
        return {"status": "skipped", "why": f"torch {torch.__version__} sees no CUDA device"}
    try:
        peer = Peer(scale, case, device)
        trains = case.peer.startswith("train")
        once, tokens = peer.training() if trains else peer.generation()
        facts = {"attention": ATTENTION, "dtype": scale.dtype}
        warm_ups = WARM_UPS if case.peer in COMPILES else 1
        timed = _timed(peer, once, tokens, warm_ups=warm_ups, seconds=scale.seconds)
        return {"status": "done", **facts, **timed}
    except torch.OutOfMemoryError as error:
        return {"status": "no room", "why": str(error)[:ERROR_CHARACTERS]}


def _timed(
    peer: Peer, once: Callable[[], None], tokens: int, *, warm_ups: int, seconds: float
) -> Result:
    def timed() -> float:
        began = time.perf_counter()
        once()
        peer.synchronize()
        return time.perf_counter() - began

    began = time.perf_counter()
    for _ in range(warm_ups):
        timed()
    warm_up_s = time.perf_counter() - began
    times: list[float] = []
    while len(times) < ROUNDS or (sum(times) < seconds and len(times) < MAX_ROUNDS):
        times.append(timed())
    result: Result = {
        "measured_s": spread(times), "tokens_per_s": tokens / statistics.median(times),
        "warm_up_s": warm_up_s,
    }  # fmt: skip
    if peer.device == "cuda":
        result |= {"peak_bytes": torch.cuda.max_memory_allocated(), "peak_is_this_cases": True}
    return result


def main() -> None:
    """Serve one job."""
    job, answer = connect()
    scale = GPU if job["scale"] == GPU.name else TINY
    seen = {"torch": torch.__version__, "transformers": transformers.__version__}
    if torch.version.cuda is not None:
        seen["torch cuda"] = torch.version.cuda
    answer({"ready": seen})
    for fields in job["cases"]:
        case = Case(**fields)
        device = "cuda" if job["device"] == "gpu" else "cpu"
        if not told(case.name, partial(run_case, scale, case, device), answer):
            return


if __name__ == "__main__":
    main()
