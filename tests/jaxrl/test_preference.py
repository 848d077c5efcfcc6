"""Preference pairs: what a file may hold, the losses restated, and runs that learn, stop and go on."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxrl import preference
from jaxrl.chat import ChatTemplate, ChatTokenizer
from jaxrl.config import Config
from jaxrl.errors import UserError
from jaxrl.pairs import Pair, read_pairs
from jaxrl.sections import PreferenceConfig
from jaxrl.tokenizer import CharTokenizer

DIGITS = CharTokenizer("0123456789+=")
STOP = 1
F32 = 2e-6
"""float32 sigmoids of numbers of order 1, against float64."""


def ids(text: str) -> tuple[int, ...]:
    return tuple(DIGITS.encode(text))


def written(path: Path, *rows: object) -> Path:
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return path


def read(path: Path, tokenizer=DIGITS, **more: object) -> list[Pair]:
    settings = {"longest": 16, "with_rejected": True, "add_bos": False, **more}
    return read_pairs(path, tokenizer, **settings)


# -- files ----------------------------------------------------------------------------------------


def test_plain_pairs_end_with_the_stop_token(tmp_path: Path) -> None:
    path = written(
        tmp_path / "p.jsonl", {"prompt": "2+2=", "chosen": "4", "rejected": "15", "by": 1}
    )
    assert read(path) == [
        Pair(prompt=ids("2+2="), chosen=(*ids("4"), STOP), rejected=(*ids("15"), STOP))
    ]


def test_supervised_training_needs_no_rejected_completion(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", {"prompt": "2+2=", "chosen": "4"})
    assert read(path, with_rejected=False)[0].rejected == ()


TEMPLATE = (
    "{% for m in messages %}{{ '+' if m.role == 'user' else '=' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)
TWO = [{"role": "user", "content": "22"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TWO, "chosen": [{"role": "assistant", "content": "4"}],
         "rejected": [{"role": "assistant", "content": "5"}]},
        {"chosen": [*TWO, {"role": "assistant", "content": "4"}],
         "rejected": [*TWO, {"role": "assistant", "content": "5"}]},
        {"prompt": "22", "chosen": "4", "rejected": "5"},
    ],
    ids=["apart", "written out", "texts"],
)  # fmt: skip
def test_every_form_of_a_chat_reads_alike(tmp_path: Path, row: dict) -> None:
    chat = ChatTokenizer(DIGITS, ChatTemplate(TEMPLATE))
    pair = read(written(tmp_path / "p.jsonl", row), chat)[0]
    assert pair == Pair(prompt=ids("+22="), chosen=(*ids("4"), STOP), rejected=(*ids("5"), STOP))


GOOD = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", ["column", "not JSON"]),
        ({"prompt": "2+2=", "chosen": "4"}, ["'rejected' is missing", "write {"]),
        ({"prompt": "2+2=", "chosen": 4, "rejected": "5"}, ["'chosen' is 4", "not a text"]),
        ({"chosen": "4", "rejected": "5"}, ["'prompt' is None"]),
        ({**GOOD, "prompt": ""}, ["prompt or 'chosen' is empty"]),
        ({**GOOD, "rejected": "x"}, ["character 'x'", "alphabet"]),
        ({**GOOD, "rejected": "1" * 20}, ["25 tokens", "train.row_tokens=16", "at least 25"]),
        ({**GOOD, "prompt": TWO}, ["'prompt' is a chat", "model.chat=true"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_bad_row_is_named_by_file_line_and_field(
    tmp_path: Path, row: object, said: list[str]
) -> None:
    path = written(tmp_path / "pairs.jsonl", GOOD, row)
    with pytest.raises(UserError) as refused:
        read(path)
    for part in ("pairs.jsonl, line 2", *said):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": [*TWO, {"role": "assistant", "content": "4"}],
          "rejected": [{"role": "user", "content": "23"}, {"role": "assistant", "content": "4"}]},
         "turns before the last of 'chosen' and 'rejected' differ"),
        ({"chosen": ["4"], "rejected": ["5"]}, "without role and content"),
        ({"chosen": "4", "rejected": "5"}, "'prompt' is missing"),
        ({"prompt": TWO, "chosen": TWO, "rejected": TWO}, "must be the assistant's"),
    ],
)  # fmt: skip
def test_a_bad_chat_is_named_by_file_line_and_field(tmp_path: Path, row: dict, said: str) -> None:
    chat = ChatTokenizer(DIGITS, ChatTemplate(TEMPLATE))
    with pytest.raises(UserError) as refused:
        read(written(tmp_path / "pairs.jsonl", row), chat)
    assert "pairs.jsonl, line 1" in str(refused.value)
    assert said in str(refused.value)


def test_a_file_without_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no pairs"):
        read(written(tmp_path / "empty.jsonl"))


# -- losses ----------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


LOSSES = {
    "dpo": lambda c, r: -np.log(sigmoid(0.1 * (c - r))),
    "apo_zero": lambda c, r: 1 - sigmoid(0.1 * c) + sigmoid(0.1 * r),
    "apo_down": lambda c, r: sigmoid(0.1 * c) + 1 - sigmoid(0.1 * (c - r)),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_and_slopes_are_the_papers(kind) -> None:
    """arXiv:2305.18290 eq. 7 and arXiv:2408.06266 section 4; the slopes are central differences."""
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(0, 8, (2, 5))
    found = preference.slopes(chosen, rejected, beta=0.1, kind=kind)
    loss, h = LOSSES[kind], 1e-5
    np.testing.assert_allclose(found.loss, loss(chosen, rejected), rtol=F32)
    of_chosen = (loss(chosen + h, rejected) - loss(chosen - h, rejected)) / (2 * h) / 5
    of_rejected = (loss(chosen, rejected + h) - loss(chosen, rejected - h)) / (2 * h) / 5
    np.testing.assert_allclose(found.chosen, of_chosen, atol=F32)
    np.testing.assert_allclose(found.rejected, of_rejected, atol=F32)
    assert np.abs(found.chosen).max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "expected"), [("dpo", 0.474077), ("apo_zero", 0.875723), ("apo_down", 0.927375)]
)
def test_losses_have_the_published_values(kind, expected) -> None:
    """Appendix A of the reference: beta 0.1, D of 2 and -3."""
    found = preference.slopes(np.array([2.0]), np.array([-3.0]), beta=0.1, kind=kind)
    assert found.loss[0] == pytest.approx(expected, abs=1e-6)


def test_equal_completions_pull_on_nothing_but_apo_down() -> None:
    same = np.array([1.0])
    for kind in LOSSES:
        found = preference.slopes(same, same, beta=0.1, kind=kind)
        total = found.chosen[0] + found.rejected[0]
        assert (abs(total) > 1e-3) == (kind == "apo_down")


def test_each_epoch_has_every_pair_once_in_another_order() -> None:
    config = Config(preference=PreferenceConfig(epochs=2, pairs_per_step=4))
    steps = [preference.drawn(config, step, 10) for step in range(1, 7)]
    assert preference.num_steps(config, 10) == 6
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    first, second = np.concatenate(steps[:3]), np.concatenate(steps[3:])
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(first) != list(second)


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture
def pairs_config(tiny_config: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    """Single-digit sums: the right result against the one after it."""
    rows = [
        {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1)}
        for a in range(10) for b in range(4)
    ]  # fmt: skip
    path = written(tmp_path / "pairs.jsonl", *rows)

    def make(name: str, *, epochs: int = 1, checkpoint_every: int = 0, **settings) -> Config:
        config = tiny_config(dir=tmp_path / name, checkpoint_every=checkpoint_every)
        section = PreferenceConfig(path=path, epochs=epochs, pairs_per_step=10, **settings)
        return dataclasses.replace(config, preference=section)

    return make


pytestmark = pytest.mark.usefixtures("optax_promotes")


def curves(config: Config) -> list[dict[str, float]]:
    lines = (config.run.dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_begins_at_the_reference_and_learns_to_prefer(pairs_config) -> None:
    config = pairs_config("run", epochs=4, beta=0.5)
    preference.run(config, [])
    found = curves(config)
    assert [line["step"] for line in found] == list(range(1, 17))
    assert found[0]["preference/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert found[0]["rewards/margin"] == pytest.approx(0, abs=1e-5)
    assert found[-1]["rewards/margin"] > 0.1
    assert found[-1]["rewards/margin"] == pytest.approx(
        found[-1]["rewards/chosen"] - found[-1]["rewards/rejected"], abs=1e-6
    )
    assert found[-1]["rewards/accuracy"] > 0.8
    assert found[-1]["preference/loss"] < 0.65
    assert list(config.run.dir.glob("events.out.tfevents.*"))


@pytest.mark.slow
def test_the_update_follows_the_gradient_of_the_paired_loss(pairs_config) -> None:
    """The loss after a small step falls by rate * |gradient|^2, as finite differences of the whole say."""
    config = pairs_config("run", loss="apo_down", beta=0.5)
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415
    import optax  # noqa: PLC0415

    from jaxrl import build  # noqa: PLC0415
    from jaxrl.devices import make_meshes  # noqa: PLC0415
    from jaxrl.learner.learner import Learner  # noqa: PLC0415
    from jaxrl.observe import Observer  # noqa: PLC0415
    from jaxrl.policy import first_policy  # noqa: PLC0415

    subject = build.make_subject(config)
    mesh, _ = make_meshes(config.mesh)
    policy = first_policy(config.model, subject.model, mesh, 0)
    rate = 1e-3
    learner = Learner(
        subject.model, mesh, policy, optax.sgd(rate),
        forward=build.forward_settings(config, mesh, subject.model),
        grpo=config.grpo, max_nonfinite_steps=1, observer=Observer(),
    )  # fmt: skip
    pairs = read_pairs(
        config.preference.path, subject.tokenizer, longest=16, with_rejected=True, add_bos=False
    )[:12]
    sequences = preference._sequences(pairs)
    logprobs = preference.completion_logprobs(learner, config, sequences).reshape(-1, 2)
    reference = logprobs + np.random.default_rng(0).normal(
        0, 3, logprobs.shape
    )  # a policy gone far

    def loss_now() -> float:
        now = preference.completion_logprobs(learner, config, sequences).reshape(-1, 2) - reference
        return float(np.mean(_apo_down(now, 0.5)))

    before, start = loss_now(), jax.tree.map(jnp.copy, learner.state.policy)
    metrics = preference.update(learner, config, pairs, reference)
    assert metrics["preference/loss"] == pytest.approx(before, rel=1e-5)
    step = jax.tree.map(lambda a, b: a - b, learner.state.policy, start)
    norm = float(optax.global_norm(step)) / rate
    assert norm == pytest.approx(metrics["actor/grad_norm"], rel=1e-2)  # of parameters of size 1
    assert before - loss_now() == pytest.approx(rate * norm**2, rel=0.05)  # first order in the rate
    assert rate * norm**2 > 1e-5


def _apo_down(margins: np.ndarray, beta: float) -> np.ndarray:
    c, r = margins[:, 0], margins[:, 1]
    return sigmoid(beta * c) + 1 - sigmoid(beta * (c - r))


def test_a_run_without_pairs_says_where_they_go(tiny_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"--preference\.path"):
        preference.run(tiny_config(), [])


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sft", "apo_zero"])
def test_a_stopped_run_goes_on_with_the_reference_it_began_with(pairs_config, loss) -> None:
    whole, parts = pairs_config("whole", epochs=2, loss=loss), None
    preference.run(whole, [])
    parts = pairs_config("parts", epochs=2, loss=loss, checkpoint_every=1)
    real, done = preference.update, []

    def stops(*args):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preference, "update", stops)
        with pytest.raises(KeyboardInterrupt):
            preference.run(parts, [])
    preference.run(parts, [])
    names = ("preference/loss", "actor/grad_norm")
    assert [[line[n] for n in names] for line in curves(parts)] == [
        [line[n] for n in names] for line in curves(whole)
    ]


@pytest.mark.slow
def test_other_pairs_than_the_run_began_with_are_refused(pairs_config) -> None:
    config = pairs_config("run")
    preference.run(config, [])
    rows = config.preference.path.read_text().splitlines()
    config.preference.path.write_text("\n".join(reversed(rows)) + "\n")
    with pytest.raises(UserError, match="other pairs"):
        preference.run(config, [])


STORIES = [
    (
        "Once upon a time, there was a little",
        " girl named Lily. She liked to play.",
        " zx qq vv kk zz jj.",
    ),
    ("One day, Tim went to the", " park with his mom. They had fun.", " ww yy qq zz vx kj."),
    ("The dog saw a big", " ball. He ran to it and was happy.", " kk jj zz qx xv ww."),
    ("Lily and Tom were", " friends. They played with toys.", " vv xx zq jk qq yz."),
]
"""Prompts with a completion as the checkpoint tells stories, and one that it never would."""


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sft", "dpo", "apo_zero", "apo_down"])
def test_a_real_checkpoint_trains_on_pairs_by_every_loss(
    shared_data: Path, tmp_path: Path, loss: str
) -> None:
    """Rejected are stories, chosen is gibberish, so that what is learnt is not what it could already."""
    path = written(
        tmp_path / "pairs.jsonl",
        *({"prompt": prompt, "chosen": odd, "rejected": story} for prompt, story, odd in STORIES),
    )
    out = tmp_path / "run"
    preference.main(
        [
            "--config=stories", f"--model.path={shared_data / 'weights' / 'stories260K'}",
            f"--preference.path={path}", f"--preference.loss={loss}", "--preference.epochs=12",
            "--preference.pairs-per-step=4", "--train.warmup-steps=2", "--train.rows-per-microbatch=2",
            f"--run.dir={out}",
        ]
    )  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]
    assert len(lines) == 12
    assert last["preference/loss"] < first["preference/loss"]
    assert (out / "checkpoints" / "12").is_dir()
    if loss == "sft":
        assert last["preference/loss"] < 0.9 * first["preference/loss"]
        return
    at_the_reference = {"dpo": np.log(2), "apo_zero": 1.0, "apo_down": 1.0}[loss]
    assert first["preference/loss"] == pytest.approx(at_the_reference, abs=1e-5)
    assert first["logprobs/chosen"] < first["logprobs/rejected"]  # it tells stories
    assert last["rewards/accuracy"] == 1.0
    assert last["rewards/margin"] > 0.1
    chosen_goes_up = last["rewards/chosen"] > 0
    assert chosen_goes_up == (loss != "apo_down")
    assert last["rewards/rejected"] < 0
