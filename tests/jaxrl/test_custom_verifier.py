"""A user's own verifier function: how it is found, called, and what its values and failures become."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from jaxrl.config import TaskConfig
from jaxrl.errors import UserError, user_message
from jaxrl.rewards.custom import check_custom, load_custom
from jaxrl.rewards.pool import RewardPool, VerifierError
from jaxrl.rewards.verifiers import Verifier, VerifierTask
from jaxrl.types import Problem, Reward

RESULT_S = 60.0
OWN = """
import math
import numpy as np

def score(prompt, completion, answer, row):
    return eval(completion, {"prompt": prompt, "answer": answer, "row": row, "math": math, "np": np})

def half(*, completion, answer, **others):
    return 0.5 * (completion == answer)

def narrow(completion):
    return 1.0

PLAIN = 3
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "my_rewards.py"
    path.write_text(OWN)
    return str(path)


def _score(own: str, completion: str, row: Mapping[str, object] | None = None) -> Reward:
    return load_custom(f"{own}:score")("2+2=", completion, row or {"answer": "4", "level": 3})


def test_it_gets_prompt_answer_and_row_and_a_number_is_the_reward(own: str):
    assert _score(own, "(prompt, answer, row['level']) == ('2+2=', '4', 3)") == Reward(
        total=1.0, parts={"score": 1.0}, correct=True
    )
    assert _score(own, "0.99") == Reward(total=0.99, parts={"score": 0.99}, correct=False)
    assert _score(own, "True").correct
    assert load_custom(f"{own}:half")("", "4", {"answer": "4"}).total == 0.5


@pytest.mark.parametrize(
    ("value", "total", "correct", "parts"),
    [
        ("{'right': 1, 'short': 0.25}", 1.25, True, {"right": 1.0, "short": 0.25}),
        ("{'correct': 1, 'length': -0.5}", 0.5, True, {"correct": 1.0, "length": -0.5}),
        ("{'correct': 0, 'style': 2}", 2.0, False, {"correct": 0.0, "style": 2.0}),
        ("{'reward': 0.3, 'style': 2}", 0.3, False, {"style": 2.0}),
        ("{'hit': np.bool_(True), 'near': np.array(0.5)}", 1.5, True, {"hit": 1.0, "near": 0.5}),
    ],
)
def test_a_mapping_names_parts(own: str, value: str, total: float, correct: bool, parts: dict):
    reward = _score(own, value)
    assert (reward.total, reward.correct, reward.parts) == (total, correct, parts)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("math.nan", "returned nan, which is not finite"),
        ("{'a': 1, 'b': math.inf}", "part 'b', returned inf"),
        ("None", "returned None of type NoneType"),
        ("'1'", "returned '1' of type str"),
        ("{}", "empty mapping"),
        ("{'my part': 1}", "named a part 'my part', which cannot name a curve"),
        ("{'a': [1]}", "part 'a', returned .* of type list"),
        ("np.ones(1)", "of type ndarray"),
    ],
)
def test_anything_but_finite_numbers_is_an_error(own: str, value: str, says: str):
    with pytest.raises((ValueError, TypeError), match=says):
        _score(own, value)


def test_the_pool_reports_a_failure_with_its_row_counts_it_and_goes_on(own: str):
    row = {"answer": "4", "source": "sheet 12"}
    problem = Problem(id=77, prompt="2+2=", answer="4", solution="", row=row)
    config = TaskConfig(verifier=f"{own}:score", reward_memory_gib=1.0)
    texts = ("1/0", "math.nan", "len(bytearray(2 << 30))", "__import__('sys').exit(0)")
    with RewardPool(config, 0, 1, 30.0, 0.0, make=VerifierTask) as pool:
        bad = [pool.submit(problem, text, True) for text in texts]
        errors = [user_message(future.exception(timeout=RESULT_S) or OSError()) for future in bad]
        assert pool.submit(problem, "1", True).result(timeout=RESULT_S).total == 1.0
        assert pool.stats().errors == len(texts)
    says = ("ZeroDivisionError", "returned nan", "MemoryError", "SystemExit: 0")
    for error, what in zip(errors, says, strict=True):
        assert error is not None  # it is what programs end with
        assert what in error
        assert "problem 77" in error
        assert "sheet 12" in error


def test_a_function_that_is_not_there_ends_the_wait_for_the_pool(own: str):
    for name, says in [("scroe", "has no function scroe"), ("narrow", "cannot be called")]:
        config = TaskConfig(verifier=f"{own}:{name}")
        with RewardPool(config, 0, 1, 30.0, 0.0, make=VerifierTask) as pool:
            with pytest.raises(VerifierError, match=says) as error:
                pool.wait_ready()
            assert "Traceback" not in str(error.value)


def test_a_module_is_found_by_its_name(own: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(Path(own).parent)
    check_custom("my_rewards:half")
    assert load_custom("my_rewards:half")("", "x", {"answer": "x"}).total == 0.5


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("maths", "neither math, code, exact, similarity nor a function"),
        ("my_rewards.py", "neither"),
        (":score", "neither"),
        ("a.py:not a name", "neither"),
        ("nowhere.py:score", "no file .*nowhere.py"),
        ("no_such_package.rewards:score", "no module no_such_package.rewards"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_starts(spec: str, says: str):
    with pytest.raises(UserError, match=says):
        Verifier(spec)


def test_the_trainer_imports_nothing_and_refuses_to_verify_itself(tmp_path: Path):
    path = tmp_path / "explodes.py"
    path.write_text("raise RuntimeError('imported')")
    verifier = Verifier(f"{path}:score")
    with pytest.raises(RuntimeError, match="not loaded"):
        verifier("", "", {})
    with pytest.raises(RuntimeError, match="imported"):
        verifier.load()
    with pytest.raises(UserError, match="reward_workers=0"):
        RewardPool(TaskConfig(verifier="math"), 0, 0, 30.0, 0.0, make=VerifierTask)
    with pytest.raises(UserError, match=r"task\.verifier is not set"):
        VerifierTask(TaskConfig(), 0)


def test_exact_compares_stripped_texts():
    verifier = Verifier("exact")
    verifier.load()
    assert verifier("", " Paris\n", {"answer": "Paris"}).total == 1.0
    assert verifier("", "paris", {"answer": "Paris"}).total == 0.0
