"""What a training step computes: packs that share prefixes, packed bases, losses and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantize import tiny_folder

from bench.random_model import TINY, draw_codes, random_checkpoint
from ragate_engine import ConfigError, Example, TuneRecipe, open_checkpoint
from ragate_engine.layers import dense
from ragate_engine.quant.tensor import QuantTensor
from ragate_engine.quantize.rtn import rtn
from ragate_engine.training.decoder import TunedDecoder
from ragate_engine.training.frozen import Frozen, Halved
from ragate_engine.training.layout import lay_out
from ragate_engine.training.packs import Pack, passes, share
from ragate_engine.training.recipe import check_examples
from ragate_engine.weights import Checkpoint

CPU = torch.device("cpu")


def drawn(size: int, seed: int, vocab: int = 128) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, vocab, size).tolist())


def judged(count: int, seed: int = 0) -> list[Example]:
    """Examples of two kinds, each with a long beginning of its own; weights differ, and some are 0."""
    kinds = [drawn(40, 100), drawn(27, 101)]
    found = []
    for i in range(count):
        answer = drawn(4 + i % 3, seed + 500 + i)
        weights = tuple(float(w) for w in np.random.default_rng(i).choice([0.0, 0.5, 1.0, 3.0], len(answer)))
        prompt = kinds[i % 2] + drawn(3 + 5 * i, seed + 900 + i)
        found.append(Example(prompt, answer, (1.0, *weights[1:])))
    return found


def decoder_of(source: Checkpoint, recipe: TuneRecipe | None = None) -> TunedDecoder:
    return TunedDecoder(source, recipe or TuneRecipe(rank=4), 256, torch.float32, CPU)


def adapter_of(decoder: TunedDecoder) -> torch.Tensor:
    """An adapter that does something: a fresh one's B is zero, which hides what A does."""
    vector = decoder.vector.initial(0)
    vector += torch.randn(len(vector), generator=torch.Generator().manual_seed(1)) * 0.05
    return vector.requires_grad_()


def gradient_of(
    decoder: TunedDecoder, examples: Sequence[Example], packs: Sequence[Sequence[Pack]]
) -> tuple[float, torch.Tensor]:
    """Loss of all passes, and its gradient."""
    vector = adapter_of(decoder)
    total = 0.0
    for each in packs:
        loss = decoder.loss(vector, lay_out(examples, each, CPU))
        loss.backward()
        total += float(loss.detach())
    assert vector.grad is not None
    return total, vector.grad


# --- packs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3"])
def test_a_pack_has_the_loss_and_the_gradients_of_its_examples_alone(name: str, tmp_path: Path) -> None:
    folder = gemma2(tmp_path) if name == "gemma2" else tiny_folder(name, tmp_path)
    decoder = decoder_of(open_checkpoint(folder))
    examples = judged(9)
    packs = passes(examples, 10_000)
    assert sorted(pack.prefix for pack in packs[0]) == [27, 40]
    loss, gradient = gradient_of(decoder, examples, packs)
    expected_loss, expected = gradient_of(decoder, examples, [[Pack(0, (i,))] for i in range(9)])
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max()


def gemma2(folder: Path) -> Path:
    """A tiny Gemma 2: soft caps on scores and logits, windows on every second layer."""
    import transformers as tf

    torch.manual_seed(7)
    config = tf.Gemma2Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=24, sliding_window=24,
        max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_passes_of_few_tokens_add_up_to_one_of_many() -> None:
    decoder, examples = decoder_of(random_checkpoint(TINY)), judged(9)
    few = passes(examples, 120)
    assert len(few) > 3
    assert all(sum(pack.tokens(examples) for pack in each) <= 120 for each in few)
    loss, gradient = gradient_of(decoder, examples, few)
    expected_loss, expected = gradient_of(decoder, examples, passes(examples, 10_000))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max()


def test_layers_computed_again_give_the_same_bits_as_layers_kept() -> None:
    examples = judged(5)
    found = []
    for checkpointing in (False, True):
        recipe = TuneRecipe(rank=4, checkpointing=checkpointing)
        found.append(
            gradient_of(decoder_of(random_checkpoint(TINY), recipe), examples, passes(examples, 999))
        )
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_untargeted_linears_have_no_pair() -> None:
    decoder = decoder_of(random_checkpoint(TINY), TuneRecipe(rank=4, targets=("q", "v", "down")))
    _, gradient = gradient_of(decoder, judged(4), passes(judged(4), 999))
    (first, _) = decoder.vector.by_leaf(gradient)
    assert {leaf: (*a.shape, *b.shape) for leaf, (a, b) in first.items()} == {
        "q": (4, 64, 64, 4),
        "v": (4, 64, 32, 4),
        "down": (4, 128, 64, 4),
    }
    assert all(bool(a.any() and b.any()) for a, b in first.values())


few_tokens = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(tuple)


@settings(deadline=None)
@given(st.lists(few_tokens, min_size=1, max_size=8))
def test_packs_hold_every_example_once_with_what_all_of_its_members_share(
    prompts: list[tuple[int, ...]],
) -> None:
    examples = [Example(prompt, (1,), (1.0,)) for prompt in prompts]
    packs = share(examples)
    assert sorted(i for pack in packs for i in pack.members) == list(range(len(prompts)))
    for pack in packs:
        assert len({prompts[i][: pack.prefix] for i in pack.members}) == 1
        assert all(len(prompts[i]) > pack.prefix for i in pack.members)
    # no more than all alone, and no more than all in one
    least = min(len(prompt) for prompt in prompts) - 1
    common = max(n for n in range(least + 1) if len({prompt[:n] for prompt in prompts}) == 1)
    alone = sum(map(len, prompts))
    assert sum(pack.tokens(examples) for pack in packs) <= alone - common * (len(prompts) - 1)


