"""`python -m jaxrl.sft` on chats: learns, resumes exactly, exports; reinforcement learning goes on from it."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.config import Config, RunConfig, SftConfig
from jaxrl.fine_tune_data import chosen
from models.hf import load_policy

ROOT = Path(__file__).parents[2]
EXPORT_ATOL = (
    1e-5  # of a float32 weight: the adapter's product rounds differently on device and host
)


@pytest.mark.parametrize(("seed", "other"), [(0, 1)])
def test_an_epoch_holds_every_chat_once_and_another_in_another_order(seed: int, other: int):
    def drawn(seed: int) -> list[list[int]]:
        config = Config(run=RunConfig(seed=seed), sft=SftConfig(epochs=2, sequences_per_step=4))
        return [chosen(config, step, 10) for step in range(1, 6)]

    steps = drawn(seed)
    assert [len(step) for step in steps] == [4, 4, 4, 4, 4]
    flat = [i for step in steps for i in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert drawn(other) != steps
    last = Config(sft=SftConfig(epochs=1, sequences_per_step=4))
    assert len(chosen(last, 3, 10)) == 2


def command(*words: object, fails: bool = False) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def files(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """checkpoint/ with a real tokenizer and Qwen3's template, chats.jsonl, sums.jsonl."""
    folder = tmp_path_factory.mktemp("files")
    tokenizers = shared_data / "tokenizers"
    command(
        "models.hf", "new", f"--tokenizer={tokenizers / 'minimind' / 'tokenizer.json.gz'}",
        "--eos=<|im_end|>", f"--chat-template={tokenizers / 'chat_templates' / 'qwen3.jinja'}",
        f"--out={folder / 'checkpoint'}",
    )  # fmt: skip
    sums = [(a, b) for a in range(10) for b in range(10)]
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"{a}+{b}?"},
                {"role": "assistant", "content": str(a + b)},
            ]
        }
        for a, b in sums
    ]
    rows = [{"prompt": f"{a}+{b}?", "answer": str(a + b)} for a, b in sums]
    for name, made in (("chats", chats), ("sums", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


def settings(files: Path, run: Path, *more: object) -> list[object]:
    return [
        f"--model.path={files / 'checkpoint'}", "--model.chat=true", f"--run.dir={run}",
        f"--sft.path={files / 'chats.jsonl'}", "--sft.sequences-per-step=16",
        "--sft.warmup-steps=2", "--train.row-tokens=128", "--train.rows-per-microbatch=4",
        "--rollout.max-prompt-tokens=64", "--rollout.max-new-tokens=8", "--eval.every-steps=3",
        "--lora.rank=4", "--sft.learning-rate=1e-2", *more,
    ]  # fmt: skip


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(files: Path) -> Path:
    """Six steps, in two starts."""
    run = files / "run"
    for steps in (3, 6):
        command("jaxrl.sft", *settings(files, run, f"--sft.steps={steps}"))
    return run


@pytest.mark.slow
def test_training_lowers_the_held_out_loss_and_shows_replies(trained: Path):
    lines = metrics(trained)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["eval/loss"] < lines[2]["eval/loss"] < 8.5
    assert lines[-1]["roofline/train/predicted_s"] > 0
    samples = [json.loads(line) for line in (trained / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {0, 3, 6}
    assert samples[0]["prompt"].endswith("<|im_start|>assistant\n")


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_never_stopped(files: Path, trained: Path):
    whole = files / "whole"
    command("jaxrl.sft", *settings(files, whole, "--sft.steps=6", "--sft.samples=0"))
    for name in ("sft/loss", "eval/loss"):
        once, twice = (
            [line[name] for line in metrics(r) if name in line] for r in (whole, trained)
        )
        assert once == twice


@pytest.mark.slow
def test_merged_export_and_adapter_fit_and_only_targets_changed(files: Path, trained: Path):
    command("models.hf", "export", "--run", trained, "--out", files / "merged")
    command("models.hf", "export", "--run", trained, "--out", files / "adapter", "--adapter")
    before, after = load_policy(files / "checkpoint"), load_policy(files / "merged")
    assert np.array_equal(before.embedding, after.embedding)
    changed = np.abs(np.asarray(after.layers.down) - np.asarray(before.layers.down)).max()
    assert changed > 100 * EXPORT_ATOL
    assert (files / "adapter" / "adapter_model.safetensors").is_file()
    state = trained / "checkpoints"
    assert {p.name for p in state.iterdir() if p.name.isdigit()} == {"0", "3", "6"}
    assert not (state / "6" / "frozen").exists()


@pytest.mark.slow
def test_reinforcement_learning_of_an_adapter_goes_on_from_it_and_publishes_it_alone(
    files: Path, trained: Path
):
    wrong = command("jaxrl.train", *settings(files, trained, "--sft.steps=6"), fails=True)
    assert "is for `python -m jaxrl.sft`" in wrong.stderr
    run = files / "grpo"
    words = [
        "jaxrl.train", f"--model.path={files / 'checkpoint'}", "--model.chat=true",
        f"--run.dir={run}", f"--run.fork-from={trained}", "--lora.rank=2", "--task.name=jsonl",
        f"--task.path={files / 'sums.jsonl'}", "--train.row-tokens=128",
        "--train.rows-per-microbatch=4", "--rollout.max-prompt-tokens=64",
        "--rollout.max-new-tokens=8", "--rollout.slots=8", "--grpo.prompts-per-step=2",
        "--grpo.group-size=4", "--grpo.drop-zero-advantage=false", "--grpo.kl-weight=0.01",
        "--eval.final-samples=1", "--eval.every-steps=0", "--task.num-eval=4",
    ]  # fmt: skip
    for steps in (1, 2):
        command(*words, f"--train.steps={steps}")
    spans = [json.loads(line) for line in (run / "spans.jsonl").read_text().splitlines()]
    sent = [span["work"]["bytes"] for span in spans if span["phase"] in ("publish", "compile")
            and "bytes" in span.get("work", {})]  # fmt: skip
    policy = load_policy(files / "checkpoint")
    assert sent
    assert max(sent) < sum(leaf.nbytes for leaf in jax.tree.leaves(policy)) / 5
    line = metrics(run)[-1]
    assert line["mismatch/kl_mean"] < 1e-5
    assert {"verifier/queue_depth", "verifier/latency_p50_s"} <= set(line)
    command("models.hf", "export", "--run", run, "--out", files / "grpo_merged")
    command("jaxrl.evaluate", "--run", run, "--samples", 1, "--k", 1)
    command("models.hf", "export", "--run", trained, "--out", files / "sft_merged")
    forked, sft = load_policy(files / "grpo_merged"), load_policy(files / "sft_merged")
    assert forked.layers.up.dtype == jnp.float32
    np.testing.assert_allclose(
        np.asarray(forked.layers.up), np.asarray(sft.layers.up), atol=1e-4, rtol=0
    )
