"""The loss without logits against the model's own head, for several architectures, ties, rules and precisions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lomo_core import vocabulary_head
from lomo_core.data.batches import IGNORE, Batch, positions
from lomo_core.execute.plain import PlainExecutor
from lomo_core.head import batch_loss
from lomo_core.memory.meter import Meter
from lomo_core.optim import AdaLomo, Lomo
from lomo_core.optim.fused import FusedOptimizer
from lomo_core.vocabulary_head import VocabularyHead

CPU = torch.device("cpu")
VOCABULARY = 700
NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five blocks of rows, the last one smaller."""
    monkeypatch.setattr(vocabulary_head, "_LEAST_ROWS", 150)
    monkeypatch.setattr(vocabulary_head, "_LOGITS_ELEMENTS", 0)


def make_model(kind: str, *, tied: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(1)
    options = {**SIZES, "tie_word_embeddings": tied}
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            tie_word_embeddings=tied,
            **NO_DROPOUT,
        )
    elif kind == "gemma2":
        config = transformers.Gemma2Config(**options, head_dim=8)
    elif kind == "gemma3":
        config = transformers.Gemma3TextConfig(**options, head_dim=8)
    elif kind == "granite":
        config = transformers.GraniteConfig(**options, logits_scaling=8.0)
    else:
        config = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[kind](**options, pad_token_id=3)
    config.bos_token_id, config.eos_token_id = 1, 2
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def make_batch(step: int) -> Batch:
    """Three rows with padding (token 3) on the left, a padding token inside of the text, a third of the labels."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(4, VOCABULARY, (3, 24), generator=generator)
    ids[:, 10] = 3
    ids[:, 12] = 17
    mask = torch.ones_like(ids)
    mask[0, :8] = mask[1, :3] = 0
    ids[mask == 0] = 3
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.35, ids, IGNORE)
    labels[mask == 0] = IGNORE
    labels[:, 0] = IGNORE
    labels[:, 11] = ids[:, 11]
    num_trained = int((labels[:, 1:] != IGNORE).sum())
    return Batch(ids, mask, positions(mask), labels, num_tokens=int(mask.sum()), num_trained=num_trained)


def gradients(model: Any, batch: Batch) -> dict[str, Tensor]:
    """Of the model's own head and cross-entropy, in fp64."""
    reference = copy.deepcopy(model).double()
    logits = reference(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    ).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("mode", ["none", "norm", "group"])
