"""From a checkpoint over training and resuming to an exported checkpoint, with real forms throughout."""

import importlib.util
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import train
from jaxrl.chat import load_chat_template
from jaxrl.checkpoint import Checkpoints
from jaxrl.cli import load_config, parse_args
from jaxrl.tokenizer import load_tokenizer
from models.decoder import Decoder, hidden_states
from models.head import head_logits
from models.hf import load_policy
from models.hf.__main__ import main as hf
from roofline.hardware import Hardware

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
PEERS = ROOT / ".venv-peers" / "bin" / "python"
F32_ATOL = 2e-5  # float32, other order of sums; logits have a standard deviation near 1
ROWS = [{"question": f"What is {i}+{i}?", "answer": f"#### {2 * i}"} for i in range(100)]
VOCAB = 300


pytestmark = pytest.mark.usefixtures("optax_promotes")


@pytest.fixture
def known_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = Hardware(
        name="test machine", peak_flops_per_s={"float32": 1e14, "bfloat16": 1e14}, hbm_bytes=1e12,
        hbm_bytes_per_s=1e14, link_bytes_per_s=1e14, dispatch_s=1e-5, kernel_s=1e-6,
    )  # fmt: skip
    monkeypatch.setattr(train, "cached_or_calibrate", lambda *_, **__: hardware)


@partial(jax.jit, static_argnames=("dtype",))
def _logits(policy: Decoder, tokens: jax.Array, *, dtype: type) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = hidden_states(policy, tokens, positions, jnp.ones_like(tokens), dtype=dtype)
    return head_logits(policy, hidden, dtype=dtype)


