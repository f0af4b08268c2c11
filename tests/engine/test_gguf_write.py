"""GGUF files that we write: the types, names and bytes of llama.cpp's own, read by it, by transformers and by us."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ggml
import gguf
import numpy as np
import pytest
import torch
from models import PROMPTS, cached_model
from safetensors.torch import load_file, save_file
from tiny_folder import MODELS, TEXTS, byte_level, save_tiny, save_tokenizer, sentencepiece
from tiny_gguf import write_tiny

from ragate_engine import ConfigError, EngineConfig, ModelFileError, SamplingParams
from ragate_engine.config import ModelConfig
from ragate_engine.kernels import StepInputs
from ragate_engine.quant.formats import Kind
from ragate_engine.quant.tensor import QuantTensor
from ragate_engine.quantize import quantize
from ragate_engine.request import Request, Row, StepPlan
from ragate_engine.runner import Runner
from ragate_engine.weights import Checkpoint, names, open_checkpoint
from ragate_engine.weights.gguf import model_config, read_header
from ragate_engine.weights.gguf_vocab import vocabulary
from ragate_engine.weights.gguf_write import MIXES, tensor_kind, write_gguf
from ragate_engine.weights.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path

LLAMA_8B = ModelConfig(
    arch="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_len=8192,
)
LLAMA_70B = replace(LLAMA_8B, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64)


def quietly(_done: int, _total: int) -> None:
    """Progress that nobody watches."""


def dense(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor as float32."""
    weight = checkpoint.load(name)
    return weight.dequantize() if isinstance(weight, QuantTensor) else weight.float()


def kinds_of(config: ModelConfig, mix: str) -> Counter[str]:
    """How many tensors of each type a model gets."""
    shapes = {names.to_gguf(name): shape for name, shape in names.expected(config).items()}
    return Counter(tensor_kind(name, shape, mix, config).name for name, shape in shapes.items())


def replies_of_llama_cpp(
    path: Path, prompts: list[str] | list[list[int]], tokens: int = 1
) -> list[dict[str, Any]]:
    """What llama.cpp says to each prompt, greedily, with the logprobs of the 40 best tokens in each place."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 512
    params.n_parallel = 1
    params.warmup = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    request = {"n_predict": tokens, "temperature": 0.0, "top_k": 1, "ignore_eos": True, "cache_prompt": False}
    if tokens == 1:
        request["logit_bias"] = {
            "70": 100
        }  # the reply tells nothing about half a character; not in the logprobs
    return [server.handle_completions(request | {"prompt": prompt, "logprobs": 40}) for prompt in prompts]


def logprobs_in(reply: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each generated token `id`, `logprob` and `top_logprobs`."""
    found: list[dict[str, Any]] = reply["choices"][0]["logprobs"]["content"]
    return found


def opened(path: Path) -> Runner:
    """The model, ready to compute."""
    return Runner(open_checkpoint(path), EngineConfig(device="cpu", kv_bytes=1 << 26))