def test_one_step_is_the_gradient_of_the_models_own_head(kind: str, tied: bool, mode: str) -> None:
    model = make_model(kind, tied=tied)
    # Positions say where GPT-2's padding ends only when they are given, as here.
    batch = make_batch(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = gradients(model, batch)
    # A threshold far above the norm: the gradient itself, through the clipping's way.
    options = {} if mode == "none" else {"max_grad_norm": 1e6, "clip_mode": mode}
    optimizer = Lomo(model.parameters(), lr=1.0, **options)  # type: ignore[arg-type]
    head = VocabularyHead.find(model, optimizer)
    assert head is not None
    result = head.loss(batch)
    reference = batch_loss(model, batch)
    assert result.loss.item() == pytest.approx(reference.loss.item(), rel=1e-6)
    assert int(result.num_correct) == int(reference.num_correct)
    assert optimizer.backward(result.loss)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(before[name] - p, expected[name].float(), rtol=1e-4, atol=1e-6)
    assert optimizer.peak_gradient_bytes > 0


@pytest.mark.parametrize("spill", [None, "memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_and_the_whole_buffer_give_the_same_steps(dtype: torch.dtype, spill: Any) -> None:
    """Weight decay, clipping, stochastic rounding: the row-wise way against the hook on the whole gradient."""
    models = [make_model("llama", dtype=dtype) for _ in range(2)]
    losses: list[list[float]] = [[], []]
    for index, model in enumerate(models):
        optimizer = Lomo(
            model.parameters(), 0.2, weight_decay=0.05, max_grad_norm=1.0, rounding="stochastic", spill_to=spill
        )
        head = VocabularyHead.find(model, optimizer)
        assert head is not None
        assert head._in_rows
        head._in_rows = index == 0
        for step in range(4):
            result = head.loss(make_batch(step))
            losses[index].append(result.loss.item())
            assert optimizer.backward(result.loss)
            optimizer.step()
    assert losses[0] == pytest.approx(losses[1], abs=2e-3 if dtype == torch.bfloat16 else 1e-6)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    # A row that no batch looks up or predicts still decays, and only once a step.
    untouched = (1 - 0.2 * 0.05) ** 4
    fresh = make_model("llama", dtype=dtype).model.embed_tokens.weight[0]
    ratio = (models[0].model.embed_tokens.weight[0].norm() / fresh.norm()).item()
    assert ratio == pytest.approx(untouched, rel=0.05)


@pytest.mark.parametrize("cls", [Lomo, AdaLomo])
def test_a_tied_head_holds_no_gradient_of_the_vocabularys_size_under_a_row_wise_rule(cls: type[FusedOptimizer]) -> None:
    model = make_model("llama")
    optimizer = cls(model.parameters(), 0.01)
    head = VocabularyHead.find(model, optimizer)
    assert head is not None
    assert optimizer.backward(head.loss(make_batch(0)).loss)
    whole = VOCABULARY * 32 * 4
    assert (optimizer.peak_gradient_bytes < whole) is (cls is Lomo)
    # Its own and one other tensor's.
    assert optimizer.peak_gradient_bytes < 1.2 * whole


def test_the_two_passes_of_exact_clipping_go_through_the_head() -> None:
    model, plain = make_model("llama"), make_model("llama")
    batch = make_batch(0)
    optimizer = Lomo(model.parameters(), 0.5, max_grad_norm=0.1)
    head = VocabularyHead.find(model, optimizer)
    assert head is not None
    assert optimizer.backward(head.loss(batch).loss)
    optimizer.step()
    sgd = torch.optim.SGD(plain.parameters(), 0.5, foreach=False)
    batch_loss(plain, batch).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    sgd.step()
    assert optimizer.last_grad_norm == pytest.approx(float(norm), rel=1e-5)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["gemma2", "granite"])
def test_a_model_that_caps_or_scales_its_logits_keeps_its_own_head(kind: str) -> None:
    model = make_model(kind)
    optimizer = Lomo(model.parameters(), 0.01)
    assert VocabularyHead.find(model, optimizer) is None
    executor = PlainExecutor(model, optimizer, Meter(model, optimizer, CPU))
    assert executor.has_own_head
    assert executor.run([make_batch(0)]).is_applied


def test_an_embedding_that_scales_its_rows_keeps_its_own_head_when_tied() -> None:
    assert VocabularyHead.find(make_model("gemma3", tied=True), None) is None


def test_frozen_weights_are_left_alone() -> None:
    model = make_model("llama")
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name)
    before = model.lm_head.weight.detach().clone()
    optimizer = Lomo([p for p in model.parameters() if p.requires_grad], 0.1)
    head = VocabularyHead.find(model, optimizer)
    assert head is not None
    batch = make_batch(0)
    expected = gradients(model, batch)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert optimizer.backward(head.loss(batch).loss)
    assert torch.equal(model.lm_head.weight, before)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(old[name] - p, expected[name].float() * 0.1, rtol=1e-3, atol=1e-6)


def test_only_the_head_may_be_trained() -> None:
    model = make_model("llama", tied=False)
    for p in model.parameters():
        p.requires_grad_(p is model.lm_head.weight)
    optimizer = Lomo([model.lm_head.weight], 0.1)
    head = VocabularyHead.find(model, optimizer)
    assert head is not None
    before = model.lm_head.weight.detach().clone()
    assert optimizer.backward(head.loss(make_batch(0)).loss)
    assert not torch.equal(model.lm_head.weight, before)


def test_a_measurement_keeps_no_graph_and_changes_nothing() -> None:
    model = make_model("llama")
    before = model.lm_head.weight.detach().clone()
    optimizer = Lomo(model.parameters(), 0.1)
    head = VocabularyHead.find(model, optimizer)
    assert head is not None
    with torch.inference_mode():
        result = head.loss(make_batch(0))
    assert not result.loss.requires_grad
    assert float(result.loss) == pytest.approx(batch_loss(model, make_batch(0)).loss.item(), rel=1e-6)
    assert torch.equal(model.lm_head.weight, before)


def test_activation_checkpointing_changes_no_bit() -> None:
    models = [make_model("llama") for _ in range(2)]
    models[1].activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for model in models:
        optimizer = Lomo(model.parameters(), 0.3, max_grad_norm=1.0)
        head = VocabularyHead.find(model, optimizer)
        assert head is not None
        for step in range(2):
            assert optimizer.backward(head.loss(make_batch(step)).loss)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
