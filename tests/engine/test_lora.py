"""LoRA adapters: PEFT's numbers, the same bits in any company, no prefix shared, and what is refused."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import cached_model
from safetensors.torch import load_file, save_file
from tiny_folder import byte_level, save_tokenizer

from bench.logits import logits_of
from bench.random_model import TINY, random_adapter, random_checkpoint, write_safetensors
from ragate_engine import (
    Adapter,
    Completion,
    ConfigError,
    Engine,
    EngineConfig,
    ModelFileError,
    SamplingParams,
    merge_adapter,
    open_checkpoint,
    quantize_model,
    read_adapter,
    write_adapter,
    write_gguf,
)
from ragate_engine.budget import need_of
from ragate_engine.kernels import reference
from ragate_engine.layers import LowRank
from ragate_engine.lora import Pair, held_values, merging, product_shapes, slot_of_columns
from ragate_engine.quant.tensor import QuantTensor

CPU = torch.device("cpu")
Q = "base_model.model.model.layers.0.self_attn.q_proj"
NAMES = ("eights", "sixteens", "some")


def written(adapter: Adapter, folder: Path) -> Path:
    write_adapter(folder / adapter.name, adapter, "a/base", {})
    return folder / adapter.name


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters of the tiny model: ranks 8, 16 and 20, the last one of some leaves."""
    folder = tmp_path_factory.mktemp("adapters")
    adapters = [
        random_adapter(TINY, "eights", 8, 1),
        random_adapter(TINY, "sixteens", 16, 2),
        random_adapter(TINY, "some", 20, 3, ("q", "v", "down")),
    ]
    return [written(adapter, folder) for adapter in adapters]


# ---- against PEFT ----


