"""Architectures by name have the published parameter counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from roofline.model_zoo import ZOO, find_model

ROUNDED = 0.02
"""Parameters of mixtures are published to two or three digits."""


def test_every_published_parameter_count_is_met_exactly(shared_data: Path) -> None:
    rows = json.loads((shared_data / "roofline" / "model_configs.json").read_text("utf-8"))
    assert len(rows) == sum(model.config.num_experts == 0 for model in ZOO.values())
    for row in rows:
        model = find_model(row["name"].partition(" (")[0])
        assert model.num_parameters == row["params_total"], row["name"]
        assert model.num_parameters == (row["reported_exact_params"] or model.num_parameters)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        # model cards, and arXiv:2505.09388 section 2, arXiv:2401.04088 section 2.1
        ("qwen3-30b-a3b", 30.5e9, 3.3e9),
        ("qwen3-235b-a22b", 235e9, 22e9),
        ("mixtral-8x7b", 46.7e9, 12.9e9),
        ("mixtral-8x22b", 141e9, 39e9),
    ],
)
def test_mixtures_have_the_published_total_and_active_parameters(
    name: str, total: float, active: float
) -> None:
    model = find_model(name)
    assert model.num_parameters == pytest.approx(total, rel=ROUNDED)
    assert model.config.active_parameters == pytest.approx(active, rel=ROUNDED)


def test_an_organisation_capitals_and_further_training_do_not_matter() -> None:
    assert find_model("Qwen/Qwen3-1.7B") is ZOO["qwen3-1.7b"]
    assert find_model("Qwen/Qwen2.5-1.5B-Instruct") is ZOO["qwen2.5-1.5b"]
    assert find_model("Qwen/Qwen3-4B-Base") is ZOO["qwen3-4b"]
    assert find_model("google/gemma-3-1b-it") is ZOO["gemma-3-1b-it"]


def test_a_config_json_and_its_folder_name_the_same_model(tmp_path: Path) -> None:
    content = {
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 128,
        "num_hidden_layers": 2, "intermediate_size": 96, "max_position_embeddings": 32,
    }  # fmt: skip
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    assert find_model(str(file)) == find_model(str(tmp_path))
    assert find_model(str(file)).config.width == 64


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"qwen3-0\.6b"):
        find_model("qwen9-1t")
