"""A tiny Llama with a real tokenizer and chat template, as a Hugging Face folder: what tests train.

The weights are random (by the seed), the tokenizer is trained on docstrings of the standard library. Its padding
token is its end token, as in SmolLM2: whoever masks labels by token id then loses the end of every answer.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PLAIN_TEMPLATE = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

TAGGED_TEMPLATE = """\
{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}\
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}\
{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# As SmolLM2's: a system message is put in front where there is none.
DEFAULT_SYSTEM_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    + PLAIN_TEMPLATE
)

# As Qwen's: tools before everything, each call as JSON between tags, a tool's answer as a turn of its own.
TOOL_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% set calls %}{% for call in message.get('tool_calls', []) %}"
    "{{ '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}{% endfor %}{% endset %}"
    "{{ '<|im_start|>assistant\n' }}{{ message['content'] + calls + '<|im_end|>' }}{{ '\n' }}"
    "{% elif message['role'] == 'tool' %}{{ '<|im_start|>tool\n' + message['content'] + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TAGGED_TOOL_TEMPLATE = TOOL_TEMPLATE.replace(
    "{{ message['content'] + calls + '<|im_end|>' }}",
    "{% generation %}{{ message['content'] + calls + '<|im_end|>' }}{% endgeneration %}",
)

VOCAB_SIZE = 512
_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_tiny_model(folder: Path, *, seed: int = 0, template: str = PLAIN_TEMPLATE) -> Path:
    """Write a Llama of about 100 thousand fp32 parameters into `folder` and return it. Takes about half a second."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_train_tokenizer(),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=512,
    )
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write rows as JSON lines and return the path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(prompt: str, answer: str) -> dict[str, object]:
    """A chat row of one turn."""
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def chat_rows(num_rows: int) -> list[dict[str, object]]:
    """Rows that a tiny model can learn: which of four words follows from the prompt's own word."""
    pairs = [("sun", "day"), ("moon", "night"), ("rain", "wet"), ("sand", "dry")]
    return [
        chat(f"{'please ' * (place % 7)}what goes with {pairs[place % 4][0]}?", pairs[place % 4][1])
        for place in range(num_rows)
    ]


def choice_rows(num_rows: int) -> list[dict[str, object]]:
    """Rows of the same task with the four words to choose from."""
    words = ["day", "night", "wet", "dry"]
    return [
        {"messages": row["messages"][:1], "choices": words, "answer": words.index(row["messages"][1]["content"])}  # type: ignore[index]
        for row in chat_rows(num_rows)
    ]


def _train_tokenizer() -> Tokenizer:
    texts = [argparse.__doc__ or "", json.__doc__ or "", textwrap.__doc__ or "", Path.__doc__ or ""]
    texts += [doc for cls in (str, bytes, dict, list, set) if (doc := getattr(cls, "__doc__", None))]
    texts += [doc for name in dir(str) if (doc := getattr(str, name).__doc__)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer
