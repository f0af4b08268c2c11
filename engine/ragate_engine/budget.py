"""What fits on a card, worked out from numbers alone: no byte is promised twice, and what cannot fit is said first.

    free = margin + weights + workspace + graphs + rope tables + KV blocks

The same sum is made twice: before the weights are loaded, from the header's shapes, so that a model that cannot fit
is refused in a second; and after, from the memory that is then free, which gives the number of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ragate_engine.config import BLOCK_SIZE, MAX_LEN, EngineConfig, ModelConfig
from ragate_engine.devices import Card
from ragate_engine.errors import OutOfMemoryError

CARD_BATCH = 1024
"""Requests that run at once on a card, where no setting says."""
CARD_STEP_TOKENS = 8192
"""Rows of a forward pass on a card, where no setting says."""
TABLE_TOKENS = 1 << 18
"""Tokens a request that block tables are counted for; a longer window is cut to the pool, or is in the margin."""
GRAPHS = 256 << 20
"""What captured graphs hold besides activations: nodes and arguments of some thirty graphs."""
CONTEXT = 600 << 20
"""What this process holds of a card before it has asked for anything: code and stacks."""
KV_SHARE = 0.8
"""Of the room for KV blocks; the rest is for another engine in this process, such as the writer of answers."""
MIN_BLOCKS = 2
"""Fewer hold no request."""
PACKED_BITS = (("8-bit", 8.5), ("4-bit", 4.9))
"""Bits a weight takes in common files, scales included: Q8_0, Q4_K_M."""


@dataclass(frozen=True)
class Need:
    """What an engine wants of a card, in bytes."""

    weights: int
    """Still to be loaded: 0 once they are on the card."""
    parameters: int
    """How many weights the model has."""
    workspace: int
    graphs: int
    block: int
    """One KV block over all layers."""
    window: int
    """Longest sequence that is asked for, in tokens: rope tables are made for it, or for the pool if that is less."""
    rope: int
    """The rope tables' bytes for a token of the window: 0 once they are there."""
    max_batch: int
    """Requests at once: more blocks than they can use would lie idle."""
    kv: int | None = None
    """What the setting asks for KV blocks; `None` is all that is left."""
    table: int = 0
    """The embedding's bytes, which is dense in any case."""
    packed: int | None = None
    """What the weights take packed: where they are, a smaller file takes less; where they are not, they could be."""

    def loaded(self) -> Need:
        """What is still to come once weights and rope tables are on the card."""
        return replace(self, weights=0, rope=0)


def need_of(
    model: ModelConfig,
    parameters: int,
    config: EngineConfig,
    item_bytes: int,
    block: int,
    parts: int,
    held: int | None = None,
    packed: int | None = None,
    adapter_values: int = 0,
) -> Need:
    """What serving `model` with `config` takes of a card.

    `item_bytes` is of a weight, each of which is held once and dense, unless all together are `held` in so many bytes
    (`footprint.weight_bytes`); `packed`, `block` as in `Need`; `parts` is how many partial results of attention there
    is room for; adapters beside the weights are `adapter_values` numbers (`lora.held_values`).
    """
    rows = config.max_step_tokens or CARD_STEP_TOKENS
    batch = config.max_batch or CARD_BATCH
    beside = adapter_values * item_bytes
    q, kv = model.num_heads * model.head_dim, 2 * model.num_kv_heads * model.head_dim
    # everything alive at once: hidden state, update, norm, projection; q, k, v and what is attended; gate, up, product
    activations = rows * item_bytes * (4 * model.hidden_size + 2 * q + kv + 3 * model.intermediate_size)
    if adapter_values:  # gate and up before their activation, and what is added to them, in float32
        activations += rows * 4 * 4 * model.intermediate_size
    partials = 4 * parts * model.num_heads * (model.head_dim + 2)
    logits = 2 * 4 * batch * model.vocab_size  # and as much again to choose from them
    window = min(config.max_len or MAX_LEN, model.max_len)
    tables = 4 * batch * -(-min(window, TABLE_TOKENS) // BLOCK_SIZE)
    return Need(
        weights=(parameters * item_bytes if held is None else held) + beside,
        parameters=parameters,
        workspace=activations + partials + logits + tables,
        graphs=activations + GRAPHS if config.cuda_graphs else 0,
        block=block,
        window=window,
        rope=4 * model.head_dim * (1 if model.local_rope is None else 2),
        max_batch=batch,
        kv=config.kv_bytes,
        table=2 * model.vocab_size * model.hidden_size,
        packed=None if packed is None else packed + beside,
    )


def margin(total: int) -> int:
    """Bytes left alone: what the allocator rounds up, and what others on the card take while we run."""
    return max(256 << 20, total // 50)


def kv_blocks(card: Card, need: Need) -> int:
    """How many KV blocks fit beside everything else: at least `MIN_BLOCKS`, and no more than max_batch requests use.

    Raises OutOfMemoryError, one sentence: how much is missing, and what would fit.
    """
    least = MIN_BLOCKS * (need.block + BLOCK_SIZE * need.rope)
    left = card.free - margin(card.total) - need.weights - need.workspace - need.graphs
    if left < least:
        raise OutOfMemoryError(_too_large(card, need, least - left))
    # a window longer than the pool is cut to it, and the rope tables with it
    blocks = left // (need.block + BLOCK_SIZE * need.rope)
    if blocks * BLOCK_SIZE > need.window:
        blocks = (left - need.rope * need.window) // need.block
    if need.kv is not None:
        asked = need.kv // need.block
        if asked < MIN_BLOCKS:
            raise OutOfMemoryError(
                f"the KV cache has room for {asked * BLOCK_SIZE} tokens of {need.block // BLOCK_SIZE} bytes each: "
                "give it more with kv_gib"
            )
        if asked > blocks:
            fits = int(blocks * need.block / 2**30 * 100) / 100
            raise OutOfMemoryError(
                f"kv_gib asks for {_gib(need.kv)} and {card.name} has {_gib(blocks * need.block)} left for the KV "
                f"cache: set kv_gib to {fits:g} or less, or leave it out"
            )
        blocks = asked
    else:
        blocks = int(blocks * KV_SHARE)
    return max(MIN_BLOCKS, min(blocks, need.max_batch * -(-need.window // BLOCK_SIZE)))


def requests_that_fit(blocks: int, tokens: int) -> int:
    """How many requests of `tokens` tokens each, sharing nothing, `blocks` blocks hold at once."""
    return blocks // -(-tokens // BLOCK_SIZE)


def _too_large(card: Card, need: Need, missing: int) -> str:
    """The sentence for a model that finds no room."""
    here = f"{_gib(card.free)} are free on {card.name}"
    if need.weights >= card.free:
        what = f"the weights need {_gib(need.weights)} and {here}"
    elif need.weights:
        what = f"the weights need {_gib(need.weights)}, the work on them {_gib(_rest(need))}, and {here}"
    else:
        what = f"beside the weights {_gib(_rest(need))} are needed and {here}"
    ways = []
    others = card.total - card.free - CONTEXT
    if need.weights and missing <= others:
        ways.append(f"end what else uses the card, which holds {_gib(others)}")
    elif smaller := _smaller_model(card, need):
        ways.append(smaller)
    if missing < need.workspace:
        ways.append("ask for less with max_batch")
    return f"{what} ({_gib(missing)} are missing): {'; or '.join([*ways, 'use device cpu'])}"


def _smaller_model(card: Card, need: Need) -> str:
    """What would fit in place of these weights, if anything would: themselves packed, or another file."""
    room = card.free - margin(card.total) - _rest(need)
    if need.packed is not None:
        if need.packed <= room and need.packed < need.weights:
            return f"keep them packed with weights = packed, which takes {_gib(need.packed)}"
        for name, bits in PACKED_BITS:
            size = int(need.parameters * bits / 8) + need.table
            if size <= room and size < need.packed:
                return f"a {name} file of this model, kept packed, needs about {_gib(size)}"
    if need.weights and need.parameters and room > 0:
        fits = room / (need.weights / need.parameters)
        return f"a model of up to {fits / 1e9:.1f} billion weights fits"
    return ""


def _rest(need: Need) -> int:
    return need.workspace + need.graphs + MIN_BLOCKS * (need.block + BLOCK_SIZE * need.rope)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
