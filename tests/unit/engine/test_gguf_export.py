"""GGUF files: transformers reads back every weight, the logits and the tokens; llama.cpp's own file says the same.

Two readers that are not ours judge: transformers' (model and tokenizer) and the `gguf` package's (names and types),
which is llama.cpp's. llama.cpp itself is not run.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from local.demo import _find_gguf
from lomo_core.__main__ import main
from lomo_core.errors import ModelError
from lomo_core.gguf.architecture import Architecture
from lomo_core.gguf.export import GgufModel, interleave, widen, write_gguf
from lomo_core.gguf.head import TensorType
from lomo_core.gguf.vocabulary import _SPLIT_NAMES
from tests.support.tiny_model import VOCAB_SIZE, make_tiny_model

TEXTS = [
    "<|im_start|>user\nWhat goes with sun?<|im_end|>\n<|im_start|>assistant\n",
    "Grüße, 東京! naïve 🙂 café  12345 and 6 7\t\n\n  it's THEY'LL\r\n",
    "",
]
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE + 3,  # the tokenizer has fewer, as Qwen's has
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
QWEN2, LLAMA3 = (next(split for split, name in _SPLIT_NAMES.items() if name == each) for each in ("qwen2", "llama-bpe"))


def make_model(
    folder: Path, kind: str, *, dtype: torch.dtype = torch.float32, split: str | None = None, **config: Any
) -> Path:
    """A model of a type with no weight at its initial value, and the tiny tokenizer, its words split by `split`."""
    make_tiny_model(folder)
    settings = {"rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0}} | SIZES | config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **settings))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.to(dtype).save_pretrained(folder)
    if split is not None:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit a JSON file."""
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def fields_of(path: Path) -> dict[str, Any]:
    """A file's pairs, each with its type, as llama.cpp's package reads them."""
    fields = gguf.GGUFReader(path).fields.items()
    return {name: (field.types[0].name, field.contents()) for name, field in fields if not name.startswith("GGUF.")}


