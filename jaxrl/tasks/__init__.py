"""What the policy learns to do: problems with exact verifiers. Nothing here loads jax."""

from jaxrl.config import TaskConfig
from jaxrl.tasks.arithmetic import ArithmeticTask
from jaxrl.tasks.base import Split, Task
from jaxrl.tasks.countdown import CountdownTask
from jaxrl.tasks.jsonl import JsonlTask
from jaxrl.tasks.stories import StoriesTask

__all__ = ["Split", "Task", "make_task"]


def make_task(config: TaskConfig, seed: int) -> Task:
    """The task that the configuration names.

    seed: chooses which problems are taken where a task has more than asked for; never their split.
    Raises: UserError for a value that the task cannot serve.
    """
    if config.name == "arithmetic":
        return ArithmeticTask(config, seed)
    if config.name == "countdown":
        return CountdownTask(config, seed)
    if config.name == "stories":
        return StoriesTask(config, seed)
    return JsonlTask(config, seed)
