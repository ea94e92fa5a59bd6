"""Any causal language model's shapes and traces from its configuration alone: no weights, no storage, no network.

The model is built of fake tensors (shape, dtype and device without storage). Its blocks are found, not known by name:
the list of modules with the most parameters. With stubs in their place the model's own forward says what each block is
called with; then one block of each kind is traced by itself (`trace.py`), under each dtype, attention and mask.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from transformers import masking_utils
from transformers.initialization import no_init_weights

from lomo_core.errors import ModelError, UnforeseenModelError
from lomo_core.memory.model_shapes import BlockKind, BlockTraces, ModelShapes, Polynomial, Rows, Trace, Traces, Variant
from lomo_core.memory.trace import (
    SIZES_OF_ONE_ROW,
    SIZES_OF_ROWS,
    Run,
    TraceError,
    checkpointed,
    fit,
    fit_left,
    run_part,
)
from lomo_core.model import find_blocks, has_linear_head
from lomo_core.tokenizer import LOAD_ERRORS

# fp16 has bf16's sizes.
_DTYPES = (torch.bfloat16, torch.float32)
_EAGER = "eager"
# What a forward raises that looks at values, or takes other inputs than the executor's (mixtures of experts, state
# spaces).
_TRACE_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError)


class _Stub(nn.Module):
    """Takes a block's place: gives its input back and notes its other arguments."""

    def __init__(self, block: nn.Module, calls: list[_Call]) -> None:
        super().__init__()
        self.__dict__.update(_block=block, _calls=calls)

    def __getattr__(self, name: str) -> Any:
        """What models ask of a block beside calling it, such as its kind of attention."""
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden states, as the block would give them back."""
        names = dict(kwargs)
        hidden, rest = (args[0], args[1:]) if args else (names.pop("hidden_states"), ())
        self.__dict__["_calls"].append(_Call(rest, names))
        return hidden


@dataclass(frozen=True, slots=True)
class _Call:
    """What a block is called with, beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        leaves = torch.utils._pytree.tree_leaves((self.args, self.kwargs))  # noqa: SLF001 - torch has no public one
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def signature(self) -> tuple[Any, ...]:
        return tuple((tuple(tensor.shape), tensor.dtype) for tensor in self.tensors())


