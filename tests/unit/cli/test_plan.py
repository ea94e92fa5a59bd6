"""`lomo plan`: figures of a run before it runs, without a server and with one."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.scripted_server import Response, ScriptedServer
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
    assert 0 < found["beside"]["lora"] < found["beside"]["adamw"]
    [here] = found["fits"]
    assert here["needed_bytes"] >= found["peak_bytes"]
    assert here["ok"] is (here["needed_bytes"] <= here["device_bytes"])
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


PLAN = {
    "object": "plan",
    "model": "smollm2-135m-instruct",
    "architecture": "LlamaForCausalLM",
    "num_parameters": 134_515_008,
    "batch_size": 2,
    "max_seq_length": 256,
    "activation_checkpointing": True,
    "auto": ["batch_size", "activation_checkpointing"],
    **{
        f"{name}_bytes": 2**30
        for name in ("parameters", "gradients", "optimizer", "activations", "transient", "buffers")
    },
    "peak_bytes": 3 * 2**30,
    "peak_phase": "backward",
    "phases": [],
    "beside": {"lomo": 3 * 2**30, "adamw": 12 * 2**30},
    "fits": [
        {"host": "gpu1", "device_bytes": 20 * 2**30, "needed_bytes": 3 * 2**30, "ok": True},
        {"host": "tiny", "device_bytes": 2**30, "needed_bytes": 3 * 2**30, "ok": False},
    ],
}


def test_a_servers_model_is_planned_there_and_held_against_its_hosts(server: ScriptedServer, lomo: Lomo) -> None:
    server.on("POST", "/plan", Response(body=PLAN))
    command = ("plan", "--model", "smollm2-135m-instruct", "--max-seq-length", "256", "--checkpointing", "auto")
    result = lomo(*command)
    assert result.code == 0
    assert server.requests[-1].json == {
        "model": "smollm2-135m-instruct",
        "hyperparameters": {},
        "lomo": {"optimizer": "lomo", "precision": "bf16", "max_seq_length": 256, "activation_checkpointing": "auto"},
    }
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert lines[:3] == [
        "model smollm2-135m-instruct: LlamaForCausalLM, 134.5 M parameters",
        "chosen batch_size=2, activation_checkpointing=true",
        "parameters 1.0 GiB",
    ]
    assert lines[-3:] == [
        "peak with adamw 12.0 GiB",
        "on gpu1 fits: needs 3.0 GiB, has 20.0 GiB",
        "on tiny does not fit: needs 3.0 GiB, has 1.0 GiB",
    ]
    assert json.loads(lomo(*command, "-o", "json").out) == PLAN


def test_the_options_of_a_plan_reach_the_server(server: ScriptedServer, lomo: Lomo) -> None:
    server.on("POST", "/plan", Response(body={**PLAN, "auto": [], "fits": []}))
    result = lomo("plan", "--model", "m", "--batch-size", "8", "--optimizer", "adamw", "--no-checkpointing")
    assert server.requests[-1].json["hyperparameters"] == {"batch_size": 8}
    assert server.requests[-1].json["lomo"].items() >= {"optimizer": "adamw", "activation_checkpointing": False}.items()
    assert "no live host has measured its memory" in result.out
    assert "chosen" not in result.out


def test_what_only_one_of_both_can_is_wrong_usage(server: ScriptedServer, lomo: Lomo, tmp_path: Path) -> None:
    config = _config(tmp_path)
    for arguments, said in (
        (["--config", config, "--batch-size", "auto"], "auto is what fits a server's hosts"),
        (["--config", config, "--checkpointing", "auto"], "auto is what fits a server's hosts"),
        (["--model", "m", "--ranks", "2"], "--ranks goes with --config"),
    ):
        code, _, err = lomo("plan", *arguments)
        assert (code, said in err) == (2, True), err
    assert lomo("plan", "--model", "m", "--config", config).code == 1
    assert server.requests == []
