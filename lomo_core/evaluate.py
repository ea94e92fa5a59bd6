"""Measuring a model on a validation file: loss and token accuracy of chat rows, accuracy by likelihood of choice rows.

A choice's score is the mean log-likelihood per token of its text after the rendered prompt (with the generation
prompt), without an end token; the highest wins. This is how LOMO's paper measures (arXiv 2306.09782, section 4.3).

Scores are exact and yet cheap: a prompt runs once, its keys and values are then shared by all its choices.
Architectures whose cache is not a plain list of keys and values (sliding windows, state spaces) run each choice in
full.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lomo_core.config import DataConfig
from lomo_core.data.batches import Batch, collate, positions
from lomo_core.data.formats import RowErrors, RowReader, read_rows
from lomo_core.data.rows import ChoiceRow, RowError, WrongRow
from lomo_core.data.template import ChatEncoder
from lomo_core.data.token_cache import EncodeOptions, TokenDataset, Watch, open_dataset
from lomo_core.events import Evaluation
from lomo_core.head import BatchLoss, accepted_arguments

LossOf = Callable[[Batch], BatchLoss]

# Tokens of one evaluation batch, padding included; without a backward pass this is small beside a training step.
_BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class _EncodedChoice:
    prompt: list[int]
    choices: list[list[int]]
    answer: int


class Evaluator:
    """One validation file, read and encoded once: `data.validation_path`.

    Raises:
        DataError: the file cannot be used.
    """

    def __init__(self, data: DataConfig, tokenizer: Any, *, cache_dir: Path, watch: Watch) -> None:
        assert data.validation_path is not None
        source = RowReader(data.validation_path, data_format=data.validation_format, param="validation_file")
        self._pad_token_id: int = tokenizer.pad_token_id
        self._rows: TokenDataset | None = None
        self._choices: list[_EncodedChoice] = []
        if source.has_choices():
            self._choices = _encode_choices(source, tokenizer, max_seq_length=data.max_seq_length)
            self.num_rows = len(self._choices)
        else:
            options = EncodeOptions(max_seq_length=data.max_seq_length, train_on=data.train_on)
            self._rows = open_dataset(source, tokenizer, options=options, cache_dir=cache_dir, watch=watch)
            self.num_rows = len(self._rows)

    def extremes(self) -> tuple[int, int]:
        """The tokens of the longest row, and the highest token id, of everything that the model will be given."""
        if self._rows is not None:
            return self._rows.counts.longest_row, self._rows.counts.highest_token_id
        found = [
            (len(row.prompt) + len(choice), max(*row.prompt, *choice))
            for row in self._choices
            for choice in row.choices
        ]
        return max(length for length, _ in found), max(highest for _, highest in found)

    def run(self, model: Any, loss_of: LossOf, *, step: int, check: Callable[[], None]) -> Evaluation:
        """Measure. `loss_of` gives the loss of a batch of chats as training does; `check` is called between batches and
        may raise to end it."""
        start = time.monotonic()
        was_training = model.training
        model.eval()
        try:
            with torch.inference_mode():
                if self._rows is None:
                    accuracy = self._choice_accuracy(model, check)
                    return Evaluation(
                        step=step,
                        num_rows=self.num_rows,
                        choice_accuracy=accuracy,
                        seconds=time.monotonic() - start,
                    )
                loss, token_accuracy = self._mean_loss(self._rows, model, loss_of, check)
                return Evaluation(
                    step=step,
                    num_rows=self.num_rows,
                    valid_loss=loss,
                    valid_mean_token_accuracy=token_accuracy,
                    seconds=time.monotonic() - start,
                )
        finally:
            model.train(was_training)

    def _mean_loss(
        self, rows: TokenDataset, model: Any, loss_of: LossOf, check: Callable[[], None]
    ) -> tuple[float, float]:
        """Mean loss per trained token over the whole file, and the share of tokens guessed right."""
        total = 0.0
        num_correct = num_tokens = 0
        device = next(model.parameters()).device
        order = rows.lengths.argsort(kind="stable")
        for part in group_by_tokens(rows.lengths[order].tolist(), _BATCH_TOKENS):
            check()
            batch = collate([rows.row(order[at]) for at in part], pad_token_id=self._pad_token_id).to(device)
            result = loss_of(batch)
            total += float(result.loss) * batch.num_trained
            num_correct += int(result.num_correct)
            num_tokens += batch.num_trained
        return total / num_tokens, num_correct / num_tokens

    def _choice_accuracy(self, model: Any, check: Callable[[], None]) -> float:
        scores = self.choice_scores(model, check)
        right = sum(
            max(range(len(found)), key=found.__getitem__) == row.answer
            for found, row in zip(scores, self._choices, strict=True)
        )
        return right / len(self._choices)

    def choice_scores(self, model: Any, check: Callable[[], None]) -> list[list[float]]:
        """Mean log-likelihood per token of each choice of each row, in the file's order."""
        with torch.inference_mode():
            score = _score_shared if _has_plain_cache(model) else _score_in_full
            scores: list[list[float]] = [[] for _ in self._choices]
            order = sorted(range(len(self._choices)), key=lambda place: len(self._choices[place].prompt))
            for part in group_by_tokens([_num_cells(self._choices[place]) for place in order], _BATCH_TOKENS):
                check()
                places = [order[at] for at in part]
                found = score(model, [self._choices[place] for place in places], self._pad_token_id)
                for place, row_scores in zip(places, found, strict=True):
                    scores[place] = row_scores
        return scores