def read_shapes(architecture: Any, *, with_eager: bool = False) -> ModelShapes:
    """Shapes and traces of the model that transformers builds from a configuration, under the attention that it chooses
    and, on request, under `eager`.

    Raises:
        ModelError: transformers cannot build it; UnforeseenModelError: what it does cannot be followed without data.
    """
    # What an operation cannot do is said by our error, not in its log as well.
    logging.getLogger(fake_tensor.__name__).setLevel(logging.CRITICAL)
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True), _one_sequence_per_row():
        # Fake tensors cannot change their dtype in place: a model for each.
        models = [_build(architecture, dtype) for dtype in _DTYPES]
        try:
            readers = [_Reader(model) for model in models]
            traces = tuple(traces for reader in readers for traces in reader.traces(with_eager=with_eager))
            return readers[0].read(traces)
        except _TRACE_ERRORS as error:
            raise _unfollowed(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error


def _build(architecture: Any, dtype: torch.dtype) -> Any:
    auto_model: Any = transformers.AutoModelForCausalLM
    try:
        with no_init_weights():
            model = auto_model.from_config(architecture, dtype=dtype)
    except (*LOAD_ERRORS, RuntimeError, ArithmeticError) as error:
        raise ModelError(f"the model cannot be built from its config.json: {error}", param="model") from error
    model.tie_weights()
    return model


class _Reader:
    """Reads one model of fake tensors."""

    def __init__(self, model: Any) -> None:
        self._model = model.train()
        self._body = model.base_model
        self._blocks = find_blocks(model)
        self._parent, self._name = _find_list(model, self._blocks)
        self._order, self._kinds, self._examples = self._find_kinds()

    def traces(self, *, with_eager: bool) -> Iterator[Traces]:
        """Of every attention and mask in the model's dtype, the attention that it is made with first."""
        configured = self._model.config._attn_implementation  # noqa: SLF001 - transformers has no public reader of it
        for attention in dict.fromkeys((configured, _EAGER) if with_eager else (configured,)):
            self._model.set_attn_implementation(attention)
            for rows in get_args(Rows):
                variant = Variant(itemsize=self._model.dtype.itemsize, attention=attention, rows=rows)
                yield self._trace(variant)

    def read(self, traces: tuple[Traces, ...]) -> ModelShapes:
        """Everything else."""
        model = self._model
        parameters = list(model.parameters())
        text = model.config.get_text_config()
        limit = getattr(text, "max_position_embeddings", None)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        return ModelShapes(
            architecture=type(model).__name__,
            parameters=_counted(parameters),
            buffers_bytes=sum(buffer.nbytes for buffer in model.buffers()),
            vocab_size=embedding.weight.shape[0],
            hidden_size=text.hidden_size,
            is_tied=head is not None and head.weight is embedding.weight,
            has_plain_head=has_linear_head(model) and self._returns_head_output(),
            is_checkpointable=bool(model.supports_gradient_checkpointing),
            max_seq_length=limit if isinstance(limit, int) else None,
            kinds=self._kinds,
            order=self._order,
            traces=traces,
        )

    def _find_kinds(self) -> tuple[tuple[int, ...], tuple[BlockKind, ...], tuple[int, ...]]:
        """(kind of each block, the kinds, number of the first block of each kind)."""
        calls = self._calls(*SIZES_OF_ROWS[0], padded=True)
        if len(calls) != len(self._blocks):
            raise _unfollowed(f"it calls {len(calls)} of its {len(self._blocks)} blocks")
        keys = [
            (type(block).__name__, tuple(tuple(p.shape) for p in block.parameters()), call.signature())
            for block, call in zip(self._blocks, calls, strict=True)
        ]
        distinct = list(dict.fromkeys(keys))
        order = tuple(distinct.index(key) for key in keys)
        kinds = tuple(
            BlockKind(
                name=name,
                count=order.count(index),
                num_parameters=sum(map(math.prod, shapes)),
                largest_parameter=max(map(math.prod, shapes)),
            )
            for index, (name, shapes, _) in enumerate(distinct)
        )
        return order, kinds, tuple(order.index(index) for index in range(len(distinct)))

    def _trace(self, variant: Variant) -> Traces:
        runs_around: list[Run] = []
        runs: list[list[tuple[Run, Run]]] = [[] for _ in self._examples]
        is_padded = variant.rows == "padded"
        for batch, seq in SIZES_OF_ONE_ROW if variant.rows == "one" else SIZES_OF_ROWS:
            calls = self._calls(batch, seq, padded=is_padded)
            source = torch.empty(batch, seq, self._width, dtype=self._model.dtype)
            runs_around.append(self._run_around(source, padded=is_padded))
            for of_kind, index in zip(runs, self._examples, strict=True):
                of_kind.append(_run_block(self._blocks[index], calls[index], source))
        return Traces(
            variant=variant,
            blocks=tuple(map(_fit_block, runs)),
            arguments=_fit_left(runs_around),
            around=_fit(runs_around, "what surrounds its blocks"),
        )

    @property
    def _width(self) -> int:
        return int(self._model.get_input_embeddings().weight.shape[1])

    def _run_around(self, source: Tensor, *, padded: bool) -> Run:
        model = self._model
        # The blocks keep their arguments: while the list of calls lives, so do these.
        with self._stubbed([]):
            return run_part(
                lambda hidden: self._body(inputs_embeds=hidden, **_inputs(source, padded=padded)).last_hidden_state,
                source,
                known=[*model.parameters(), *model.buffers()],
            )

    def _calls(self, batch: int, seq: int, *, padded: bool) -> list[_Call]:
        """What each block is called with."""
        calls: list[_Call] = []
        source = torch.empty(batch, seq, self._width, dtype=self._model.dtype)
        with self._stubbed(calls), torch.no_grad():
            self._body(inputs_embeds=source, **_inputs(source, padded=padded))
        return calls

    def _returns_head_output(self) -> bool:
        """Whether the model's logits are its head's output and not something made of it."""
        outputs: list[Tensor] = []
        handle = self._model.get_output_embeddings().register_forward_hook(
            lambda module, args, output: outputs.append(output)
        )
        source = torch.empty(*SIZES_OF_ROWS[0], self._width, dtype=self._model.dtype)
        try:
            with self._stubbed([]), torch.no_grad():
                logits = self._model(inputs_embeds=source, **_inputs(source, padded=False)).logits
        finally:
            handle.remove()
        return len(outputs) == 1 and logits is outputs[0]

    @contextmanager
    def _stubbed(self, calls: list[_Call]) -> Iterator[None]:
        stubs = nn.ModuleList([_Stub(block, calls) for block in self._blocks])
        real = getattr(self._parent, self._name)
        setattr(self._parent, self._name, stubs)
        try:
            yield
        finally:
            setattr(self._parent, self._name, real)


def _find_list(model: Any, blocks: list[nn.Module]) -> tuple[nn.Module, str]:
    """(module, attribute) of the list that holds the blocks."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and blocks and list(child) == blocks:
                return parent, name
    raise _unfollowed("it has no list of blocks")


def _inputs(source: Tensor, *, padded: bool) -> dict[str, Any]:
    """As the executor calls the model (`vocabulary_head.py`); without padding the mask has no effect."""
    mask, positions = (torch.empty(*source.shape[:2], dtype=torch.int64) for _ in range(2))
    return {"attention_mask": mask if padded else None, "position_ids": positions, "use_cache": False}


@contextmanager
def _one_sequence_per_row() -> Iterator[None]:
    """Inside, transformers takes each row for one sequence, as it does in training once it has seen the positions; fake
    ones have no values to see, and it would make a mask for several."""
    real = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = real


def _run_block(block: nn.Module, call: _Call, source: Tensor) -> tuple[Run, Run]:
    """The block's runs: as it is, and checkpointed."""

    def part(hidden: Tensor) -> Tensor:
        output = block(hidden, *call.args, **call.kwargs)
        return output if isinstance(output, Tensor) else output[0]

    known = [*block.parameters(), *block.buffers(), *call.tensors()]
    return run_part(part, source, known=known), run_part(checkpointed(part), source, known=known)


def _fit_block(runs: list[tuple[Run, Run]]) -> BlockTraces:
    ways = list(zip(*runs, strict=True))
    plain, plain_keeping, again, again_keeping = (
        _fit(way, "a block", keeping=keeping) for way in ways for keeping in (False, True)
    )
    return BlockTraces(plain, plain_keeping, again, again_keeping)


def _fit(runs: Sequence[Run], what: str, *, keeping: bool = False) -> Trace:
    try:
        return fit(runs, keeping=keeping)
    except TraceError as error:
        raise _unfollowed(f"{what}: {error}") from error


def _fit_left(runs: Sequence[Run]) -> Polynomial:
    try:
        return fit_left(runs)
    except TraceError as error:
        raise _unfollowed(f"what surrounds its blocks: {error}") from error


def _unfollowed(reason: str) -> UnforeseenModelError:
    return UnforeseenModelError(f"the model's memory cannot be foreseen ({reason})", param="model")


def _counted(parameters: Sequence[Tensor]) -> tuple[tuple[tuple[int, ...], int], ...]:
    counts: dict[tuple[int, ...], int] = {}
    for parameter in parameters:
        shape = tuple(parameter.shape)
        counts[shape] = counts.get(shape, 0) + 1
    return tuple(counts.items())
