"""What the policy learns to do: problems with exact verifiers. Nothing here loads jax."""

from jaxrl.config import TaskConfig
from jaxrl.errors import UserError
from jaxrl.tasks.arithmetic import ArithmeticTask
from jaxrl.tasks.base import Split, Task
from jaxrl.tasks.code import CODE
from jaxrl.tasks.countdown import CountdownTask
from jaxrl.tasks.files import FileTask, JudgedFileTask
from jaxrl.tasks.gsm8k import GSM8K
from jaxrl.tasks.jsonl import JSONL
from jaxrl.tasks.math import MATH
from jaxrl.tasks.stories import StoriesTask

__all__ = ["Split", "Task", "make_task"]

_FORMS = {form.name: form for form in (GSM8K, MATH, CODE, JSONL)}


def make_task(config: TaskConfig, seed: int) -> Task:
    """The task that the configuration names.

    seed: chooses which problems are taken where a task has more than asked for; never their split.
    Raises: UserError for a value that the task cannot serve.
    """
    if config.name in _FORMS:
        kind = FileTask if config.judge == "exact" else JudgedFileTask
        return kind(config, seed, _FORMS[config.name])
    if config.shaping.kind != "verifier":
        raise UserError(
            f"task.shaping.kind={config.shaping.kind}, but task {config.name} has a form of its own; leave it "
            f"out, or set task.name to one of {', '.join(_FORMS)}"
        )
    if config.verifier is not None:
        raise UserError(
            f"task.verifier={config.verifier}, but task {config.name} has its own exact check; leave "
            f"task.verifier out, or set task.name to one of {', '.join(_FORMS)}"
        )
    if config.name == "countdown":
        return CountdownTask(config, seed)
    if config.name == "stories":
        return StoriesTask(config, seed)
    return ArithmeticTask(config, seed)
