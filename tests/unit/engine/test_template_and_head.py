"""Loss masks on chats, and the loss that is only computed where there is one."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from torch.nn import functional

from lomo_core.data.batches import IGNORE, Batch, collate
from lomo_core.data.encode import RowEncoder
from lomo_core.data.json_rows import PIECE_CHARS
from lomo_core.data.rows import ChatMessage, ChatRow, CompletionRow, RowError, TextRow, ToolCall, TrainRow, WrongRow
from lomo_core.data.template import ChatEncoder, EncodedRow
from lomo_core.errors import ModelError
from lomo_core.head import ChunkedCrossEntropy, batch_loss
from lomo_core.model import load_model
from lomo_core.tokenizer import load_tokenizer
from tests.support.tiny_model import (
    DEFAULT_SYSTEM_TEMPLATE,
    PLAIN_TEMPLATE,
    TAGGED_TEMPLATE,
    TAGGED_TOOL_TEMPLATE,
    TOOL_TEMPLATE,
)

CPU = torch.device("cpu")

MULTI_TURN = (("system", "Be brief."), ("user", "one?"), ("assistant", "1"), ("user", "two?"), ("assistant", "2, too"))


def row(*turns: tuple[str, str], untrained: tuple[int, ...] = (), line: int = 1) -> ChatRow:
    return ChatRow(
        f"line {line}",
        tuple(
            ChatMessage(role, content, trained=role == "assistant" and place not in untrained)
            for place, (role, content) in enumerate(turns)
        ),
    )


def encode_all(
    tokenizer: Any, *rows: TrainRow, train_on: Any = "assistant", max_seq_length: int = 512
) -> list[EncodedRow | WrongRow]:
    return list(RowEncoder(tokenizer, max_seq_length=max_seq_length, train_on=train_on).encode(rows))


def encode(tokenizer: Any, *rows: TrainRow, train_on: Any = "assistant", max_seq_length: int = 512) -> list[EncodedRow]:
    found = encode_all(tokenizer, *rows, train_on=train_on, max_seq_length=max_seq_length)
    assert not [row for row in found if isinstance(row, WrongRow)], found
    return [row for row in found if isinstance(row, EncodedRow)]


def refusal(tokenizer: Any, row: TrainRow) -> str:
    (found,) = encode_all(tokenizer, row)
    assert isinstance(found, WrongRow)
    return f"{found.where}: {found.reason}"


def trained_text(tokenizer: Any, encoded: EncodedRow) -> list[str]:
    """The trained stretches, decoded."""
    stretches: list[list[int]] = []
    inside = False
    for token, is_trained in zip(encoded.ids.tolist(), encoded.trained.tolist(), strict=True):
        if is_trained and inside:
            stretches[-1].append(token)
        elif is_trained:
            stretches.append([token])
        inside = is_trained
    return [tokenizer.decode(stretch) for stretch in stretches]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


def test_the_padding_token_is_the_end_token(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, TAGGED_TEMPLATE, DEFAULT_SYSTEM_TEMPLATE])
def test_every_answer_and_its_end_is_trained_and_nothing_else(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    (found,) = encode(tokenizer, row(*MULTI_TURN))
    assert trained_text(tokenizer, found) == ["1<|im_end|>", "2, too<|im_end|>"]
    whole = tokenizer.decode(found.ids.tolist())
    assert whole.startswith("<|im_start|>system\nBe brief.<|im_end|>") and whole.endswith("2, too<|im_end|>")


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, TAGGED_TEMPLATE])
def test_an_answer_of_weight_0_is_context_only(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    first, last = encode(tokenizer, row(*MULTI_TURN, untrained=(2,)), row(*MULTI_TURN, untrained=(4,)))
    assert trained_text(tokenizer, first) == ["2, too<|im_end|>"]
    assert trained_text(tokenizer, last) == ["1<|im_end|>"]
    # Nothing learns from what comes after the last trained token, so it is not computed.
    assert tokenizer.decode(last.ids.tolist()).endswith("1<|im_end|>")


def test_a_default_system_message_is_not_trained(tokenizer: Any) -> None:
    tokenizer.chat_template = DEFAULT_SYSTEM_TEMPLATE
    (found,) = encode(tokenizer, row(("user", "a"), ("assistant", "b")))
    assert "You are helpful." in tokenizer.decode(found.ids.tolist())
    assert trained_text(tokenizer, found) == ["b<|im_end|>"]


def test_training_on_everything(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN_TEMPLATE
    (found,) = encode(tokenizer, row(("user", "a"), ("assistant", "b")), train_on="all")
    assert found.trained.tolist() == [False] + [True] * (len(found.ids) - 1)


def test_the_end_token_in_a_users_text_is_not_trained(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN_TEMPLATE
    (found,) = encode(tokenizer, row(("user", "a<|im_end|>b"), ("assistant", "c")))
    assert trained_text(tokenizer, found) == ["c<|im_end|>"]


def test_long_rows_lose_the_beginning_of_their_prompt(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN_TEMPLATE
    short, long = encode(
        tokenizer, row(("user", "a"), ("assistant", "b")), row(("user", "word " * 50), ("assistant", "b")),
        max_seq_length=24,
    )  # fmt: skip
    assert (short.is_cut, long.is_cut, len(long.ids)) == (False, True, 24)
    assert trained_text(tokenizer, long) == ["b<|im_end|>"]


def test_a_template_that_rewrites_history_is_refused(tokenizer: Any) -> None:
    # Drops earlier answers, as templates of reasoning models do with their thoughts.
    tokenizer.chat_template = PLAIN_TEMPLATE.replace(
        "message['content']", "('' if message['role'] == 'assistant' and not loop.last else message['content'])"
    )
    short, long = encode_all(tokenizer, row(("user", "a"), ("assistant", "b")), row(*MULTI_TURN, line=7))
    assert isinstance(short, EncodedRow) and isinstance(long, WrongRow)
    assert long.where == "line 7" and "generation" in long.reason


def test_a_template_that_refuses_a_conversation(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    message = refusal(tokenizer, row(("user", "a"), ("assistant", "b")))
    assert message.startswith("line 1: the model's chat template refuses") and "roles must alternate" in message
    with pytest.raises(RowError):
        ChatEncoder(tokenizer).prompt_ids(row(("user", "a")).messages)


def test_a_template_cannot_reach_python(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}"
    assert "refuses" in refusal(tokenizer, row(("user", "a"), ("assistant", "b")))
    tokenizer.chat_template = "{{ 'a' + 1 }}"
    assert "refuses" in refusal(tokenizer, row(("user", "a"), ("assistant", "b")))


def test_a_tokenizer_without_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        ChatEncoder(tokenizer)


LOOK_UP = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}


def tool_row(*, untrained: tuple[int, ...] = (), said: str = "") -> ChatRow:
    """A question, two calls, their answers, and what is made of them."""
    calls = (ToolCall("c1", "look_up", {"word": "sun"}), ToolCall("c2", "look_up", {"word": "moon"}))
    messages = (
        ChatMessage("user", "what are they?", trained=False),
        ChatMessage("assistant", said, trained=1 not in untrained, tool_calls=calls),
        ChatMessage("tool", "a star", trained=False, tool_call_id="c1", name="look_up"),
        ChatMessage("tool", "a rock", trained=False, tool_call_id="c2", name="look_up"),
        ChatMessage("assistant", "a star and a rock", trained=4 not in untrained),
    )
    return ChatRow("line 1", messages, (LOOK_UP,))


@pytest.mark.parametrize("template", [TOOL_TEMPLATE, TAGGED_TOOL_TEMPLATE])
def test_calls_are_trained_and_their_answers_are_not(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    (found,) = encode(tokenizer, tool_row())
    calls = (
        '<tool_call>{"name": "look_up", "arguments": {"word": "sun"}}</tool_call>'
        '<tool_call>{"name": "look_up", "arguments": {"word": "moon"}}</tool_call>'
    )
    assert trained_text(tokenizer, found) == [f"{calls}<|im_end|>", "a star and a rock<|im_end|>"]
    whole = tokenizer.decode(found.ids.tolist())
    assert whole.startswith('<|im_start|>system\n{"type": "function", "function": {"name": "look_up"')
    assert "a rock" in whole
    (found,) = encode(tokenizer, tool_row(untrained=(1,)))
    assert trained_text(tokenizer, found) == ["a star and a rock<|im_end|>"]


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, TAGGED_TEMPLATE])
def test_a_template_that_leaves_tools_out_is_refused(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    assert "line 1: the model's chat template leaves tools out: use a model whose" in refusal(tokenizer, tool_row())
    calls_only = ChatRow("line 1", tool_row().messages)
    assert "leaves tool_calls out" in refusal(tokenizer, calls_only)
    # A conversation without tools goes on as before.
    assert encode(tokenizer, row(("user", "a"), ("assistant", "b")))


def test_a_template_that_refuses_tools(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if tools %}{{ raise_exception('no tools, please') }}{% endif %}" + PLAIN_TEMPLATE
    assert "refuses the conversation: no tools, please" in refusal(tokenizer, tool_row())
    answers_left_out = TOOL_TEMPLATE.replace(
        "{% elif message['role'] == 'tool' %}", "{% elif message['role'] == 'x' %}"
    )
    tokenizer.chat_template = answers_left_out.replace("{% else %}", "{% elif message['role'] != 'tool' %}")
    assert "leaves messages of the role tool out" in refusal(tokenizer, tool_row())


def test_text_beside_a_call_is_not_lost(tokenizer: Any) -> None:
    tokenizer.chat_template = TOOL_TEMPLATE
    (found,) = encode(tokenizer, tool_row(said="I look them up."))
    assert trained_text(tokenizer, found)[0].startswith("I look them up.<tool_call>")
    tokenizer.chat_template = TOOL_TEMPLATE.replace("message['content'] + calls", "calls or message['content']")
    assert "leaves the text of messages[1] out" in refusal(tokenizer, tool_row(said="I look them up."))
    assert encode(tokenizer, tool_row())


def test_a_completion_and_its_end_are_trained(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    first, second = encode(
        tokenizer, CompletionRow("line 1", "what goes with", " day"), CompletionRow("line 2", "", "x")
    )
    assert trained_text(tokenizer, first) == [" day<|im_end|>"]
    assert tokenizer.decode(first.ids.tolist()) == "what goes with day<|im_end|>"
    # Nothing comes before its first token, so nothing predicts it.
    assert trained_text(tokenizer, second) == ["<|im_end|>"]
    (found,) = encode(tokenizer, CompletionRow("line 1", "what goes", " day"), train_on="all")
    assert found.trained.tolist() == [False] + [True] * (len(found.ids) - 1)


def test_a_token_that_prompt_and_completion_share_is_trained(tokenizer: Any) -> None:
    assert len(tokenizer(" day", add_special_tokens=False).input_ids) < len(" day")
    (found,) = encode(tokenizer, CompletionRow("line 1", "what goes ", "day"))
    assert trained_text(tokenizer, found) == [" day<|im_end|>"]


def test_long_completions_lose_the_beginning_of_their_prompt(tokenizer: Any) -> None:
    (found,) = encode(tokenizer, CompletionRow("line 1", "word " * 50, "\nday"), max_seq_length=16)
    assert (len(found.ids), found.is_cut) == (16, True)
    assert trained_text(tokenizer, found) == ["\nday<|im_end|>"]


def test_texts_are_cut_into_rows_and_nothing_is_lost(tokenizer: Any) -> None:
    texts = ["one text of some words, longer than a row", "b"]
    for width in (8, 9, 10, 11):
        *rows, last = encode(tokenizer, *(TextRow("line 1", text, is_end=True) for text in texts), max_seq_length=width)
        assert tokenizer.decode(last.ids.tolist()) == "b<|im_end|>"
        # Each row begins with the last token of the one before: every token but the first is predicted once.
        assert all(a.ids[-1] == b.ids[0] for a, b in itertools.pairwise(rows))
        tokens = [rows[0].ids[0], *(token for found in rows for token in found.ids[1:])]
        assert tokenizer.decode(tokens) == f"{texts[0]}<|im_end|>"
    assert all(len(found.ids) == 11 for found in rows[:-1])
    assert all(found.trained.tolist() == [False] + [True] * (len(found.ids) - 1) for found in rows)
    assert not any(found.is_cut for found in rows)


def test_a_document_in_pieces_is_one_document(tokenizer: Any) -> None:
    text = "a line of a long document\n" * (2 * PIECE_CHARS // 20)
    whole = encode(tokenizer, TextRow("line 1", text, is_end=True), max_seq_length=64)
    pieces = [TextRow("line 1", text[:26_000], is_end=False), TextRow("line 1001", text[26_000:], is_end=True)]
    parts = encode(tokenizer, *pieces, max_seq_length=64)
    assert [found.ids.tolist() for found in parts] == [found.ids.tolist() for found in whole]
    assert sum(int(found.ids[-1] == tokenizer.eos_token_id) for found in parts) == 1


def test_a_beginning_token_where_the_tokenizer_puts_one(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.bos_token = "<|im_start|>"
    (completion,) = encode(tokenizer, CompletionRow("line 1", "a\n", "b"))
    assert completion.ids[0] == 1 and trained_text(tokenizer, completion) == ["b<|im_end|>"]
    rows = encode(tokenizer, TextRow("line 1", "one text of some words", is_end=True), max_seq_length=8)
    assert [found.ids[0] == 1 for found in rows] == [True] + [False] * (len(rows) - 1)


def test_texts_need_an_end_token(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end token"):
        encode(tokenizer, TextRow("line 1", "a", is_end=True))


def some_rows(lengths: list[int]) -> list[EncodedRow]:
    generator = np.random.default_rng(0)
    rows = []
    for length in lengths:
        trained = np.zeros(length, dtype=np.bool_)
        trained[-max(1, length // 3) :] = True
        trained[length // 3] = True
        trained[0] = False
        rows.append(EncodedRow(generator.integers(3, 500, length).astype(np.int32), trained, is_cut=False))
    return rows


def plain_loss(model: Any, rows: list[EncodedRow]) -> torch.Tensor:
    """Row by row without padding, all logits, torch's cross-entropy."""
    losses = []
    for item in rows:
        ids = torch.from_numpy(item.ids).long()
        labels = torch.where(torch.from_numpy(item.trained), ids, IGNORE)
        logits = model(input_ids=ids[None]).logits[0, :-1]
        losses.append(functional.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=IGNORE))
    return torch.stack(losses).sum() / sum(item.num_trained for item in rows)