def group_by_tokens(lengths: list[int], limit: int) -> list[range]:
    """Cut a list sorted by length into runs of at most `limit` cells each (rows times longest), at least one row."""
    groups: list[range] = []
    first = 0
    for place in range(1, len(lengths) + 1):
        if place == len(lengths) or (place - first + 1) * lengths[place] > limit:
            groups.append(range(first, place))
            first = place
    return groups


def _encode_choices(source: RowReader, tokenizer: Any, *, max_seq_length: int) -> list[_EncodedChoice]:
    """Every row of choices.

    Raises:
        DataError: rows are wrong, or the template refuses them.
    """
    encoder = ChatEncoder(tokenizer)
    errors = RowErrors(source.param)
    choices: list[_EncodedChoice] = []
    for row in read_rows(source):
        assert isinstance(row, ChoiceRow)
        try:
            choices.append(_encode_choice(row, encoder, max_seq_length=max_seq_length))
        except RowError as error:
            errors.add(WrongRow(row.where, str(error)))
    errors.raise_if_any()
    return choices


def _encode_choice(row: ChoiceRow, encoder: ChatEncoder, *, max_seq_length: int) -> _EncodedChoice:
    choices = [encoder.text_ids(choice) for choice in row.choices]
    longest = max(map(len, choices))
    prompt = encoder.prompt_ids(row.messages)[-max(1, max_seq_length - longest) :]
    return _EncodedChoice(prompt, choices, row.answer)


def _num_cells(row: _EncodedChoice) -> int:
    return len(row.prompt) + len(row.choices) * max(map(len, row.choices))


def _has_plain_cache(model: Any) -> bool:
    """Whether keys and values of a prompt can be copied to its choices: full attention in every layer."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    arguments = accepted_arguments(model)
    return (
        all(kind == "full_attention" for kind in kinds)
        and not getattr(config, "sliding_window", None)
        and {"past_key_values", "position_ids", "logits_to_keep"} <= arguments
    )


def _score_shared(model: Any, rows: list[_EncodedChoice], pad_token_id: int) -> list[list[float]]:
    """Run each prompt once, then all choices of all rows on copies of the prompts' keys and values."""
    device = next(model.parameters()).device
    prompts, mask = _pad([row.prompt for row in rows], pad_token_id, left=True)
    prompts, mask = prompts.to(device), mask.to(device)
    output = model(
        input_ids=prompts, attention_mask=mask, position_ids=positions(mask), use_cache=True, logits_to_keep=1
    )
    first = output.logits[:, -1].float().log_softmax(dim=-1)
    owner = torch.tensor([place for place, row in enumerate(rows) for _ in row.choices], device=device)
    candidates = [choice for row in rows for choice in row.choices]
    # The prompt's last position predicts a choice's first token; its other tokens need the ones before them.
    totals = first[owner, torch.tensor([choice[0] for choice in candidates], device=device)]
    longer = [place for place, choice in enumerate(candidates) if len(choice) > 1]
    if longer:
        picked = torch.tensor(longer, device=device)
        inputs, inputs_mask = _pad([candidates[place][:-1] for place in longer], pad_token_id, left=False)
        targets, _ = _pad([candidates[place][1:] for place in longer], 0, left=False)
        inputs, inputs_mask, targets = inputs.to(device), inputs_mask.to(device), targets.to(device)
        cache = output.past_key_values
        cache.batch_select_indices(owner[picked])
        whole_mask = torch.cat([mask[owner[picked]], inputs_mask], dim=1)
        logits = model(
            input_ids=inputs,
            attention_mask=whole_mask,
            position_ids=positions(whole_mask)[:, mask.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        ).logits
        logs = logits.float().log_softmax(dim=-1).gather(2, targets.unsqueeze(2)).squeeze(2)
        totals[picked] += (logs * inputs_mask).sum(dim=1)
    means = (totals / torch.tensor([len(choice) for choice in candidates], device=device)).tolist()
    return _split(means, rows)


def _score_in_full(model: Any, rows: list[_EncodedChoice], pad_token_id: int) -> list[list[float]]:
    """Run every choice with its whole prompt: the slow way that fits any architecture."""
    device = next(model.parameters()).device
    means: list[float] = []
    for row in rows:
        lengths = [len(choice) for choice in row.choices]
        ids, mask = _pad([row.prompt + choice for choice in row.choices], pad_token_id, left=True)
        batch = Batch(ids, mask, positions(mask), ids, num_tokens=int(mask.sum()), num_trained=1).to(device)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if "position_ids" in accepted_arguments(model):
            inputs["position_ids"] = batch.position_ids
        logs = model(**inputs, use_cache=False).logits[:, :-1].float().log_softmax(dim=-1)
        found = logs.gather(2, batch.input_ids[:, 1:].unsqueeze(2)).squeeze(2)
        means += [float(found[place, -length:].mean()) for place, length in enumerate(lengths)]
    return _split(means, rows)


def _pad(sequences: list[list[int]], value: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids [B, T] and mask [B, T] (int64), padded on one side to the longest."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), value, dtype=torch.int64)
    mask = torch.zeros((len(sequences), width), dtype=torch.int64)
    for place, sequence in enumerate(sequences):
        where = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[place, where] = torch.tensor(sequence)
        mask[place, where] = 1
    return ids, mask


def _split(values: list[float], rows: list[_EncodedChoice]) -> list[list[float]]:
    """The flat list of choices' values, one list per row."""
    result, at = [], 0
    for row in rows:
        result.append(values[at : at + len(row.choices)])
        at += len(row.choices)
    return result