def test_branches_are_packed_apart_where_that_saves_more() -> None:
    head, near, far = drawn(4, 1), drawn(30, 2), drawn(30, 3)
    prompts = [head + near + (9,), head + far + (9,), head + near + (8, 7), head + far + (8,)]
    packs = share([Example(prompt, (1,), (1.0,)) for prompt in prompts])
    assert {(pack.prefix, pack.members) for pack in packs} == {(34, (2, 0)), (34, (1, 3))}
    # two words more in common are not worth a second computation of the first hundred
    prompts = [drawn(100, 1) + drawn(2, i % 2) + drawn(5, i) for i in range(4)]
    (pack,) = share([Example(prompt, (1,), (1.0,)) for prompt in prompts])
    assert pack.prefix == 100


# --- frozen weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [(4, 32, "offset"), (4, 32, "nothing"), (2, 16, "zero"), (3, 16, "nothing")])
@pytest.mark.parametrize("ordered", [False, True])
def test_codes_two_in_a_byte_come_back_whole(kind: tuple[int, int, str], ordered: bool) -> None:
    weight = draw_codes("w", (8, 64), 0, "cpu", *kind)
    weight = replace(weight, order=torch.randperm(64)) if ordered else weight
    halved = Halved.of(weight)
    assert halved.codes.nbytes == weight.codes.nbytes // 2
    assert torch.equal(halved.whole().codes, weight.codes)
    assert torch.equal(halved.whole().dequantize(), weight.dequantize())


@pytest.mark.parametrize("kind", ["q4_k_m", "q8_0", None])
def test_a_packed_base_has_the_gradients_of_its_weights_unpacked(kind: str | None) -> None:
    source = random_checkpoint(TINY, quantized=kind)
    examples = judged(6)
    packs = passes(examples, 999)
    found = gradient_of(decoder_of(source, TuneRecipe(rank=4, base="packed")), examples, packs)
    loss, gradient = gradient_of(decoder_of(unpacked(source)), examples, packs)
    assert found[0] == pytest.approx(loss, rel=1e-6)
    assert (found[1] - gradient).abs().max() < 1e-6 * gradient.abs().max()


def unpacked(source: Checkpoint) -> Checkpoint:
    """The same model with plain weights; what is plain already in the layers is rounded to 4 bits."""

    def load(name: str) -> torch.Tensor:
        weight = source.load(name)
        if isinstance(weight, QuantTensor) or weight.dim() == 1 or not name.startswith("layers."):
            return dense(weight, torch.float32, CPU)
        return rtn(weight.float(), 4, 64, symmetric=False).dequantize()

    return replace(source, tensors={name: partial(load, name) for name in source.names})


def test_rows_that_groups_do_not_divide_cannot_be_packed() -> None:
    with pytest.raises(
        ConfigError, match=r"rows of 96 weights do not divide into groups of 64: take base dense"
    ):
        Frozen([torch.randn(8, 96)], [], torch.float32, CPU, packed=True)


# --- recipes and examples -------------------------------------------------------------------------------


def test_the_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    recipe = TuneRecipe(learning_rate=1.0, warmup=0.2)
    rates = [recipe.rate(step, 10) for step in range(10)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.0, 0.9619397662556434])  # (1 + cos(pi / 8)) / 2
    assert rates == [*rates[:3], *sorted(rates[3:], reverse=True)]
    assert recipe.rate(9, 10) == pytest.approx(0.0380602337443566)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": 2000}, "rank must be at most 1024, got 2000"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number above 0, got nan"),
        ({"warmup": 1.0}, "warmup must be a share of the steps, from 0 up to 1, got 1.0"),
        ({"base": "nf4"}, "base must be dense or packed, got 'nf4'"),
        ({"targets": ("q", "head")}, "there is no linear 'head' to adapt: choose from q, k, v, o, gate, up, down"),
        ({"targets": ()}, "targets must name each linear once and one at least"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more, got -1.0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_followed_is_refused_by_its_field(
    change: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        TuneRecipe(**change)  # type: ignore[arg-type]


GOOD = Example((5, 6), (7, 8), (1.0, 0.0))


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (Example((), (1,), (1.0,)), "example 1 has no prompt: leave it out"),
        (Example((1,), (), ()), "example 1 has no answer: leave it out"),
        (replace(GOOD, weights=(1.0,)), "example 1 has 1 weights for 2 answer tokens: give one each"),
        (replace(GOOD, weights=(0.0, 0.0)), "example 1 has no trained token, all its weights are 0: leave it out"),
        (replace(GOOD, weights=(1.0, -1.0)), "example 1 has a loss weight that is negative or no number"),
        (replace(GOOD, prompt=(5,) * 2048), "example 1 has 2049 tokens, more than the model's window of 2048"),
        (replace(GOOD, prompt=(5, 512)), "example 1 has token 512, which is none of the model's 512"),
    ],
)  # fmt: skip
def test_an_example_that_cannot_be_trained_on_is_named(example: Example, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_examples([GOOD, example], TINY)