def test_left_padding_and_picked_columns_change_nothing(tiny_model: Path) -> None:
    model = load_model(tiny_model, precision="fp32", device=CPU)
    rows = some_rows([5, 30, 17, 9])
    expected = plain_loss(model, rows)
    expected_grads = torch.autograd.grad(expected, list(model.parameters()))
    found = batch_loss(model, collate(rows, pad_token_id=2))
    grads = torch.autograd.grad(found.loss, list(model.parameters()))
    assert float(found.loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_the_head_only_sees_columns_with_a_label(tiny_model: Path) -> None:
    model = load_model(tiny_model, precision="fp32", device=CPU)
    seen: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    batch = collate(some_rows([5, 30, 17, 9]), pad_token_id=2)
    batch_loss(model, batch)
    assert seen == [torch.Size([4, int((batch.labels[:, 1:] != IGNORE).any(0).sum()), 512])]
    assert seen[0][1] < 20


def test_a_model_without_the_option_computes_the_same(tiny_model: Path) -> None:
    model = load_model(tiny_model, precision="fp32", device=CPU)

    class Old:
        """An architecture from before `logits_to_keep` and `position_ids`."""

        def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
            return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

        __call__ = forward

    batch = collate(some_rows([12, 12]), pad_token_id=2)
    with torch.no_grad():
        assert float(batch_loss(Old(), batch).loss) == pytest.approx(float(batch_loss(model, batch).loss), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_cross_entropy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 100, 50, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 50, (3, 100))
    targets[:, ::3] = IGNORE
    summed, correct = ChunkedCrossEntropy.apply(logits, targets)
    plain = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    assert float(summed.detach()) == pytest.approx(float(plain.detach()), rel=1e-6)
    assert int(correct) == int((logits.argmax(-1) == targets).sum())
    (mine,) = torch.autograd.grad(summed * 0.5, logits, retain_graph=True)
    (again,) = torch.autograd.grad(summed * 0.5, logits)
    (theirs,) = torch.autograd.grad(plain * 0.5, logits)
    assert torch.equal(mine, again)
    torch.testing.assert_close(mine, theirs, atol=1e-6 if dtype == torch.float32 else 4e-3, rtol=1e-4)


def test_padding_is_by_length() -> None:
    rows = some_rows([3, 5])
    rows[0].ids[-1] = 2
    batch = collate(rows, pad_token_id=2)
    assert isinstance(batch, Batch)
    # To the longest, rounded up to a multiple of 8.
    assert batch.attention_mask.tolist() == [[0] * 5 + [1] * 3, [0] * 3 + [1] * 5]
    assert batch.position_ids.tolist() == [[0] * 5 + [0, 1, 2], [0] * 3 + [0, 1, 2, 3, 4]]
    assert batch.labels[0].tolist() == [IGNORE] * 6 + [int(rows[0].ids[1]), 2]
    assert (batch.num_tokens, batch.num_trained) == (8, rows[0].num_trained + rows[1].num_trained)
