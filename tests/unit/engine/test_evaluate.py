"""Scores of choices against a naive computation, and the losses of validation files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import MistralConfig, MistralForCausalLM

from lomo_core import evaluate
from lomo_core.config import DataConfig
from lomo_core.data.formats import RowReader, read_rows
from lomo_core.data.rows import ChoiceRow
from lomo_core.data.template import ChatEncoder
from lomo_core.data.token_cache import Watch
from lomo_core.errors import DataError
from lomo_core.evaluate import Evaluator, group_by_tokens
from lomo_core.head import batch_loss
from lomo_core.model import load_model
from lomo_core.tokenizer import load_tokenizer
from tests.support.tiny_model import VOCAB_SIZE, chat_rows, choice_rows, write_jsonl

CPU = torch.device("cpu")


def nothing() -> None:
    """Evaluation asks between batches whether to stop."""


def evaluator_of(path: Path, tokenizer: Any, *, max_seq_length: int = 512) -> Evaluator:
    data = DataConfig(train_path=str(path), validation_path=str(path), max_seq_length=max_seq_length)
    watch = Watch(say=lambda message: None, check=nothing)
    return Evaluator(data, tokenizer, cache_dir=path.parent / "tokens", watch=watch)


def choices_of(path: Path) -> list[ChoiceRow]:
    return [row for row in read_rows(RowReader(path, param="validation_file")) if isinstance(row, ChoiceRow)]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return load_model(tiny_model, precision="fp32", device=CPU)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


@pytest.fixture
def mixed_choices(tmp_path: Path) -> Path:
    """Rows of different prompts, numbers of choices and lengths of choices."""
    rows = choice_rows(9)
    rows[2]["choices"] = ["a long answer of many words", "b", "longer, and with a comma"]
    rows[2]["answer"] = 1
    rows[5]["choices"] = ["x y z", "x y"]
    rows[5]["answer"] = 0
    return write_jsonl(tmp_path / "choices.jsonl", rows)


def naive_scores(model: Any, tokenizer: Any, path: Path) -> list[list[float]]:
    """Every candidate alone, in full, without padding or cache."""
    encoder = ChatEncoder(tokenizer)
    scores = []
    for row in choices_of(path):
        prompt = encoder.prompt_ids(row.messages)
        found = []
        for choice in row.choices:
            ids = encoder.text_ids(choice)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            found.append(-float(functional.cross_entropy(logits, torch.tensor(ids))))
        scores.append(found)
    return scores


@pytest.mark.parametrize("batch_tokens", [1, 2048])
def test_scores_are_the_mean_log_likelihood(
    model: Any, tokenizer: Any, mixed_choices: Path, monkeypatch: pytest.MonkeyPatch, batch_tokens: int
) -> None:
    monkeypatch.setattr(evaluate, "_BATCH_TOKENS", batch_tokens)
    evaluator = evaluator_of(mixed_choices, tokenizer)
    expected = naive_scores(model, tokenizer, mixed_choices)
    for found, wanted in zip(evaluator.choice_scores(model, nothing), expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-4)
    result = evaluator.run(model, partial(batch_loss, model), step=3, check=nothing)
    answers = [row.answer for row in choices_of(mixed_choices)]
    right = sum(row.index(max(row)) == answer for row, answer in zip(expected, answers, strict=True))
    assert result.choice_accuracy == right / 9
    assert (result.step, result.num_rows, result.valid_loss) == (3, 9, None)


def test_architectures_without_a_plain_cache_score_the_same(tokenizer: Any, mixed_choices: Path) -> None:
    # Windows shorter than the prompts: the cache would have dropped what a choice needs.
    config = MistralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
    )
    torch.manual_seed(0)
    model: Any = MistralForCausalLM(config).eval()
    assert not evaluate._has_plain_cache(model)
    evaluator = evaluator_of(mixed_choices, tokenizer)
    expected = naive_scores(model, tokenizer, mixed_choices)
    for found, wanted in zip(evaluator.choice_scores(model, nothing), expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-4)


def test_chat_rows_give_loss_and_token_accuracy(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "valid.jsonl", chat_rows(10))
    evaluator = evaluator_of(path, tokenizer)
    total, num_tokens, num_right = 0.0, 0, 0
    assert evaluator._rows is not None
    for row in map(evaluator._rows.row, range(10)):
        ids = torch.from_numpy(row.ids).long()
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        where = torch.from_numpy(row.trained)[1:]
        total += float(functional.cross_entropy(logits[where], ids[1:][where], reduction="sum"))
        num_right += int((logits[where].argmax(-1) == ids[1:][where]).sum())
        num_tokens += int(where.sum())
    model.train()
    result = evaluator.run(model, partial(batch_loss, model), step=0, check=nothing)
    assert model.training
    model.eval()
    assert result.valid_loss == pytest.approx(total / num_tokens, abs=1e-5)
    assert result.valid_mean_token_accuracy == num_right / num_tokens
    assert result.choice_accuracy is None


def test_long_prompts_are_cut(tokenizer: Any, tmp_path: Path) -> None:
    rows = choice_rows(1)
    rows[0]["messages"] = [{"role": "user", "content": "word " * 200}]
    path = write_jsonl(tmp_path / "choices.jsonl", rows)
    evaluator = evaluator_of(path, tokenizer, max_seq_length=40)
    (row,) = evaluator._choices
    assert len(row.prompt) + max(map(len, row.choices)) == 40


def test_choices_that_the_template_refuses(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = "{% if 'moon' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}"
    with pytest.raises(DataError, match="2 rows are wrong:\nline 2: the model's chat template refuses") as caught:
        evaluator_of(write_jsonl(tmp_path / "choices.jsonl", choice_rows(8)), tokenizer)
    assert caught.value.param == "validation_file"


def test_evaluation_can_be_ended(model: Any, tokenizer: Any, mixed_choices: Path) -> None:
    def end() -> None:
        raise KeyError("end")

    model.train()
    evaluator = evaluator_of(mixed_choices, tokenizer)
    with pytest.raises(KeyError):
        evaluator.run(model, partial(batch_loss, model), step=0, check=end)
    assert model.training
    model.eval()


def test_groups_cover_everything_within_the_limit() -> None:
    lengths = [1, 2, 3, 5, 8, 100]
    groups = group_by_tokens(lengths, 12)
    assert [list(group) for group in groups] == [[0, 1, 2], [3], [4], [5]]
    assert group_by_tokens([], 10) == []
