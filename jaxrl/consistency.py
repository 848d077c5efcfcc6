"""What must hold between sections of the configuration; what holds within one is `jaxrl.ranges`' to say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxrl.errors import UserError

if TYPE_CHECKING:
    from jaxrl.config import Config


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def check_consistency(config: Config) -> None:
    """Raises: UserError for the first contradiction."""
    filtered = config.rollout.top_p < 1 or config.rollout.top_k > 0
    grpo = config.grpo
    to_sampler = (
        grpo.ratio_from == "sampler" or grpo.correction != "none" or grpo.sequence_mask != "none"
    )
    _check(
        not filtered or not to_sampler,
        f"rollout.top_p={config.rollout.top_p} and rollout.top_k={config.rollout.top_k} renormalise what "
        "is sampled from, which the learner does not, so a ratio to the sampler would be wrong; set "
        "grpo.ratio_from=learner with grpo.correction=none and grpo.sequence_mask=none, or top_p=1 and top_k=0",
    )
    _check(
        grpo.overlong_buffer <= config.rollout.max_new_tokens,
        f"grpo.overlong_buffer={grpo.overlong_buffer} is longer than the longest completion, "
        f"rollout.max_new_tokens={config.rollout.max_new_tokens}; set it to 0 for a fifth of that",
    )
    _check(
        config.grpo.reward_from != "majority"
        or config.task.name == "arithmetic"
        or config.task.judge in ("exact", "math"),
        f"grpo.reward_from=majority counts final answers, which task {config.task.name} judged by "
        f"{config.task.judge or 'its own rule'} does not have; use task arithmetic, gsm8k, math, or jsonl "
        "with task.verifier exact or math",
    )
    config.curriculum.check_against(
        max_new_tokens=config.rollout.max_new_tokens, slots=config.rollout.slots,
        reward_from=config.grpo.reward_from,
    )  # fmt: skip
    _check(
        config.task.shaping.kind == "verifier" or grpo.length_reward == "none",
        f"task.shaping.kind=magistral and grpo.length_reward={grpo.length_reward} both take off for length; "
        "set grpo.length_reward=none",
    )
    _check(
        config.lora.rank == 0 or config.grpo.advantage_baseline != "value",
        f"lora.rank={config.lora.rank} trains an adapter, which a critic (grpo.advantage_baseline=value) "
        "cannot share; choose another baseline, or lora.rank=0",
    )
    _check(
        config.rollout.temperature > 0,
        f"rollout.temperature={config.rollout.temperature} must be positive: greedy samples of a group "
        "are all alike; usual: 1",
    )
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    _check(
        config.train.row_tokens >= longest,
        f"train.row_tokens={config.train.row_tokens} is shorter than rollout.max_prompt_tokens + "
        f"rollout.max_new_tokens = {longest}; set train.row_tokens to at least {longest}",
    )
    _check_rows(config)
    _check_prefixes(config)
    _check_attention(config)


def _check_rows(config: Config) -> None:
    """Rows with shared prompts hold every prompt and completion."""
    train, rollout = config.train, config.rollout
    shared = train.shared_prompts
    if shared is None:
        _check(
            train.row_parts == 1,
            f"train.row_parts={train.row_parts} divides rows with shared prompts, and there are none; set "
            "train.shared_prompt_tokens, or row_parts=1",
        )
        return
    _check(
        shared.prompt_tokens >= rollout.max_prompt_tokens - 1,
        f"train.shared_prompt_tokens={shared.prompt_tokens} does not hold a prompt of "
        f"rollout.max_prompt_tokens={rollout.max_prompt_tokens}, of which all but the last token are "
        f"shared; set it to at least {rollout.max_prompt_tokens - 1}",
    )
    least = shared.prompt_tokens + shared.parts * rollout.max_new_tokens
    try:
        part = shared.part_tokens(train.row_tokens)
    except ValueError as error:
        raise UserError(f"train.row_tokens={train.row_tokens}, train.row_parts: {error}") from error
    _check(
        part >= rollout.max_new_tokens,
        f"train.row_tokens={train.row_tokens} leaves parts of {part} tokens, shorter than "
        f"rollout.max_new_tokens={rollout.max_new_tokens}; set train.row_tokens to at least {least}",
    )


def _check_prefixes(config: Config) -> None:
    """Shared prompts keep all slots busy, lie on the slots' devices, and are read by a program that can."""
    rollout, parts = config.rollout, config.mesh.rollout_data
    rows, group = rollout.shared_prefix, config.grpo.samples_per_prompt
    if not rows:
        return
    least = parts * -(-rollout.slots // (group * parts))
    _check(
        rows >= least and rows % parts == 0,
        f"rollout.shared_prefix={rows} prompts for {group} slots each must cover rollout.slots="
        f"{rollout.slots} and come out equal on mesh.rollout_data={parts} devices; use a multiple of {parts} "
        f"from {least} on, such as {2 * least}, or 0",
    )
    _check(
        rollout.attention in ("auto", "blocks", "xla"),
        f"rollout.attention={rollout.attention} knows no shared prompts; set it to auto, or "
        "rollout.shared_prefix=0",
    )


def _check_attention(config: Config) -> None:
    """cuDNN and the decode kernels take what they are made for."""
    model, rollout = config.model, config.rollout
    for name, program in (("model", model.attention), ("rollout", rollout.attention)):
        _check(
            program != "cudnn" or model.dtype == "bfloat16",
            f"{name}.attention=cudnn computes in bfloat16, not in model.dtype={model.dtype}; set "
            f"model.dtype=bfloat16, or {name}.attention=auto",
        )
    _check(
        config.train.shared_prompts is None or model.attention in ("auto", "blocks", "xla"),
        f"model.attention={model.attention} knows no rows with shared prompts; set model.attention=xla, or "
        "train.shared_prompt_tokens=0",
    )
    _check(
        rollout.attention not in ("cudnn", "pallas")
        or rollout.stored_dtype(model.dtype) == model.dtype,
        f"rollout.attention={rollout.attention} reads a cache in the model's type {model.dtype}, not "
        f"rollout.cache_dtype={rollout.cache_dtype}; set one of the two to auto",
    )