def logits(policy: Decoder, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(_logits(policy, jnp.asarray(tokens, jnp.int32), dtype=jnp.float32)[0])


def trained(run: Path, like: Decoder) -> Decoder:
    """The weights of the newest checkpoint of a run, straight from its checkpoint folder."""
    checkpoints = Checkpoints(run / "checkpoints", keep=2)
    try:
        return checkpoints.restore_policy(checkpoints.latest(), like)
    finally:
        checkpoints.close()


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def checkpoint(problems: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of twenty thousand parameters with a tokenizer learnt from the problems."""
    folder = tmp_path_factory.mktemp("first") / "checkpoint"
    hf([
        "new", f"--text={problems}", f"--vocab={VOCAB}", f"--out={folder}", "--width=32",
        "--layers=1", "--ffw=64", "--head-size=8", "--positions=96",
    ])  # fmt: skip
    return folder


def test_a_new_checkpoints_tokenizer_knows_every_text_and_its_chats_end(checkpoint: Path):
    tokenizer = load_tokenizer(checkpoint)
    text = "What is 7+7? \u00e9\u4f60\U0001f600\n  {}"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("What is 7+7?")) <= len("What is 7+7?") / 2
    assert tokenizer.vocab_size <= VOCAB
    chat = load_chat_template(checkpoint).prompt("Hi")
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode("<|im_end|>") == list(tokenizer.stop_ids)


def test_a_new_checkpoint_depends_on_its_seed_alone_and_overwrites_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shape = ["--width=32", "--layers=1", "--ffw=64", "--head-size=8", "--positions=96"]
    for name, seed in (("same", 0), ("other", 1)):
        words = [f"--tokenizer={checkpoint}", f"--out={tmp_path / name}", f"--seed={seed}"]
        hf(["new", *words, *shape])
    same, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("same", "other"))
    assert same == (checkpoint / "model.safetensors").read_bytes() != other
    for words, says in (
        ([f"--tokenizer={checkpoint}", f"--out={checkpoint}"], "not empty"),
        ([f"--tokenizer={checkpoint}", f"--out={tmp_path / 'x'}", "--eos=<end>"], "'<end>'"),
        ([f"--text={checkpoint / 'config.json'}", f"--out={tmp_path / 'x'}", "--vocab=9"], "259"),
        (["--text=/dev/null", f"--out={tmp_path / 'x'}"], "holds no text"),
        ([f"--tokenizer={tmp_path}", f"--out={tmp_path / 'x'}"], "tokenizer.json"),
    ):
        with pytest.raises(SystemExit):
            hf(["new", *words])
        assert says in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.usefixtures("known_hardware")
def test_a_checkpoint_is_trained_and_exported_on_problems_in_gsm8ks_form(
    checkpoint: Path, problems: Path, tmp_path: Path
):
    run, out = tmp_path / "run", tmp_path / "out"
    words = [
        "--config=tiny_gsm8k", f"--model.path={checkpoint}",
        f"--task.path={problems}", f"--run.dir={run}", "--run.report=False", "--task.num-eval=4",
        "--rollout.max-prompt-tokens=48", "--rollout.max-new-tokens=32", "--rollout.slots=8",
        "--train.row-tokens=80", "--grpo.prompts-per-step=2", "--grpo.group-size=4",
        "--grpo.reward-from=random", "--sft.steps=0", "--train.warmup-steps=0", "--train.steps=1",
        "--train.learning-rate=1e-2", "--eval.problems=2", "--eval.final-samples=1",
    ]  # fmt: skip
    train.run(parse_args(words), [])
    (line,) = metrics(run)
    assert line["verifier/done"] >= 8
    assert line["verifier/errors"] == line["verifier/timeouts"] == 0
    assert {"reward/correct/mean", "reward/answered/mean"} <= set(line)
    hf(["export", f"--run={run}", f"--out={out}"])
    first, last = load_policy(checkpoint), load_policy(out)
    tokens = np.arange(40)[None]
    assert np.array_equal(logits(last, tokens), logits(trained(run, first), tokens))
    assert np.abs(logits(last, tokens) - logits(first, tokens)).max() > 10 * F32_ATOL
    assert load_tokenizer(out).encode("1+1?") == load_tokenizer(checkpoint).encode("1+1?")
    assert load_chat_template(out).prompt("1+1?") == load_chat_template(checkpoint).prompt("1+1?")


def command(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a command of the project as a user would, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def real_checkpoint(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, a real tokenizer of 6,400 tokens, Qwen3's chat template."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tokenizers = shared_data / "tokenizers"
    command(
        "models.hf", "new", f"--tokenizer={tokenizers / 'minimind' / 'tokenizer.json.gz'}",
        "--eos=<|im_end|>", f"--chat-template={tokenizers / 'chat_templates' / 'qwen3.jinja'}",
        f"--out={folder}",
    )  # fmt: skip
    return folder


@pytest.mark.slow
def test_tiny_gsm8k_trains_resumes_and_exports_what_transformers_computes_alike(
    real_checkpoint: Path, shared_data: Path, tmp_path: Path
):
    run, out = tmp_path / "run", tmp_path / "out"
    words = [
        "jaxrl.train", "--config=tiny_gsm8k", f"--model.path={real_checkpoint}",
        f"--task.path={shared_data / 'gsm8k' / 'gsm8k_train.jsonl.gz'}", f"--run.dir={run}",
        "--sft.steps=30", "--grpo.drop-zero-advantage=False", "--eval.final-samples=1",
    ]  # fmt: skip
    for steps in (2, 3):
        command(*words, f"--train.steps={steps}")
    assert [line["step"] for line in metrics(run)] == [1, 2, 3]
    command("models.hf", "export", f"--run={run}", f"--out={out}")
    first, last = load_policy(real_checkpoint), load_policy(out)
    cases = _module(DATA / "hf_cases.py")
    ours = logits(last, cases.TOKENS)
    assert np.array_equal(ours, logits(trained(run, first), cases.TOKENS))
    assert np.abs(ours - logits(first, cases.TOKENS)).max() > 0.1
    prompt = load_tokenizer(out).encode("How many clips did Natalia sell?")
    assert prompt == load_tokenizer(real_checkpoint).encode("How many clips did Natalia sell?")
    if not PEERS.is_file():
        pytest.skip("needs torch and transformers: `make peers` installs them into .venv-peers")
    shutil.copytree(out, tmp_path / "theirs" / "out")
    script = [str(PEERS), str(DATA / "hf_reference.py"), str(tmp_path / "theirs")]
    subprocess.run(script, check=True, timeout=280, capture_output=True)
    with np.load(tmp_path / "theirs" / "logits.npz") as file:
        theirs = file["out"]
    np.testing.assert_allclose(ours, theirs, atol=F32_ATOL * np.abs(theirs).max(), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (
            "tiny_math",
            {"path": "math/MATH_test_5000.jsonl.gz", "test_path": "math/MATH500.jsonl.gz"},
        ),
        ("tiny_code", {"path": "code/mbpp_sanitized_427.jsonl.gz"}),
    ],
)
def test_the_stand_ins_of_the_large_configurations_run(
    name: str, settings: dict[str, str], real_checkpoint: Path, shared_data: Path, tmp_path: Path
):
    run = tmp_path / "run"
    words = [
        f"--task.{key.replace('_', '-')}={shared_data / file}" for key, file in settings.items()
    ]
    done = command(
        "jaxrl.train", f"--config={name}", f"--model.path={real_checkpoint}", f"--run.dir={run}",
        *words,
    )  # fmt: skip
    assert [line["step"] for line in metrics(run)] == [1, 2]
    assert ("programs run" in done.stdout) == (name == "tiny_code")


def test_the_stand_in_of_the_eight_gpus_has_their_mesh():
    tiny, large = (
        load_config(ROOT / "configs" / f"{name}.yaml")
        for name in ("tiny_math", "qwen3_4b_math_8gpu")
    )
    assert tiny.mesh == large.mesh
    assert tiny.task.path == large.task.path


def _module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