@pytest.mark.parametrize(
    ("kind", "tied", "dtype", "split", "more"),
    [
        ("llama", True, torch.float32, None, {}),
        ("llama", False, torch.bfloat16, LLAMA3, {"num_key_value_heads": 4}),
        ("llama", False, torch.float16, None, {}),
        ("qwen2", True, torch.bfloat16, QWEN2, {}),
        ("qwen2", False, torch.float32, QWEN2, {}),
        ("qwen3", False, torch.bfloat16, QWEN2, {"head_dim": 128}),  # all that transformers' reader knows
    ],
)
def test_transformers_reads_the_same_model(
    tmp_path: Path, kind: str, tied: bool, dtype: torch.dtype, split: str | None, more: dict[str, Any]
) -> None:
    folder = make_model(tmp_path / "model", kind, dtype=dtype, split=split, tie_word_embeddings=tied, **more)
    if split == LLAMA3:
        change(folder / "tokenizer.json", lambda tokenizer: tokenizer["model"].update(ignore_merges=True))
    write_gguf(folder, tmp_path / "model.gguf")
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    state = found.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert [name for name, weight in expected.state_dict().items() if not torch.equal(weight, state[name])] == []
    assert found.config.tie_word_embeddings is tied
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, expected(tokens).logits)
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert [theirs.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert [theirs.decode(ours.encode(text)) for text in TEXTS] == [ours.decode(ours.encode(text)) for text in TEXTS]
    assert (theirs.eos_token, theirs.pad_token, theirs.unk_token) == (ours.eos_token, ours.pad_token, ours.unk_token)
    assert theirs.chat_template == ours.chat_template


def test_names_and_types_are_llama_cpps(tmp_path: Path) -> None:
    """Norms and biases are fp32, matrices as they are stored; every name is what llama.cpp's converter gives it."""
    folder = make_model(tmp_path / "model", "llama", dtype=torch.bfloat16, attention_bias=True, mlp_bias=True)
    write_gguf(folder, tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    stored = load_file(folder / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZES["num_hidden_layers"])
    assert {names.get_name(name, (".weight", ".bias")) for name in stored} == set(tensors)
    for name, weight in stored.items():
        tensor = tensors[names.get_name(name, (".weight", ".bias"))]
        assert tensor.tensor_type.name == ("F32" if weight.dim() == 1 else "BF16")
        values = torch.from_numpy(numpy.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        if (heads := {"attn_q": 4, "attn_k": 2}.get(tensor.name.split(".")[-2])) is not None:
            # As llama.cpp's converter permutes them, undone.
            values = values.reshape(heads, 8, 2, -1).swapaxes(1, 2).reshape(weight.shape)
        assert torch.equal(values, weight.float()), name


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_every_architecture_has_llama_cpps_names(kind: str) -> None:
    config = transformers.AutoConfig.for_model(kind, **SIZES, tie_word_embeddings=False).to_dict()
    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(arch, SIZES["num_hidden_layers"])
    wanted = list(Architecture.of(config).tensors())
    assert [tensor.name for tensor in wanted] == [names.get_name(each.source, (".weight", ".bias")) for each in wanted]
    known = {gguf.TENSOR_NAMES[tensor].format(bid=0) for tensor in gguf.MODEL_TENSORS[arch]}
    assert {each.name.rpartition(".")[0] for each in wanted if "blk.1" not in each.name} <= known


def test_the_description_is_that_of_llama_cpps_own_file(tmp_path: Path) -> None:
    """SmolLM2 as llama.cpp's converter has written it, made a folder by transformers and described by us."""
    reference = _find_gguf()
    source = {"pretrained_model_name_or_path": str(reference.parent), "gguf_file": reference.name}
    folder = tmp_path / "model"
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(**source)
    config.save_pretrained(folder)
    header, end = {}, 0
    for tensor in Architecture.of(config.to_dict()).tensors():
        if not tensor.is_optional:
            begin, end = end, end + 2 * int(numpy.prod(tensor.shape))
            header[tensor.source] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:  # sparse: only what describes the weights counts here
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    model = GgufModel(folder, name="ft:docs")
    with (tmp_path / "model.gguf").open("wb") as file:
        file.write(next(model.chunks()))
        file.truncate(model.num_bytes)
    theirs, ours = fields_of(reference), fields_of(tmp_path / "model.gguf")
    other = {"general.name", "general.file_type"}  # another model, not quantised
    other.add("tokenizer.ggml.pre")  # transformers reads "smollm" as GPT-2's split, and ours says what the folder does
    model_card = {
        f"general.{name}" for name in ("organization", "finetune", "basename", "size_label", "license", "languages")
    }
    assert theirs.keys() - ours.keys() == model_card
    assert ours.keys() - theirs.keys() == {"tokenizer.ggml.add_eos_token"}
    assert {name for name in theirs.keys() & ours.keys() if theirs[name] != ours[name]} == other
    assert (ours["general.file_type"], ours["tokenizer.ggml.pre"]) == (("UINT32", 32), ("STRING", "gpt-2"))
    shapes = [
        {tensor.name: tensor.shape.tolist() for tensor in gguf.GGUFReader(path).tensors}
        for path in (reference, tmp_path / "model.gguf")
    ]
    assert shapes[0] == shapes[1]


def test_rope_scaling(tmp_path: Path) -> None:
    llama3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
    llama3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    folder = make_model(tmp_path / "llama3", "llama", rope_parameters=llama3)
    write_gguf(folder, tmp_path / "llama3.gguf")
    factors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "llama3.gguf").tensors}[
        "rope_freqs.weight"
    ]
    config = transformers.AutoConfig.from_pretrained(folder)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500_000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / torch.tensor(numpy.array(factors)), scaled)
    assert len(set(factors.tolist())) > 2  # some left, some stretched, some blended

    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
    write_gguf(make_model(tmp_path / "yarn", "qwen2", rope_parameters=yarn), tmp_path / "yarn.gguf")
    fields = fields_of(tmp_path / "yarn.gguf")
    assert {name: value for name, value in fields.items() if "rope.scaling" in name} == {
        "qwen2.rope.scaling.type": ("STRING", "yarn"),
        "qwen2.rope.scaling.factor": ("FLOAT32", 4.0),
        "qwen2.rope.scaling.original_context_length": ("UINT32", 32),
    }


