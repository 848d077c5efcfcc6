"""The stream of prompts: each problem once per epoch, in shuffled order, resumable exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grain

from jaxrl.chat import ChatTokenizer
from jaxrl.errors import UserError
from jaxrl.tasks.base import stable_hash
from jaxrl.tokenizer import Tokenizer
from jaxrl.types import Problem, Prompt


class PromptStream:
    """Endless; reshuffled each epoch. One caller draws at a time; starts no process or thread."""

    def __init__(
        self,
        problems: Sequence[Problem],
        tokenizer: Tokenizer,
        seed: int,
        max_prompt_tokens: int,
        add_bos: bool,
    ) -> None:
        """Tokenize every problem, so that one that does not fit is found now.

        add_bos: put the tokenizer's start token first; it counts towards max_prompt_tokens.
        Raises: UserError for no problems, a prompt that is too long or empty, or add_bos without
        such a token.
        """
        if not problems:
            raise UserError(
                "the stream of prompts got 0 problems; raise task.num_train to at least 1"
            )
        self._problems = problems
        self._places = {problem.id: place for place, problem in enumerate(problems)}
        self._tokens = [encode_prompt(p, tokenizer, max_prompt_tokens, add_bos) for p in problems]
        self._fingerprint = stable_hash(f"{seed} {[problem.id for problem in problems]}")
        order = grain.MapDataset.source(range(len(problems))).seed(seed).shuffle().repeat()
        # A map dataset's own iterator reads ahead in 16 threads.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._shuffled = order
        self._order = iter(order.to_iter_dataset(options))
        self._index = 0

    def next(self) -> Prompt:
        """The next prompt; `index` counts from 0 over the whole run."""
        prompt = self._prompt(self._index, next(self._order))
        self._index += 1
        return prompt

    def at(self, index: int) -> Prompt:
        """The prompt at position `index`, whatever was drawn before."""
        return self._prompt(index, self._shuffled[index])

    @property
    def num_problems(self) -> int:
        """Problems of one epoch."""
        return len(self._problems)

    def of_problem(self, problem: int, index: int) -> Prompt:
        """The problem with the id `problem` as a prompt named `index`, whatever the order."""
        return self._prompt(index, self._places[problem])

    def _prompt(self, index: int, at: int | None) -> Prompt:
        assert at is not None  # only filters, of which there are none, make gaps
        return Prompt(index=index, problem=self._problems[at], tokens=self._tokens[at])

    def state(self) -> dict[str, Any]:
        """The position, JSON-able: `restore` makes any equal stream go on from here."""
        return {
            "index": self._index,
            "grain": self._order.get_state(),
            "fingerprint": self._fingerprint,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved position. Raises: UserError if it is of other problems or seed."""
        if state["fingerprint"] != self._fingerprint:
            raise UserError(
                "the checkpoint's prompt position belongs to other problems or another seed than "
                "this run's; restore the task and run.seed settings it was made with, or start a "
                "new run folder"
            )
        self._order.set_state(state["grain"])
        self._index = state["index"]


def encode_prompt(
    problem: Problem, tokenizer: Tokenizer, max_prompt_tokens: int, add_bos: bool
) -> tuple[int, ...]:
    """Token ids of a problem's prompt, the start token first if `add_bos`.

    Raises: UserError if there are none or more than max_prompt_tokens, or if there is no start
    token.
    """
    start: list[int] = []
    if add_bos:
        if tokenizer.bos_id is None:
            raise UserError(
                f"tokenizer {tokenizer.name} has no start token to put first; use add_bos=False"
            )
        start = [tokenizer.bos_id]
    if isinstance(tokenizer, ChatTokenizer):
        tokens = (*start, *tokenizer.encode_question(problem.prompt))
    else:
        tokens = (*start, *tokenizer.encode(problem.prompt))
    if not tokens:
        raise UserError(f"problem {problem.id} has an empty prompt; give it at least one token")
    if len(tokens) > max_prompt_tokens:
        raise UserError(
            f"the prompt {problem.prompt[:60]!r} has {len(tokens)} tokens, more than "
            f"rollout.max_prompt_tokens={max_prompt_tokens}; set rollout.max_prompt_tokens to at "
            f"least {len(tokens)} or shorten the prompt"
        )
    return tokens
