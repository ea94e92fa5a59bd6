"""`lomo plan`: figures of a run before it runs, without a server."""

from __future__ import annotations

import json
from pathlib import Path

from tests.unit.cli.conftest import Lomo

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def _config(folder: Path, **changes: object) -> str:
    path = folder / f"{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(CONFIG | changes), encoding="utf-8")
    return str(path)


def test_a_configuration_is_planned_without_weights_or_server(lomo: Lomo, tmp_path: Path) -> None:
    result = lomo("plan", "--config", _config(tmp_path), "--precision", "fp32", "--batch-size", "2", "-o", "json")
    assert result.code == 0
    found = json.loads(result.out)
    assert found["architecture"] == "LlamaForCausalLM"
    assert found["parameters_bytes"] == 4 * found["num_parameters"] == 4 * (512 * 64 + 2 * 50304 + 64)
    assert found["peak_bytes"] == found["beside"]["lomo"]
    assert found["beside"]["sgd"] < found["beside"]["adamw"]
    assert found["optimizer_bytes"] == 0


def test_the_table_has_every_category(lomo: Lomo, tmp_path: Path) -> None:
    result = lomo("plan", "--config", _config(tmp_path), "--optimizer", "adamw", "--no-checkpointing")
    assert result.code == 0
    for word in ("parameters", "gradients", "optimizer", "activations", "peak with lomo", "peak with adamw"):
        assert word in result.out


def test_wrong_input_is_one_sentence(lomo: Lomo, tmp_path: Path) -> None:
    for arguments, said in (
        (["--config", str(tmp_path / "none.json")], "none.json cannot be read"),
        (["--config", _config(tmp_path, auto_map={"AutoConfig": "x.Y"})], "never run here"),
        (["--config", _config(tmp_path, model_type="t5")], "no causal language models"),
        (["--config", _config(tmp_path, model_type="no-such")], "knows no models of type"),
        (["--config", _config(tmp_path), "--max-seq-length", "4096"], "the model takes 1024 tokens"),
        ([], "--paper"),
    ):
        result = lomo("plan", *arguments)
        assert result.code == 1
        assert said in result.err, result.err
        assert "Traceback" not in result.err


def test_the_papers_tables(lomo: Lomo) -> None:
    cells = json.loads(lomo("plan", "--paper", "table1", "-o", "json").out)["cells"]
    assert set(cells[0]) == {"optimizer", "activation_checkpointing", "category", "paper_gib", "plan_gib"}
    assert {cell["category"] for cell in cells} == {"parameters", "gradients", "optimizer", "activations", "total"}
    text = lomo("plan", "--paper", "table2").out
    assert [line.split()[0] for line in text.splitlines()] == ["MODEL", "7B", "13B", "30B", "65B"]
    assert "lomo" in lomo("plan", "--paper", "table1").out