def test_configurations_of_older_versions(tmp_path: Path) -> None:
    """`rope_theta` beside `rope_scaling`, a template in tokenizer_config.json, merges as strings, a bos in front."""
    folder = make_model(tmp_path / "model", "llama", bos_token_id=0)

    def age(config: dict[str, Any]) -> None:
        del config["rope_parameters"]
        config |= {"rope_theta": 20_000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "eos_token_id": [1, 2]}
        del config["head_dim"], config["num_key_value_heads"]

    def forget(config: dict[str, Any]) -> None:
        del config["eos_token"]
        config["chat_template"] = "{{ messages }}"
        config["bos_token"] = {"content": "<|endoftext|>"}

    def join(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["merges"] = [" ".join(merge) for merge in tokenizer["model"]["merges"]]
        pieces = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        template = {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": {}}
        tokenizer["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}

    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            weights[name] = torch.cat([weights[name]] * 2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "chat_template.jinja").unlink()
    change(folder / "config.json", age)
    change(folder / "tokenizer_config.json", forget)
    change(folder / "tokenizer.json", join)
    write_gguf(folder, tmp_path / "model.gguf")
    fields = {name: value for name, (_, value) in fields_of(tmp_path / "model.gguf").items()}
    assert fields["llama.rope.freq_base"] == 20_000.0
    assert (fields["llama.rope.scaling.type"], fields["llama.rope.scaling.factor"]) == ("linear", 2.0)
    assert fields["llama.attention.head_count_kv"] == 4
    assert fields["tokenizer.ggml.merges"][0].count(" ") == 1
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    assert fields["tokenizer.ggml.tokens"][-1] == f"[PAD{VOCAB_SIZE + 2}]"
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert fields["tokenizer.ggml.token_type"][-1] == 5


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "gemma3_text"}, "only llama, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"use_sliding_window": True}, "sliding windows"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "positions of the type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 3}}, "beta_fast, factor"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"intermediate_size": None}, "a wrong one"),
        ({"max_position_embeddings": -1}, "out of range"),
        ({"rope_parameters": ["default"]}, "a wrong one"),
        ({"intermediate_size": 97}, r"is \[96, 64\], and \[97, 64\] by its config.json"),
        ({"num_hidden_layers": 3}, "lack model.layers.2"),
        ({"num_hidden_layers": 1}, "no place for its tensor model.layers.1"),
        ({"tie_word_embeddings": False}, "lack lm_head.weight"),
    ],
)
def test_what_gguf_cannot_say_is_refused(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    folder = make_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    change(folder / "config.json", lambda value: value.update(config))
    with pytest.raises(ModelError, match=reason):
        write_gguf(folder, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tensor_in_another_precision_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model.norm.weight is stored as F64"):
        GgufModel(folder, name="x")


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        ("model", {"type": "WordPiece"}, "of type WordPiece"),
        ("model", {"type": "BPE", "byte_fallback": True}, "with byte_fallback"),
        ("model", {"type": "BPE", "ignore_merges": True}, "no name for"),
        ("normalizer", {"type": "Lowercase"}, r"normalises texts \(Lowercase\)"),
        ("pre_tokenizer", {"type": "Metaspace"}, r"splits texts \(by Metaspace\)"),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}, r"splits texts \(by ByteLevel\)"),
        ("pre_tokenizer", None, r"splits texts \(by nothing\)"),
        ("post_processor", {"type": "RobertaProcessing"}, "ends in RobertaProcessing"),
        ("post_processor", {"type": "TemplateProcessing"}, "not of the known form: KeyError"),
        (
            "post_processor",
            {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|im_start|>"}}, {"Sequence": {}}]},
            "puts '<|im_start|>' around",
        ),
    ],
)
def test_tokenizers_that_llama_cpp_lacks_are_refused(tmp_path: Path, part: str, value: Any, reason: str) -> None:
    folder = make_tiny_model(tmp_path / "model")
    change(
        folder / "tokenizer.json",
        lambda tokenizer: tokenizer.update({part: (tokenizer[part] | value) if part == "model" else value}),
    )
    with pytest.raises(ModelError, match=reason.replace("|", r"\|")):
        GgufModel(folder, name="x")


def test_the_split_of_smollm(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    both = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    change(folder / "tokenizer.json", lambda tokenizer: tokenizer.update(pre_tokenizer=both))
    write_gguf(folder, tmp_path / "model.gguf")
    assert fields_of(tmp_path / "model.gguf")["tokenizer.ggml.pre"] == ("STRING", "smollm")


def test_rows_and_widening() -> None:
    assert interleave(bytes([0, 0, 1, 1, 2, 2, 3, 3]), num_rows=4) == bytes([0, 0, 2, 2, 1, 1, 3, 3])
    values = torch.tensor([1.5, -3.0e38, 2.0**-130, float("inf")])
    for kind, dtype in ((TensorType.BF16, torch.bfloat16), (TensorType.F16, torch.float16)):
        stored = values.to(dtype)
        wide = widen(stored.view(torch.uint8).numpy().tobytes(), kind)
        assert wide == stored.float().numpy().tobytes()


def test_pieces_are_small_and_a_file_that_shrinks_breaks_the_stream(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama", tie_word_embeddings=True, intermediate_size=8192)
    model = GgufModel(folder, name="x")
    chunks = model.chunks()
    sizes = [len(next(chunks)), *map(len, chunks)]
    assert sum(sizes) == model.num_bytes
    assert max(sizes[1:]) == 1 << 20
    model = GgufModel(folder, name="x")
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(EOFError, match="has become shorter"):
        list(model.chunks())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, path = make_tiny_model(tmp_path / "model"), tmp_path / "out.gguf"
    arguments = ["export-gguf", "--model", str(folder), "--out", str(path)]
    assert main(arguments, {}) == 0
    assert fields_of(path)["general.name"] == ("STRING", "model")
    assert main(arguments, {}) == ModelError.exit_code
    assert "exists already" in capsys.readouterr().err