def logits_after_each(runner: Runner, tokens: list[int]) -> torch.Tensor:
    """Our logits after every token of a sequence, computed in one step."""
    request = Request(0, list(tokens), len(tokens), SamplingParams(), None)  # type: ignore[arg-type]
    request.blocks = list(range(-(-len(tokens) // 16)))
    forward = runner.decoder.forward
    found = []

    def every_row(
        ids: torch.Tensor, step: StepInputs, kv: Any, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        found.append(forward(ids, replace(step, wanted=torch.arange(len(ids))), kv))
        return found[0]

    runner.decoder.forward = every_row  # type: ignore[method-assign]
    runner.steps.launch(StepPlan((Row(request, 0, len(tokens), True, 0),)))
    runner.decoder.forward = forward  # type: ignore[method-assign]
    return found[0]


# --- which type a tensor gets ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma-3-270m", "qwen-0.5b"])
def test_types_are_those_of_files_that_llama_cpp_quantized(name: str) -> None:
    file = read_header(cached_model(name))
    config, found = model_config(file), file.tensors
    # Qwen's are of the time when llama.cpp counted layers in the order 0, 1, 10, 11, ...
    counted = (
        sorted(range(config.num_layers), key=str) if config.arch == "qwen2" else range(config.num_layers)
    )
    for counter, layer in enumerate(counted):
        for leaf in (
            "attn_q",
            "attn_k",
            "attn_v",
            "attn_output",
            "ffn_gate",
            "ffn_up",
            "ffn_down",
            "attn_norm",
        ):
            info = found[f"blk.{layer}.{leaf}.weight"]
            wanted = tensor_kind(f"blk.{counter}.{leaf}.weight", info.shape, "Q4_K_M", config)
            assert wanted == info.kind, info.name
    embed = found["token_embd.weight"]
    assert tensor_kind(embed.name, embed.shape, "Q4_K_M", config) == embed.kind


def test_a_mix_has_as_many_tensors_of_each_type_as_llama_cpp_prints() -> None:
    """The counts of its loader's log, "- type q4_K: 193 tensors", for Llama 3 of 8B and 70B and Llama 2 of 7B."""
    assert kinds_of(LLAMA_8B, "Q4_K_M") == {"F32": 65, "Q4_K": 193, "Q6_K": 33}
    assert kinds_of(LLAMA_8B, "Q5_K_M") == {"F32": 65, "Q5_K": 193, "Q6_K": 33}
    assert kinds_of(LLAMA_8B, "Q6_K") == {"F32": 65, "Q6_K": 226}
    assert kinds_of(LLAMA_8B, "Q4_0") == {"F32": 65, "Q4_0": 225, "Q6_K": 1}
    assert kinds_of(LLAMA_8B, "Q8_0") == {"F32": 65, "Q8_0": 226}
    assert kinds_of(LLAMA_8B, "Q2_K") == {"F32": 65, "Q2_K": 129, "Q3_K": 64, "Q4_K": 32, "Q6_K": 1}
    assert kinds_of(LLAMA_70B, "Q4_K_M") == {"F32": 161, "Q4_K": 441, "Q5_K": 40, "Q6_K": 81}
    assert kinds_of(replace(LLAMA_70B, arch="qwen2", num_heads=8), "Q2_K")["Q5_K"] == 80
    llama_2 = replace(LLAMA_8B, num_kv_heads=32, vocab_size=32000, intermediate_size=11008)
    assert kinds_of(llama_2, "Q2_K") == {"F32": 65, "Q2_K": 129, "Q3_K": 96, "Q6_K": 1}


@pytest.mark.parametrize(
    ("mix", "layer", "head"),
    [
        ("Q2_K", "Q4_0", "Q8_0"),
        ("Q4_0", "Q4_0", "Q8_0"),
        ("Q4_K_M", "Q5_0", "Q8_0"),
        ("Q5_K_M", "Q5_1", "Q8_0"),
        ("Q6_K", "Q8_0", "Q8_0"),
    ],
)
def test_rows_that_no_block_of_256_divides_fall_back(mix: str, layer: str, head: str) -> None:
    assert tensor_kind("blk.4.ffn_up.weight", (64, 576), mix, LLAMA_8B).name == layer
    assert tensor_kind("output.weight", (64, 576), mix, LLAMA_8B).name == head
    assert tensor_kind("blk.4.ffn_up.weight", (64, 100), mix, LLAMA_8B) is Kind.F16
    assert tensor_kind("blk.4.attn_q.bias", (64,), mix, LLAMA_8B) is Kind.F32


# --- from a Hugging Face folder -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of every architecture."""
    # no folder is called phi3: of a model of that name llama.cpp expects some tokens
    made = {name: tmp_path_factory.mktemp("folder") for name in MODELS}
    for name, folder in made.items():
        save_tiny(folder, name)
    return made


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_becomes_the_same_model(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    source, path = open_checkpoint(folders[name]), tmp_path / "tiny.gguf"
    seen: list[tuple[int, int]] = []
    write_gguf(source, path, "Q8_0", lambda done, total: seen.append((done, total)))
    found = open_checkpoint(path)
    assert found.quantization == "Q8_0"
    assert replace(found.config, arch="") == replace(
        source.config,
        arch="",
        **({"window": None, "window_layers": (), "max_len": 200} if name == "mistral" else {}),
        norm_eps=pytest.approx(source.config.norm_eps, rel=1e-6),
    )
    for tensor in source.names:
        wanted = dense(source, tensor)
        wrong = (dense(found, tensor) - wanted).norm() / wanted.norm()
        assert wrong < (0.006 if wanted.dim() == 2 else 1e-7), tensor
    total = sum(info.nbytes for info in read_header(path).tensors.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same_with_a_file_of_ours(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """It rounds activations to 8 bits: of logprobs that spread by 1, that moves each by some hundredths."""
    path = tmp_path / "tiny.gguf"
    write_gguf(open_checkpoint(folders[name]), path, "Q8_0", quietly)
    tokens = torch.randint(0, 250, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    ours = logits_after_each(opened(path), tokens).log_softmax(-1)
    for reply in replies_of_llama_cpp(path, [tokens[:5], tokens]):
        length = reply["usage"]["prompt_tokens"]
        best = {token["id"]: token["logprob"] for token in logprobs_in(reply)[0]["top_logprobs"]}
        wrong = [abs(float(ours[length - 1, token]) - logprob) for token, logprob in best.items()]
        assert len(best) == 40
        assert np.mean(wrong) < 0.05


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "sentencepiece, prefixed"])
def test_llama_cpp_cuts_text_into_as_many_tokens(kind: str, tmp_path: Path) -> None:
    hf, bos = (byte_level(), None)
    if kind != "byte-level":
        hf, bos = sentencepiece(prefix=kind.endswith("prefixed")), "<s>"
    save_tiny(tmp_path, "llama", tokenizer=hf, bos=bos)
    write_gguf(open_checkpoint(tmp_path), tmp_path / "x.gguf", "Q8_0", quietly)
    texts = [text for text in TEXTS if text]
    found = [reply["usage"]["prompt_tokens"] for reply in replies_of_llama_cpp(tmp_path / "x.gguf", texts)]
    ours = Tokenizer.from_folder(tmp_path)
    assert ours is not None
    assert found == [len(ours.encode(text, bos=ours.add_bos)) for text in texts]


@pytest.mark.parametrize(
    ("name", "mix"),
    [("llama", "Q2_K"), ("llama", "Q4_K_M"), ("qwen2", "Q5_K_M"), ("qwen2", "Q4_0"), ("llama", "Q6_K")],
)
def test_logits_are_those_of_the_dequantized_weights(
    name: str, mix: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The file as transformers reads it, with a reader and a decoder of its own."""
    import transformers as tf

    path = tmp_path / "tiny.gguf"
    write_gguf(open_checkpoint(folders[name]), path, mix, quietly)
    tokens = torch.randint(0, 250, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).logits[0]
    assert (logits_after_each(opened(path), tokens) - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("mix", MIXES)
def test_a_written_matrix_has_the_bytes_of_ggmls_own_quantizer(
    mix: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    source, path = open_checkpoint(folders["qwen2"]), tmp_path / "tiny.gguf"
    write_gguf(source, path, mix, quietly)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert found["blk.3.ffn_up.weight"].tensor_type == int(MIXES[mix][1])
    for name in source.names:
        written, weights = found[names.to_gguf(name)], dense(source, name).numpy()
        if weights.ndim == 2:
            np.testing.assert_array_equal(
                written.data, ggml.quantize(Kind(written.tensor_type), weights), name
            )


def test_half_precision_folders_and_unquantized_vectors(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen2", torch.bfloat16)
    source, path = open_checkpoint(tmp_path), tmp_path / "tiny.gguf"
    write_gguf(source, path, "Q4_K_M", quietly)
    infos = read_header(path).tensors
    assert {info.kind for info in infos.values() if len(info.shape) == 1} == {Kind.F32}
    assert torch.equal(dense(open_checkpoint(path), "layers.3.k_bias"), dense(source, "layers.3.k_bias"))


def test_a_folder_that_is_quantized_is_written_from_what_its_weights_mean(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    quantize(open_checkpoint(folders["llama"]), tmp_path / "int4", "rtn", 4, 64, [], "cpu", quietly)
    source = open_checkpoint(tmp_path / "int4")
    assert "int4" in source.quantization
    write_gguf(source, tmp_path / "x.gguf", "Q8_0", quietly)
    found = open_checkpoint(tmp_path / "x.gguf")
    for name in ("layers.0.q", "layers.7.down", "embed"):
        wanted = dense(source, name)
        assert (dense(found, name) - wanted).norm() < 0.006 * wanted.norm(), name


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "sentencepiece, prefixed"])
def test_the_tokenizer_stays_what_it_was(kind: str, tmp_path: Path) -> None:
    hf, bos = byte_level(), None
    if kind != "byte-level":
        hf, bos = sentencepiece(prefix=kind.endswith("prefixed")), "<s>"
    save_tokenizer(tmp_path, hf, bos)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    rows = hf.get_vocab_size() + 9
    ours = Tokenizer.from_folder(tmp_path)
    assert ours is not None
    path = tmp_path / "tokens.gguf"
    write_tiny(
        path,
        tensors={"token_embd.weight": np.zeros((rows, 64), np.float32)},
        metadata={"tokenizer.ggml.bos_token_id": None} | vocabulary(tmp_path, ours, rows),
    )
    found = open_checkpoint(path).tokenizer
    assert found is not None
    assert found.vocab_size == rows
    for text in TEXTS:
        ids = ours.encode(text)
        assert found.encode(text) == ids
        assert found.encode(text, special=False) == ours.encode(text, special=False)
        assert found.decode(ids) == ours.decode(ids)
    for known in ("bos_id", "eos_id", "eos_ids", "add_bos", "prefix_space", "special_ids"):
        assert getattr(found, known) == getattr(ours, known), known
    assert found.pieces[: ours.vocab_size] == ours.pieces
    messages = [{"role": "user", "content": "hello <|im_end|>"}]
    assert found.encode_chat(messages) == ours.encode_chat(messages)


@pytest.mark.parametrize("name", ["smollm2-135m", pytest.param("gemma-3-270m", marks=pytest.mark.slow)])
def test_a_real_vocabulary_survives_tokenizer_json(name: str, tmp_path: Path) -> None:
    file = read_header(cached_model(name))
    first = Tokenizer.from_gguf(file)
    first.hf.save(str(tmp_path / "tokenizer.json"))
    folder = Tokenizer.from_folder(tmp_path)
    assert folder is not None
    stated = vocabulary(tmp_path, folder, first.vocab_size)
    found = Tokenizer.from_gguf(replace(file, metadata={**file.metadata, **stated}))
    texts = [*PROMPTS, *TEXTS, "Grüße, 漢字 and 🙂 in   one\n\n\nline 1234567"]
    assert [found.encode(text) for text in texts] == [first.encode(text) for text in texts]
    if name == "smollm2-135m":
        assert stated["tokenizer.ggml.pre"] == "smollm"
        assert stated["tokenizer.ggml.merges"] == file.metadata["tokenizer.ggml.merges"]


# --- from another GGUF file -----------------------------------------------------------------------------


def test_a_gguf_file_keeps_its_metadata_and_what_needs_no_change(tmp_path: Path) -> None:
    first, again, small = (tmp_path / name for name in ("first.gguf", "again.gguf", "small.gguf"))
    extra = {
        "general.name": "Tiny",
        "general.license": "mit",
        "llama.rope.freq_base": 5e5,
        "general.tags": ["a", "b"],
    }
    write_tiny(first, metadata=extra)
    write_gguf(open_checkpoint(first), again, "Q8_0", quietly)
    write_gguf(open_checkpoint(again), small, "Q8_0", quietly)
    assert again.read_bytes() == small.read_bytes()
    before, after = gguf.GGUFReader(first), gguf.GGUFReader(again)
    own = ("GGUF.", "general.file_type", "general.quantization_version")
    kept = {key for key in before.fields if not key.startswith(own)}
    assert kept == {key for key in after.fields if not key.startswith(own)}
    for key in kept:
        assert after.fields[key].contents() == before.fields[key].contents(), key
        assert after.fields[key].types == before.fields[key].types, key
    assert after.fields["general.file_type"].contents() == 7
    assert [tensor.name for tensor in after.tensors] == [tensor.name for tensor in before.tensors]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        wanted = (
            old.data if old.data.ndim == 1 else gguf.quants.quantize(old.data, gguf.GGMLQuantizationType.Q8_0)
        )
        np.testing.assert_array_equal(new.data, wanted)


def test_an_empty_array_is_left_out(tmp_path: Path) -> None:
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    write_tiny(first, metadata={"general.aliases": ["x" * 24]})
    data = first.read_bytes()
    count = data.index(b"general.aliases") + len("general.aliases") + 8
    # without the string and its length, 32 bytes, all that follows is still aligned
    first.write_bytes(data[:count] + bytes(8) + data[count + 8 + 32 :])
    assert read_header(first).metadata["general.aliases"] == []
    write_gguf(open_checkpoint(first), second, "Q8_0", quietly)
    assert "general.aliases" not in read_header(second).metadata


def test_a_quantized_file_is_quantized_from_what_its_weights_mean(tmp_path: Path) -> None:
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    write_tiny(first, kinds={"blk.0.ffn_up.weight": gguf.GGMLQuantizationType.Q8_0})
    write_gguf(open_checkpoint(first), second, "Q4_0", quietly)
    meant = dense(open_checkpoint(first), "layers.0.up").numpy()
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(second).tensors}["blk.0.ffn_up.weight"]
    np.testing.assert_array_equal(found.data, gguf.quants.quantize(meant, gguf.GGMLQuantizationType.Q4_0))


# --- refusals -------------------------------------------------------------------------------------------


def test_an_unknown_mix_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="no GGUF mix 'Q9_K': take one of Q2_K, Q4_0, Q4_K_M, Q5_K_M, Q6_K, Q8_0"
    ):
        write_gguf(open_checkpoint(folders["llama"]), tmp_path / "x.gguf", "Q9_K", quietly)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelFileError, match=r"has no tokenizer\.json, which a GGUF file must carry"):
        write_gguf(open_checkpoint(tmp_path), tmp_path / "x.gguf", "Q8_0", quietly)


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("gemma3", {"query_pre_attn_scalar": 64}, "attn_scale is 0.125"),
        ("gemma2", {"layer_types": ["full_attention"] * 8}, "window_layers is"),
    ],
)
def test_a_model_that_gguf_cannot_describe_is_refused(
    name: str, changes: dict[str, Any], what: str, tmp_path: Path
) -> None:
    save_tiny(tmp_path, name, **changes)
    with pytest.raises(ConfigError, match=f"GGUF file cannot state that {what}"):
        write_gguf(open_checkpoint(tmp_path), tmp_path / "x.gguf", "Q8_0", quietly)
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_vocabulary_split_by_an_unknown_rule_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace(r"\\s*[\\r\\n]+|", ""))
    with pytest.raises(
        ModelFileError, match=r"tokenizer\.json: it splits text by a rule that GGUF has no name for"
    ):
        write_gguf(open_checkpoint(tmp_path), tmp_path / "x.gguf", "Q8_0", quietly)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = math.nan
    save_file(weights, tmp_path / "model.safetensors")
    path = tmp_path / "x.gguf"
    path.write_bytes(b"what was there")
    with pytest.raises(
        ModelFileError, match=r"tensor blk\.1\.ffn_up\.weight cannot be written: a weight is not finite"
    ):
        write_gguf(open_checkpoint(tmp_path), path, "Q8_0", quietly)
    assert path.read_bytes() == b"what was there"
    assert [found.name for found in tmp_path.iterdir() if "gguf" in found.name] == ["x.gguf"]


def test_a_place_that_cannot_be_written_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"x\.gguf cannot be written: No such file"):
        write_gguf(open_checkpoint(folders["llama"]), tmp_path / "missing" / "x.gguf", "Q8_0", quietly)


def test_a_file_is_not_written_over_its_own_source(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny(path)
    with pytest.raises(ConfigError, match="is the model that is to be read"):
        write_gguf(open_checkpoint(path), path, "Q8_0", quietly)


# --- real models ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mix"),
    [("smollm2-135m", "Q4_K_M"), ("qwen-0.5b", "Q5_K_M"), ("qwen-0.5b", "Q2_K"), ("qwen-0.5b", "Q6_K")],
)
def test_llama_cpp_gives_the_text_of_a_real_model_the_same_probability(
    name: str, mix: str, tmp_path: Path
) -> None:
    """Its own greedy text after 20 prompts: the mean logprob of its tokens, within 1 % of ours."""
    path = tmp_path / "real.gguf"
    source = open_checkpoint(cached_model(name))
    write_gguf(source, path, mix, quietly)
    assert source.tokenizer is not None
    prompts = [source.tokenizer.encode(text, bos=source.tokenizer.add_bos) for text in PROMPTS]
    answers = [logprobs_in(reply) for reply in replies_of_llama_cpp(path, prompts, tokens=16)]
    theirs = [token["logprob"] for answer in answers for token in answer]
    runner = opened(path)
    ours: list[float] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [token["id"] for token in answer]
        logprobs = logits_after_each(runner, prompt + ids).log_softmax(-1)[len(prompt) - 1 : -1]
        ours += logprobs.gather(1, torch.tensor(ids).unsqueeze(1)).flatten().tolist()
    assert len(theirs) == len(ours) > 250
    assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=0.01)
