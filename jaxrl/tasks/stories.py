"""Finish a short story: for checkpoints trained on TinyStories, which only continue text.

The prompt is the opening of a story, up to its turning point. A completion is right when the story
- ends: a stop token comes before the length limit,
- returns to its character: the name stands in one of the last two sentences,
- keeps its subject: the thing that the opening is about occurs again,
- is still a story: it has at least four sentences (a shorter ending would be the easiest way to
  end).

Each rule is exact and each is a part of the reward, but none of them judges the prose: train with a
small learning rate or a KL weight. With the 512-token vocabulary of stories260K, whose own stories
run to 350 tokens, an opening has 90 to 117 tokens. That checkpoint, sampled at temperature 1 on 512
openings of the train split:

    most new tokens     pass@1    ended    name    thing    length
    128                  0.029     0.12    0.52     0.74      0.96
    160                  0.068     0.21    0.50     0.76      0.97
    192                  0.119     0.33    0.48     0.76      0.97
    224                  0.154     0.44    0.49     0.76      0.97
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import lru_cache

from jaxrl.config import TaskConfig
from jaxrl.tasks.base import Split, drawable, most_problems, problem_id, split_of, uniform
from jaxrl.types import Problem, Reward

_GIRLS = ("Lily", "Mia", "Sue", "Anna", "Sara", "Lucy", "Amy", "Jane")
_BOYS = ("Tim", "Tom", "Ben", "Max", "Jack", "Sam", "Bob", "Timmy")
_PLACES = ("park", "garden", "forest", "yard", "house", "river")
_LOOKS = ("big", "red", "blue", "little", "new", "pretty", "shiny")
_THINGS = ("ball", "doll", "car", "book", "hat", "box", "toy", "kite", "boat", "flower")
_FRIENDS = ("dog", "cat", "bird", "bear", "rabbit")
_TURNS = (
    "{He} wanted to play with the {thing}, but it was too high. {name} was sad. "
    "Then a big {friend} came and gave {him} the {thing}.",
    "{He} played with the {thing} all day, but then it was gone. {name} was sad. "
    "Then a big {friend} came and found the {thing}.",
)
_OPENING = (
    "Once upon a time, there was a little {child} named {name}. {He} loved to play in the {place}. "
    'One day, {name} saw a {look} {thing}. {turn} {name} said, "Thank you!"'
)
_SOLUTION = (
    " The {friend} was very happy. They played with the {thing} all day. When it was time to go "
    "home, {name} gave the {friend} a big hug. From that day on, {name} and the {friend} were "
    "best friends."
)
_FEWEST_SENTENCES = 4
_LAST_SENTENCES = 2
_SENTENCE_END = re.compile(r"""[.!?]+["'”’]*(?:\s+|$)""")


class StoriesTask:
    """Reward 1 if all four rules hold, else 0.

    Parts, each 0 or 1: `ended`, `name`, `thing`, `length`.
    """

    name = "stories"
    alphabet = None
    chance_rate = 0.0
    """Random tokens practically never end a sentence with the right name."""

    def __init__(self, config: TaskConfig, seed: int) -> None:
        """Takes num_train and num_eval from the configuration."""
        self._config = config
        self._seed = seed

    def problems(self, split: Split) -> Sequence[Problem]:
        """Openings of a split; the answer is "name thing"."""
        return _problems(self._seed, split, most_problems(self._config, split))

    def verify(self, problem: Problem, completion: str, finished: bool) -> Reward:
        """Apply the four rules; unfinished is wrong, but its other parts are still judged."""
        name, thing = problem.answer.split(" ")
        sentences = split_sentences(completion)
        parts = {
            "ended": finished,
            "name": occurs(name, " ".join(sentences[-_LAST_SENTENCES:])),
            "thing": occurs(thing, completion),
            "length": len(sentences) >= _FEWEST_SENTENCES,
        }
        correct = all(parts.values())
        return Reward(
            total=float(correct),
            parts={part: float(holds) for part, holds in parts.items()},
            correct=correct,
        )


def split_sentences(text: str) -> list[str]:
    """Sentences of a text without their end marks; an unfinished one at the end counts."""
    return [sentence for sentence in _SENTENCE_END.split(text) if sentence.strip()]


def occurs(word: str, text: str) -> bool:
    """Whether the text has the word, capitals as given, alone or with a plural or possessive s."""
    return re.search(rf"\b{re.escape(word)}(?:s|'s|’s)?\b", text) is not None


@lru_cache(maxsize=12)
def _problems(seed: int, split: Split, most: int) -> tuple[Problem, ...]:
    children = len(_GIRLS) + len(_BOYS)
    space = children * len(_PLACES) * len(_LOOKS) * len(_THINGS) * len(_FRIENDS) * len(_TURNS)
    rng = random.Random(seed)
    found: dict[int, Problem] = {}
    while len(found) < min(most, drawable(space, split)):
        problem = _draw(rng)
        if split_of(problem.id) == split:
            found[problem.id] = problem
    return tuple(found.values())


def _draw(rng: random.Random) -> Problem:
    girl = rng.random() < 0.5
    name = _pick(rng, _GIRLS if girl else _BOYS)
    thing, friend = _pick(rng, _THINGS), _pick(rng, _FRIENDS)
    he, him = ("She", "her") if girl else ("He", "him")
    turn = _pick(rng, _TURNS).format(He=he, him=him, name=name, thing=thing, friend=friend)
    prompt = _OPENING.format(
        child="girl" if girl else "boy",
        name=name,
        He=he,
        place=_pick(rng, _PLACES),
        look=_pick(rng, _LOOKS),
        thing=thing,
        turn=turn,
    )
    return Problem(
        id=problem_id(f"stories {prompt}"),
        prompt=prompt,
        answer=f"{name} {thing}",
        solution=_SOLUTION.format(name=name, thing=thing, friend=friend),
    )


def _pick(rng: random.Random, choices: Sequence[str]) -> str:
    return choices[uniform(rng, 0, len(choices) - 1)]