def peft_model(base: Any, folder: Path, **settings: Any) -> Any:
    """`base` with a random adapter, which PEFT has written to `folder`."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed: it comes with the dev extra")
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(base, config).eval()
    torch.manual_seed(5)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # zero when fresh
            p.data = torch.randn_like(p) * 0.02
    model.save_pretrained(folder)
    return model


def our_logits(model: Path, tokens: list[int], **settings: Any) -> torch.Tensor:
    config = EngineConfig(device="cpu", **settings)
    (found,) = logits_of(open_checkpoint(model), [tokens], config)
    return found


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEFT_SETTINGS = {
    "llama": dict(r=8, lora_alpha=16, target_modules=ALL),
    "qwen2": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_rslora=True),
    "phi3": dict(r=8, lora_alpha=8, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
}


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("name", PEFT_SETTINGS)
def test_an_adapter_that_peft_wrote_gives_its_logits_merged_and_beside(
    name: str, kernels: str, tmp_path: Path
) -> None:
    import transformers as tf

    sizes = dict(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
    )
    config = {"llama": tf.LlamaConfig, "qwen2": tf.Qwen2Config, "phi3": tf.Phi3Config}[name](**sizes)
    torch.manual_seed(7)
    base = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    base.save_pretrained(tmp_path / "base")
    tokens = torch.randint(3, 128, (90,))
    with torch.no_grad():
        plain = base(tokens[None]).logits[0]
        expected = peft_model(base, tmp_path / "lora", **PEFT_SETTINGS[name])(tokens[None]).logits[0]
    assert (expected - plain).abs().max() > 0.01
    lora, ids = tmp_path / "lora", tokens.tolist()
    merged = our_logits(tmp_path / "base", ids, kernels=kernels, merge_adapter=lora)
    beside = our_logits(tmp_path / "base", ids, kernels=kernels, adapters=(lora,))
    assert (merged - expected).abs().max() < 1e-4
    assert (beside - expected).abs().max() < 1e-4


def test_peft_reads_an_adapter_that_we_wrote_to_the_same_logits(tmp_path: Path) -> None:
    import transformers as tf

    peft = pytest.importorskip("peft", reason="PEFT is not installed: it comes with the dev extra")
    torch.manual_seed(7)
    config = tf.LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                            num_attention_heads=4, max_position_embeddings=256)  # fmt: skip
    base = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    base.save_pretrained(tmp_path / "base")
    adapter = random_adapter(open_checkpoint(tmp_path / "base").config, rank=6, leaves=("q", "o", "up"))
    folder = written(adapter, tmp_path)
    tokens = torch.randint(3, 128, (40,))
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(base, folder).eval()(tokens[None]).logits[0]
    found = our_logits(tmp_path / "base", tokens.tolist(), merge_adapter=folder)
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen-0.5b"])
def test_an_adapter_of_a_real_model_gives_the_logits_of_peft_in_transformers(
    name: str, tmp_path: Path
) -> None:
    import transformers as tf

    path = cached_model(name)
    base = tf.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    settings = dict(r=16, lora_alpha=32, target_modules=ALL)
    tokens = open_checkpoint(path).tokenizer.encode("Water boils at 100 degrees Celsius because of pressure.")
    with torch.no_grad():
        plain = base.eval()(torch.tensor([tokens])).logits[0]
        expected = peft_model(base, tmp_path, **settings)(torch.tensor([tokens])).logits[0]
    assert (expected - plain).abs().max() > 1
    merged = our_logits(path, tokens, merge_adapter=tmp_path)
    beside = our_logits(path, tokens, adapters=(tmp_path,))
    assert (merged - expected).abs().max() < 1e-3
    assert (beside - expected).abs().max() < 1e-3


# ---- served beside the base ----


def serve(folders: list[Path], **settings: Any) -> Engine:
    config = EngineConfig(device="cpu", adapters=tuple(folders), **({"kv_bytes": 1 << 20} | settings))
    return Engine(random_checkpoint(TINY), config)


Asked = tuple[list[int], SamplingParams, str | None]


def asked() -> list[Asked]:
    """Two long prompts and a short one, each for the base and for each of three adapters."""
    params = SamplingParams(max_tokens=12, logprobs=2, ignore_eos=True)
    prompts = [[(7 * i * i + 3 * k) % 500 for i in range(n)] for k, n in enumerate((150, 70, 9))]
    return [(prompt, params, name) for prompt in prompts for name in (None, *NAMES)]


def answers(engine: Engine, requests: list[Asked]) -> list[Completion]:
    with engine._wake:  # the loop sees no request before it sees all
        futures = [engine.submit(*request) for request in requests]
    return [future.result(timeout=60) for future in futures]


def bits(completions: list[Completion]) -> list[object]:
    return [(c.text, c.tokens, c.finish) for c in completions]


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_batch_of_three_adapters_and_the_base_has_the_bits_of_each_alone(
    kernels: str, folders: list[Path]
) -> None:
    alone: list[Completion] = []
    for request in asked():  # in an engine that has its adapter only
        own = [folder for folder in folders if folder.name == request[2]]
        with serve(own, kernels=kernels, prefix_cache=False) as engine:
            alone += answers(engine, [request])
    assert len({tuple(token.id for token in c.tokens) for c in alone}) == len(alone)
    with serve(folders, kernels=kernels) as engine:
        cold = answers(engine, asked())
        warm = answers(engine, asked())
        engine.check()
    assert bits(cold) == bits(alone)
    assert bits(warm) == bits(alone)
    assert sum(c.cached_tokens for c in warm) >= 4 * (144 + 64)
    for settings in (dict(max_step_tokens=16), dict(kv_bytes=24 * 8192), dict(overlap=True, max_batch=5)):
        with serve(folders[::-1], kernels=kernels, **settings) as engine:  # other columns, other places
            assert bits(answers(engine, asked())) == bits(alone), settings
            engine.check()


def test_adapters_share_no_prefix_with_each_other_nor_with_the_base(folders: list[Path]) -> None:
    prompt = [5] * 100
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    with serve(folders) as engine:

        def cached(adapter: str | None) -> int:
            return engine.submit(prompt, params, adapter).result(timeout=60).cached_tokens

        assert [cached(name) for name in (None, *NAMES)] == [0, 0, 0, 0]
        assert [cached(name) for name in (None, *NAMES)] == [96, 96, 96, 96]


def test_a_block_that_an_answer_fills_is_its_adapters_too(folders: list[Path]) -> None:
    """A prompt of less than a block: the chain of hashes begins when the answer has filled it."""
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    with serve(folders) as engine:
        answer = engine.submit([5] * 9, params, "some").result(timeout=60)
        longer = [5] * 9 + [token.id for token in answer.tokens]
        cached = {
            name: engine.submit(longer, params, name).result(timeout=60).cached_tokens
            for name in (None, "eights", "some")
        }
    assert cached == {None: 0, "eights": 0, "some": 16}


def test_an_adapter_beside_the_base_answers_as_it_does_merged(folders: list[Path]) -> None:
    params = SamplingParams(max_tokens=1, logprobs=8, ignore_eos=True)
    prompt = list(range(40, 90))
    with serve(folders) as engine:
        beside = [engine.submit(prompt, params, name).result().tokens[0] for name in NAMES]
        base = engine.submit(prompt, params).result().tokens[0]
    for folder, token in zip(folders, beside, strict=True):
        with serve([], merge_adapter=folder) as engine:
            merged = engine.submit(prompt, params).result().tokens[0]
        assert token.id == merged.id
        assert token.logprob == pytest.approx(merged.logprob, abs=1e-4)
        assert abs(token.logprob - base.logprob) > 1e-3


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_the_base_beside_adapters_keeps_the_bits_it_has_without(kernels: str, folders: list[Path]) -> None:
    requests = [request for request in asked() if request[2] is None]
    found = []
    for some in ([], folders):
        with serve(some, kernels=kernels) as engine:
            found.append(bits(answers(engine, requests)))
    assert found[0] == found[1]


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_what_others_make_torchs_default_type_changes_no_bit(
    kernels: str, dtype: torch.dtype, folders: list[Path]
) -> None:
    # transformers sets it for the whole process while it loads a model, whoever loads or judges beside it
    def found() -> list[Any]:
        requests = [request for request in asked() if request[2] in (None, "some")]
        with serve([], merge_adapter=folders[0], kernels=kernels) as merged:
            alone = bits(answers(merged, [request for request in requests if request[2] is None]))
        with serve(folders, kernels=kernels) as beside:
            return [alone, bits(answers(beside, requests))]

    usual = found()
    torch.set_default_dtype(dtype)
    try:
        assert found() == usual
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_name_that_no_adapter_has_is_refused_with_those_there_are(folders: list[Path]) -> None:
    with serve(folders) as engine:
        with pytest.raises(
            ConfigError, match="no adapter is called 'judge': there are eights, sixteens, some"
        ):
            engine.submit([1, 2], adapter="judge")
        with pytest.raises(ConfigError, match="'judge'"):
            engine.describe("judge")
    with serve([]) as engine, pytest.raises(ConfigError, match="started without any"):
        engine.submit([1, 2], adapter="judge")


def test_adapters_are_in_the_fingerprint_of_those_who_use_them(folders: list[Path]) -> None:
    digests = [read_adapter(folder, TINY).digest for folder in folders]
    assert len(set(digests)) == 3
    with serve([]) as engine:
        plain = engine.describe()
    with serve(folders) as engine:
        assert engine.describe() == plain | {"adapter": "none"}
        assert engine.describe("some") == plain | {"adapter": digests[2]}
    with serve([], merge_adapter=folders[1]) as engine:
        assert engine.describe() == plain | {"merged_adapter": digests[1]}


def test_two_adapters_of_one_name_are_refused(folders: list[Path], tmp_path: Path) -> None:
    again = written(random_adapter(TINY, "some"), tmp_path)
    with pytest.raises(ConfigError, match=r"two adapters are called 'some': .* rename the folder"):
        serve([*folders, again])


def test_an_adapter_is_not_merged_into_packed_weights(folders: list[Path]) -> None:
    with pytest.raises(ConfigError, match="cannot be merged into packed weights: use weights dense"):
        EngineConfig(merge_adapter=folders[0], weights="packed")


def test_a_path_where_a_list_of_adapters_belongs_is_refused(folders: list[Path]) -> None:
    with pytest.raises(ConfigError, match="adapters must be a list of folders"):
        EngineConfig(adapters=folders[0])  # type: ignore[arg-type]


def test_a_quantized_base_is_unpacked_and_the_adapter_added_in_float32() -> None:
    model = random_checkpoint(TINY, quantized="q8_0")
    adapter = random_adapter(TINY, leaves=("q",))
    load = merging(model.load, adapter, torch.matmul)
    weight, pair = model.load("layers.1.q"), adapter.pairs["layers.1.q"]
    assert isinstance(weight, QuantTensor)
    expected = weight.dequantize(torch.float64) + 2 * pair.b.double() @ pair.a.double()
    found = load("layers.1.q")
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, atol=1e-6)
    untouched = load("layers.1.k")
    assert isinstance(untouched, QuantTensor) and torch.equal(untouched.codes, model.load("layers.1.k").codes)


def test_a_merged_model_is_written_as_any_other(tmp_path: Path) -> None:
    write_safetensors(TINY, tmp_path / "base")
    save_tokenizer(tmp_path / "base", byte_level())
    base = open_checkpoint(tmp_path / "base")
    adapter = random_adapter(TINY, leaves=("q", "k", "down"))
    folder = written(adapter, tmp_path)
    merged = merge_adapter(base, folder)
    assert merged.identity != base.identity == open_checkpoint(tmp_path / "base").identity
    load = merging(base.load, adapter, torch.matmul)

    # llama.cpp's order of the rows of q and k, there and back; from a file the others are taken byte by byte
    write_gguf(base, tmp_path / "base.gguf", "Q8_0", lambda done, total: None, "cpu")
    file = merge_adapter(open_checkpoint(tmp_path / "base.gguf"), folder)
    for name, source in (("from-folder.gguf", merged), ("from-file.gguf", file)):
        write_gguf(source, tmp_path / name, "Q8_0", lambda done, total: None, "cpu")
    quantize_model(merged, tmp_path / "rounded", "rtn", 8, 32, [], "cpu")
    for made in ("from-folder.gguf", "from-file.gguf", "rounded"):
        found = open_checkpoint(tmp_path / made)
        for name in ("layers.1.q", "layers.0.k", "layers.1.down", "layers.0.o"):
            weight, wanted = found.load(name), wide(load(name))
            assert isinstance(weight, QuantTensor)
            off = (weight.dequantize(torch.float32) - wanted).norm() / wanted.norm()
            assert off < 0.012, (made, name, off)
    moved = (wide(load("layers.1.q")) - wide(base.load("layers.1.q"))).norm() / wide(
        base.load("layers.1.q")
    ).norm()
    assert moved > 0.05  # what a writer that forgot the adapter would be off by


def wide(weight: torch.Tensor | QuantTensor) -> torch.Tensor:
    return weight.dequantize(torch.float32) if isinstance(weight, QuantTensor) else weight.float()


# ---- the products ----


def test_a_layer_that_no_adapter_changes_has_no_product_and_no_column_is_anothers() -> None:
    adapters = [random_adapter(TINY, "a", 4, 0, ("v",)), random_adapter(TINY, "b", 20, 1, ("q", "v"))]
    assert slot_of_columns(adapters) == [0] * 16 + [1] * 32
    shapes = product_shapes(adapters, TINY)
    assert shapes == [(("q", "k", "v"), 64 + 2 * 32, 2 * 48, 64)] * TINY.num_layers
    assert LowRank.of(adapters, TINY, ["layers.0.o"], reference, torch.float32, CPU) is None
    product = LowRank.of(
        adapters, TINY, [f"layers.0.{leaf}" for leaf in "qkv"], reference, torch.float32, CPU
    )
    x = torch.randn(3, 64)
    own = (torch.tensor([[0], [1], [-1]]) == torch.tensor(slot_of_columns(adapters))).float()
    q, k, v = product(x, None, own).split([64, 32, 32], dim=1)
    assert not q[0].any() and not q[2].any() and not k.any() and not v[2].any()
    for row, name, part in ((0, "a", v), (1, "b", v), (1, "b", q)):
        pair = adapters["ab".index(name)].pairs[f"layers.0.{'v' if part is v else 'q'}"]
        assert torch.allclose(part[row], 2 * pair.b @ (pair.a @ x[row]), atol=1e-5)


def test_the_card_s_products_add_what_the_reference_s_do() -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("tests/gpu checks the compiled kernels")
    from ragate_engine.kernels import triton

    adapters = [random_adapter(TINY, "a", 4, 0), random_adapter(TINY, "b", 20, 1, ("gate",))]
    names = ["layers.0.gate", "layers.0.up"]
    x = torch.randn(70, 64)
    own = (torch.arange(70)[:, None] % 3 - 1 == torch.tensor(slot_of_columns(adapters))).float()
    found, expected = (
        LowRank.of(adapters, TINY, names, ops, torch.float16, CPU)(x.half(), None, own)
        for ops in (triton, reference)
    )
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=2e-3)
    count = torch.tensor([33], dtype=torch.int32)
    product = LowRank.of(adapters, TINY, names, triton, torch.float16, CPU)
    assert torch.equal(product(x.half(), count, own)[:33], found[:33])


def test_the_budget_counts_what_the_products_hold() -> None:
    adapters = [random_adapter(TINY, "a", 8, 0), random_adapter(TINY, "b", 20, 1, ("down",))]
    values = 0
    for layer in range(TINY.num_layers):
        for leaves in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)):
            names = [f"layers.{layer}.{leaf}" for leaf in leaves]
            product = LowRank.of(adapters, TINY, names, reference, torch.bfloat16, CPU)
            values += product.a.weight.numel() + product.b.weight.numel()
    assert held_values(adapters, TINY) == values
    without, beside = (need_of(TINY, 1000, EngineConfig(), 2, 64, 1, adapter_values=n) for n in (0, values))
    assert beside.weights - without.weights == 2 * values
    assert beside.workspace > without.workspace


def test_numbers_that_the_engine_s_type_cannot_hold_are_refused() -> None:
    adapter = random_adapter(TINY, leaves=("o",))
    huge = replace(adapter, scale=1e9)
    with pytest.raises(ConfigError, match=r"layers\.0\.o are too large for float16"):
        LowRank.of([huge], TINY, ["layers.0.o"], reference, torch.float16, CPU)


def test_a_scale_that_float32_cannot_hold_is_not_merged() -> None:
    huge = replace(random_adapter(TINY, "judge", leaves=("o",)), scale=1e300)
    load = merging(lambda name: torch.zeros(64, 64), huge, torch.matmul)
    with pytest.raises(
        ConfigError, match=r"adapter judge's numbers for layers\.0\.o are too large for float32"
    ):
        load("layers.0.o")


# ---- the folder ----


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    adapter = replace(random_adapter(TINY, "judge", 5), scale=0.3)
    write_adapter(tmp_path / "judge", adapter, "org/base", {"seed": 3, "r": 99})
    found = read_adapter(tmp_path / "judge", TINY)
    assert (found.name, found.rank, found.digest) == ("judge", 5, adapter.digest)
    assert found.scale == pytest.approx(0.3, rel=1e-15)
    fields = json.loads((tmp_path / "judge" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["seed"]) == (5, 1.5, 3)
    assert fields["base_model_name_or_path"] == "org/base"
    assert fields["target_modules"] == ALL
    assert len(list((tmp_path / "judge").iterdir())) == 2


def test_a_full_disk_is_an_oserror_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(random_adapter(TINY, "judge"), tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_adapter(folder, random_adapter(TINY, "judge", seed=9), "base", {})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_adapter_that_diverged_is_not_written(tmp_path: Path) -> None:
    adapter = random_adapter(TINY)
    adapter.pairs["layers.1.up"].b[3, 2] = float("nan")
    with pytest.raises(ModelFileError, match=r"layers\.1\.mlp\.up_proj\.lora_B holds NaN"):
        write_adapter(tmp_path / "x", adapter, "base", {})


def config_with(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def tensors_with(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return apply


def as_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def cut_short(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.lora_A.weight"][0, 0] = float("inf")


A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), r"has no adapter_config\.json"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), r"has no adapter_model\.safetensors"),
    "a pickle": (as_pickle, r"adapter_model\.bin is a pickle"),
    "cut short": (cut_short, r"adapter_model\.safetensors cannot be read"),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "is not valid JSON"),
    "another kind": (config_with(peft_type="IA3"), "peft_type is 'IA3'"),
    "DoRA": (config_with(use_dora=True), "use_dora is 'True', which is not served"),
    "ranks of their own": (config_with(rank_pattern={"q_proj": 4}), "rank_pattern is"),
    "scales of their own": (config_with(alpha_pattern={"q_proj": 4}), "alpha_pattern is"),
    "a changed base": (config_with(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "whole modules": (config_with(modules_to_save=["lm_head"]), "modules_to_save is"),
    "no rank": (config_with(r=0), "r is 0, expected 1 to"),
    "a rank in words": (config_with(r="eight"), "r is 'eight', expected int"),
    "no alpha": (config_with(lora_alpha=None), "lora_alpha is missing"),
    "another rank": (config_with(r=4), r"has shape \[8, .* expected \[4, .*: adapter_config\.json says r = 4"),
    "half a pair": (tensors_with(lambda t: t.pop(B)), rf"{A} has no lora_B beside it"),
    "another base": (
        tensors_with(lambda t: t.update({B: torch.zeros(96, 8)})),
        rf"{B} has shape \[96, 8\], expected \[64, 8\]: it was trained on another base \(a/base\)",
    ),
    "more layers": (
        tensors_with(lambda t: t.update({A.replace("layers.0", "layers.9"): t[A].clone(),
                                         B.replace("layers.0", "layers.9"): t[B].clone()})),
        r"layers\.9\..* is of a layer that this model of 2 layers has not",
    ),
    "another target": (
        tensors_with(lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[A].clone()})),
        r"base_model\.model\.lm_head\.lora_A\.weight is not served: an adapter may change q_proj, .*down_proj",
    ),
    "a half twice": (
        tensors_with(lambda t: t.update({A.replace(".weight", ".default.weight"): 2 * t[A]})),
        r"q_proj\.lora_A\.(default\.)?weight and .*q_proj\.lora_A\.(default\.)?weight are of one weight",
    ),
    "nothing": (tensors_with(lambda t: t.clear()), "holds no tensor"),
    "infinity": (tensors_with(not_finite), rf"{A} holds NaN or infinity"),
    "whole numbers": (tensors_with(lambda t: t.update({A: t[A].to(torch.int8)})), rf"{A} is torch\.int8"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_wrong_with_a_folder_is_said_in_one_sentence(what: str, tmp_path: Path) -> None:
    folder = written(random_adapter(TINY, "judge"), tmp_path)
    change, message = REFUSED[what]
    change(folder)
    with pytest.raises(ModelFileError, match=message) as caught:
        read_adapter(folder, TINY)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pairs_are_in_float32_whatever_the_file_has(tmp_path: Path) -> None:
    folder = written(random_adapter(TINY, "judge", leaves=("q",)), tmp_path)
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    pair = read_adapter(folder, TINY).pairs["layers.0.q"]
    assert isinstance(pair, Pair)
    assert (pair.a.dtype, pair.b.dtype) == (torch.float32, torch.float32)
