"""What supervised training on chats learns: the chats of a configuration, in the order of its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from jaxrl.batch import Batch
from jaxrl.chat import find_chat_template
from jaxrl.chats import Chat, Renderer, read_chats, to_sequences
from jaxrl.config import Config
from jaxrl.errors import UserError
from jaxrl.packing import pack
from jaxrl.policy import THINKING, read_checkpoint
from jaxrl.tokenizer import Tokenizer
from models.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """What is learnt, by what: needs no device."""

    model: ModelConfig
    tokenizer: Tokenizer
    train: Sequence[Chat]
    held_out: Sequence[Chat]
    skipped: int
    """Rows left out as too long."""

    def steps(self, config: Config) -> int:
        """Optimizer steps of the whole run."""
        sft = config.sft
        return sft.steps or math.ceil(sft.epochs * len(self.train) / sft.sequences_per_step)


def read_material(config: Config) -> Material:
    """Checkpoint, tokenizer and all chats. Raises: UserError for the first thing that cannot be used."""
    source, sft = config.sft.path, config.sft
    if source is None:
        raise UserError("sft.path names no chats; set it to a file of one JSON object per line")
    model, tokenizer, folder = read_checkpoint(config.model)
    renderer = Renderer(
        tokenizer=tokenizer, template=find_chat_template(folder), chat=config.model.chat,
        system=config.model.system, thinking=THINKING[config.model.thinking],
    )  # fmt: skip
    longest = min(config.train.row_tokens, model.max_positions)
    read = partial(read_chats, renderer=renderer, longest=longest, skip_long=sft.skip_long)
    chats, skipped = read(source)
    if sft.test_path is not None:
        held_out, _ = read(sft.test_path)
        train = chats
    else:
        held_out = [chat for chat in chats if chat.position < sft.held_out_share]
        train = [chat for chat in chats if chat.position >= sft.held_out_share]
    if not train:
        raise UserError(
            f"sft.held_out_share={sft.held_out_share} leaves none of the {len(chats)} chats to train on; "
            "lower it, or give more chats"
        )
    return Material(
        model=replace(model, lora=config.lora.shape), tokenizer=tokenizer, train=train,
        held_out=held_out[: config.eval.problems], skipped=skipped,
    )  # fmt: skip


def chosen(config: Config, step: int, total: int) -> list[int]:
    """Positions of the chats of optimizer step `step`, from 1: a new order in every epoch."""
    per_step = config.sft.sequences_per_step
    wanted = range((step - 1) * per_step, step * per_step)
    if not config.sft.steps:
        wanted = [i for i in wanted if i < config.sft.epochs * total]
    orders = {
        epoch: np.random.default_rng([config.run.seed, 2, epoch]).permutation(total)
        for epoch in {i // total for i in wanted}
    }
    return [int(orders[i // total][i % total]) for i in wanted]


def packed(config: Config, chats: Sequence[Chat]) -> tuple[list[Batch], float]:
    """(micro-batches, share of padding)."""
    train = config.train
    batches, stats = pack(
        to_sequences(chats), row_tokens=train.row_tokens,
        rows_per_microbatch=train.rows_per_microbatch,
    )  # fmt: skip
    return batches, stats.padding_ratio
