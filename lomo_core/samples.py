"""What the model answers to the run's own prompts, for people to read beside the figures.

Greedy, so that two answers differ only because the weights do; one prompt at a time, so that an answer does not depend
on its neighbours' padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers

from lomo_core.data.rows import ChatMessage, RowError
from lomo_core.data.template import ChatEncoder
from lomo_core.errors import ConfigError
from lomo_core.events import Sample
from lomo_core.stop import StopRequest


class Sampler:
    """The prompts of a run, rendered once.

    Raises:
        ConfigError: the model's template refuses a prompt.
    """

    def __init__(self, prompts: Sequence[str], tokenizer: Any, *, max_new_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        encoder = ChatEncoder(tokenizer)
        self._prompts: list[tuple[str, list[int]]] = []
        for prompt in prompts:
            try:
                ids = encoder.prompt_ids([ChatMessage(role="user", content=prompt, trained=False)])
            except RowError as error:
                raise ConfigError(f"the prompt {prompt!r} cannot be used: {error}", param="sample_prompts") from error
            self._prompts.append((prompt, ids))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer at full length."""
        return max(len(ids) for _, ids in self._prompts) + self._max_new_tokens

    def run(self, model: Any, *, step: int, stop: StopRequest) -> Iterator[Sample]:
        """Answer each prompt; a stop is noticed within a token.

        Raises:
            InterruptedRunError: a stop was asked for.
        """
        was_training = model.training
        model.eval()
        try:
            for prompt, ids in self._prompts:
                answer = self._answer(model, ids, stop)
                stop.raise_if_requested()
                text = self._tokenizer.decode(answer, skip_special_tokens=True)
                yield Sample(step=step, prompt=prompt, text=text, num_tokens=len(answer))
        finally:
            model.train(was_training)

    def _answer(self, model: Any, ids: list[int], stop: StopRequest) -> list[int]:
        inputs = torch.tensor([ids], device=next(model.parameters()).device)
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=self._generation_config(model),
            stopping_criteria=[lambda found, _: torch.full((len(found),), stop.is_requested, device=found.device)],
        )
        answer: list[int] = output[0, len(ids) :].tolist()
        return answer

    def _generation_config(self, model: Any) -> Any:
        """Nothing of the model's own (temperatures, penalties) but its end tokens."""
        own = getattr(model, "generation_config", None)
        end = getattr(own, "eos_token_id", None)
        config_class: Any = transformers.GenerationConfig
        return config_class(
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
            eos_token_id=self._tokenizer.eos_token_id if end is None else end,
            pad_token_id=self._tokenizer.pad_token_id,
        )
