"""The memory budget of a card: what it grants is there, more memory never grants less, a refusal says the way out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragate_engine import ModelConfig, OutOfMemoryError
from ragate_engine.budget import Need, kv_blocks, margin, need_of, requests_that_fit
from ragate_engine.config import BLOCK_SIZE, EngineConfig
from ragate_engine.devices import Card

GIB = 1 << 30
LLAMA_8B = ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128, 8192)
PARAMETERS = 8_030_261_248
BLOCK_8B = 2 * 32 * 8 * 128 * 16 * 2


def card(free: float, total: float | None = None, name: str = "NVIDIA X") -> Card:
    total = free if total is None else total
    return Card(name, (9, 0), int(total * GIB), int(free * GIB))


def llama(**settings) -> Need:
    return need_of(LLAMA_8B, PARAMETERS, EngineConfig(**settings), 2, BLOCK_8B, parts=16384)


def needs() -> st.SearchStrategy[Need]:
    size = st.integers(0, 40 * GIB)
    return st.builds(
        Need,
        weights=size,
        parameters=st.integers(0, 20_000_000_000),
        workspace=st.integers(0, 8 * GIB),
        graphs=st.integers(0, GIB),
        block=st.integers(1, 1 << 24),
        window=st.integers(16, 1 << 24),
        rope=st.integers(0, 2048),
        max_batch=st.integers(1, 4096),
        kv=st.none() | size,
        table=st.integers(0, GIB),
        packed=st.none() | size,
    )


@st.composite
def cards(draw: st.DrawFn) -> Card:
    total = draw(st.integers(GIB, 200 * GIB))
    return Card("NVIDIA X", (9, 0), total, draw(st.integers(0, total)))


def granted(card: Card, need: Need) -> int:
    """Blocks, or -1 where the budget refuses."""
    try:
        return kv_blocks(card, need)
    except OutOfMemoryError as error:
        text = str(error)
        assert "\n" not in text
        assert "use device cpu" in text or "kv_gib" in text
        return -1


@given(cards(), needs())
def test_what_is_granted_fits_with_all_the_rest(card: Card, need: Need) -> None:
    blocks = granted(card, need)
    if blocks >= 0:
        tables = need.rope * min(need.window, blocks * BLOCK_SIZE)
        rest = need.weights + need.workspace + need.graphs + margin(card.total)
        assert blocks * need.block + tables + rest <= card.free
        assert blocks >= 2
        assert need.kv is None or blocks * need.block <= need.kv


@given(cards(), needs(), st.integers(0, 50 * GIB))
def test_more_free_memory_never_grants_less(card: Card, need: Need, more: int) -> None:
    larger = replace(card, free=min(card.total, card.free + more))
    assert granted(larger, need) >= granted(card, need)


@given(cards(), needs())
def test_no_block_is_granted_that_all_requests_together_could_not_use(card: Card, need: Need) -> None:
    assert granted(card, need) <= max(2, need.max_batch * -(-need.window // BLOCK_SIZE))


@given(cards(), needs(), st.integers(0, 10 * GIB))
def test_a_larger_model_is_never_granted_more(card: Card, need: Need, more: int) -> None:
    assert granted(card, replace(need, weights=need.weights + more)) <= granted(card, need)


@given(cards(), needs())
def test_what_fits_before_loading_fits_after_it(card: Card, need: Need) -> None:
    before = granted(card, need)
    if before >= 0:
        placed = need.weights + need.rope * min(need.window, before * BLOCK_SIZE)
        after = granted(replace(card, free=card.free - placed), need.loaded())
        assert after >= before


def test_an_8b_model_on_a_large_card_gets_all_that_its_requests_can_use() -> None:
    blocks = kv_blocks(card(139), llama(max_batch=64))
    assert blocks == 64 * 8192 // 16
    # 2 MiB a block: four fifths of 139 GiB less 2.8 of margin, 15 of weights and 4 of workspace
    assert 44_000 < kv_blocks(card(139), llama()) < 49_000


def test_memory_that_a_setting_asks_for_is_all_that_is_taken() -> None:
    assert kv_blocks(card(139), llama(kv_bytes=GIB)) == GIB // BLOCK_8B


def test_a_file_that_claims_an_endless_window_gets_tables_for_its_pool_only() -> None:
    endless = need_of(replace(LLAMA_8B, max_len=1 << 24), PARAMETERS, EngineConfig(), 2, BLOCK_8B, 16384)
    blocks = kv_blocks(card(30), endless)
    assert blocks * BLOCK_8B + 16 * blocks * 512 < 12 * GIB
    assert blocks > 4000


def sentence(card: Card, need: Need) -> str:
    with pytest.raises(OutOfMemoryError) as caught:
        kv_blocks(card, need)
    return str(caught.value)


def test_weights_that_do_not_fit_are_refused_with_what_would() -> None:
    small = card(11.2, 12, "NVIDIA RTX 3060")
    text = sentence(small, replace(llama(), packed=llama().weights))
    assert text.startswith("the weights need 15.0 GiB and 11.2 GiB are free on NVIDIA RTX 3060 (")
    # with the embedding, which stays dense
    ways = "a 4-bit file of this model, kept packed, needs about 5.6 GiB"
    assert text.endswith(f"are missing): {ways}; or use device cpu")
    packed = replace(llama(), weights=int(8.4 * GIB), packed=int(8.4 * GIB))
    assert sentence(small, packed).startswith(
        "the weights need 8.4 GiB, the work on them 3.6 GiB, and 11.2 GiB are"
    )
    assert ways in sentence(small, packed)
    text = sentence(small, replace(llama(), packed=int(5.7 * GIB)))
    assert text.endswith(
        "are missing): keep them packed with weights = packed, which takes 5.7 GiB; or use device cpu"
    )
    text = sentence(card(11.2, 12), llama())
    assert text.endswith("a model of up to 3.9 billion weights fits; or use device cpu")
    assert kv_blocks(card(11.2, 12), replace(llama(), weights=int(3.9e9 * 2), parameters=int(3.9e9))) >= 2


def test_a_card_that_others_fill_is_to_be_freed() -> None:
    text = sentence(card(11.2, 80), llama())
    assert "end what else uses the card, which holds 68.2 GiB; or use device cpu" in text


def test_work_that_does_not_fit_beside_the_weights_is_to_be_made_smaller() -> None:
    text = sentence(card(17, 18), llama())
    assert "the weights need 15.0 GiB, the work on them 3.6" in text
    assert "ask for less with max_batch; or use device cpu" in text
    assert kv_blocks(card(18, 18.5), llama(max_batch=16, max_step_tokens=512)) >= 2
    text = sentence(card(2, 18), llama().loaded())
    assert text.startswith("beside the weights 3.6 GiB are needed and 2.0 GiB are free")


def test_a_kv_setting_that_does_not_fit_names_one_that_does() -> None:
    text = sentence(card(40), llama(kv_bytes=30 * GIB))
    assert text.startswith("kv_gib asks for 30.0 GiB and NVIDIA X has ")
    fits = float(text.split("set kv_gib to ")[1].split(" or less")[0])
    assert 15 < fits < 24
    assert kv_blocks(card(40), llama(kv_bytes=int(fits * GIB))) > 7000
    assert "0 tokens of 131072 bytes each: give it more with kv_gib" in sentence(card(40), llama(kv_bytes=5))


def test_requests_are_counted_in_whole_blocks() -> None:
    assert requests_that_fit(100, 16) == 100
    assert requests_that_fit(100, 17) == 50
    assert requests_that_fit(3, 64) == 0
