"""Synthetic runs for tests of the gate and the reports: deterministic, shaped like those of `ragate eval`."""

from __future__ import annotations

import hashlib
import json
import random
from typing import TYPE_CHECKING, Any

from ragate.run import Call, Claim, ItemRecord, Run, Score, Tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

METRICS = ("context_precision", "context_recall", "faithfulness", "answer_relevance")

TOPICS = [
    (
        "What does a prefix cache save when many prompts share their beginning?",
        "It saves computing the keys and values of the shared tokens again.",
        "paged attention",
    ),
    (
        "Why is the KV cache split into blocks of 16 tokens?",
        "So that memory is handed out in small equal pieces and little is wasted.",
        "block pools",
    ),
    (
        "When does speculative decoding make serving slower?",
        "When few drafted tokens are accepted, the verification work is wasted.",
        "speculative decoding",
    ),
    (
        "How many bits a weight does Q4_K_M use on average?",
        "About 4.85 bits per weight, because some tensors are kept at Q6_K.",
        "quantization formats",
    ),
    (
        "What is chunked prefill for?",
        "It lets long prompts be computed in pieces, so that running requests keep producing tokens.",
        "scheduling",
    ),
    (
        "Which of the four metrics needs a reference answer?",
        "Context recall and context precision are judged against the reference answer.",
        "evaluation metrics",
    ),
    (
        "How does continuous batching differ from static batching?",
        "Requests join and leave the batch at every step instead of waiting for the slowest.",
        "continuous batching",
    ),
    (
        "What does act-order change in a GPTQ model?",
        "Columns are quantized in the order of their activation size, which is stored as a permutation.",
        "GPTQ",
    ),
    (
        "Why can the same prompt give different tokens in different batch sizes?",
        "Kernels that split sums differently for other batch shapes round differently.",
        "determinism",
    ),
    (
        "How is faithfulness computed?",
        "The answer is split into statements, and the share supported by the contexts is the score.",
        "evaluation metrics",
    ),
    (
        "What is the memory of one token in the KV cache of Qwen2.5 1.5B at 16 bits?",
        "28 KiB: 28 layers times 2 key-value heads times 128 dimensions times two tensors of 2 bytes.",
        "memory arithmetic",
    ),
    (
        "Does grammar-constrained decoding change the model's own probabilities?",
        "It masks tokens that the grammar forbids and renormalises over the rest.",
        "constrained decoding",
    ),
]
PASSAGES = [
    "A request's keys and values are kept in fixed blocks. When a new prompt begins with tokens whose "
    "blocks are already there, the scheduler takes a reference to those blocks and starts computing after "
    "them. A block is identified by the hash of its tokens and of everything before it, so equal text in "
    "another place never matches by accident. Blocks that no request holds any more stay until their "
    "memory is wanted, and the one that was used longest ago goes first.",
    "Quantized weights are stored in groups with a scale and an offset each. The smaller the group, the "
    "closer the stored weights come to the originals, and the more bits the scales themselves take. "
    "Formats of the K family quantize the scales as well, in super-blocks of 256 weights, which is why "
    "their average is not a round number of bits. Tensors that hurt most when rounded are given two more "
    "bits.",
    "The scheduler has a budget of tokens for each step. Running requests take one token each, and what "
    "is left goes to prompts that still have to be computed. A prompt longer than the rest of the budget "
    "is computed over several steps. This bounds the time of a step, and with it the delay between two "
    "tokens of the requests that are already producing text.",
    "A judge model is asked for each statement whether the retrieved passages support it. It first writes "
    "a reason and then a verdict of 0 or 1. The probability that it gives to the verdict is kept as well: "
    "a verdict of 1 at a probability of 0.55 deserves less trust than the same verdict at 0.99. Judges "
    "differ widely in how well they agree with people, so a report names its judge.",
    "Throughput rises with the number of requests in a batch until the card is limited by arithmetic "
    "instead of memory traffic. Beyond this point more requests only make each of them slower. Where the "
    "point lies depends on the model, on the precision of its weights and on the length of the contexts, "
    "since attention reads the whole cache of a request for every token that it produces.",
]
STATEMENTS = [
    "The shared tokens are computed once and read by every request.",
    "Blocks are found again by a hash over their tokens and their predecessors.",
    "The saving grows with the length of the shared beginning.",
    "Scales are stored for each group of weights.",
    "A step has a fixed budget of tokens.",
    "The least recently used block is taken first.",
    "It was introduced in the first release.",
    "Attention reads the whole cache of a request for each token.",
]
HEADS = {
    "faithfulness.statements": "Given a question and an answer, break the answer into statements. ",
    "faithfulness.nli": "Judge for each statement whether it follows from the context. Reason, then 0 or 1. ",
    "context_precision": "Given a question, an answer and a context, say whether the context was useful. ",
    "context_recall": "For each sentence of the answer, say whether it can be attributed to the context. ",
    "answer_relevance": "Write a question for the given answer and say whether the answer is noncommittal. ",
}
FINGERPRINT = {
    "judge": "sha256:9f2c51d04ab37e6688c0b7a1d9e3f4507b2a6c1d8e9f00112233445566778899",
    "judge_format": "gguf Q4_K_M",
    "tokenizer": "sha256:41b0a7c2d5e8f9303c6d",
    "prompts": "sha256:0c77d1e25b9a48f6a1f3",
    "decoding": "greedy, max 1024 tokens, seed 0",
    "ragas": "0.4.3",
    "embeddings": "all-MiniLM-L6-v2 sha256:53aa51172d142c89d901",
    "engine": "0.1.0 cpu float32",
}


def plain_run(values: dict[str, Sequence[float | str]], **changes: Any) -> Run:
    """Items q000, q001, … with the given scores, a number or a state each, and nothing else."""
    n = max(len(column) for column in values.values())
    items = tuple(ItemRecord(id=f"q{i:03}", question=f"Question {i}?", line=i + 1) for i in range(n))
    scores = tuple(
        Score(item=f"q{i:03}", metric=metric, state=cell)  # type: ignore[arg-type]
        if isinstance(cell, str)
        else Score(item=f"q{i:03}", metric=metric, state="ok", value=cell)
        for metric, column in values.items()
        for i, cell in enumerate(column)
    )
    fields: dict[str, Any] = {
        "suite": "llm-serving",
        "testset": "testsets/llm-serving",
        "testset_hash": hashlib.sha256(f"{n} items".encode()).hexdigest(),
        "metrics": tuple(values),
        "judge": "qwen2.5-coder-1.5b",
        "target": "ragate.demo:answer",
        "fingerprint": FINGERPRINT,
        "items": items,
        "scores": scores,
    }
    return Run(**(fields | changes))


def good_run(n: int = 100, **changes: Any) -> Run:
    """A healthy system: most claims supported, most contexts useful."""
    return _full_run(n, harm=0.0, changes=changes)


def worse_run(n: int = 100, **changes: Any) -> Run:
    """The same system after a bad change: some items lose support and recall, a few get better."""
    return _full_run(n, harm=0.2, changes=changes)


def errored_run(n: int = 100, **changes: Any) -> Run:
    """The good run, but some scores ended as timeout, nan, truncated or error, and one target call failed."""
    run = good_run(n, **changes)
    ends = {
        (3, "faithfulness"): ("timeout", "no answer from the judge in 120 s"),
        (5, "context_recall"): ("nan", "the judge returned no classification"),
        (7, "faithfulness"): ("truncated", "the verdict list reached 1024 tokens"),
        **{(9, metric): ("error", "the target raised ConnectionError: refused") for metric in METRICS},
    }
    scores = []
    for score in run.scores:
        end = ends.get((int(score.item.split("-")[-1]), score.metric))
        if end:
            score = Score(item=score.item, metric=score.metric, state=end[0], error=end[1])  # type: ignore[arg-type]
        scores.append(score)
    items = [
        item.model_copy(update={"answer": None, "contexts": (), "error": "ConnectionError: refused"})
        if item.id.endswith("-009")
        else item
        for item in run.items
    ]
    return run.model_copy(update={"scores": tuple(scores), "items": tuple(items)})


def broken_run(n: int = 100) -> Run:
    """The good run, but the critical item serving-004 lost all faithfulness: the mean hardly moves."""
    run = good_run(n)
    scores = tuple(
        s.model_copy(update={"value": 0.0}) if (s.item, s.metric) == ("serving-004", "faithfulness") else s
        for s in run.scores
    )
    return run.model_copy(update={"scores": scores})


def partial_run(n: int = 100) -> Run:
    """The good run, stopped when half of its items were scored."""
    run = good_run(n)
    done = {item.id for item in run.items[: n // 2]}
    return run.model_copy(update={"partial": True, "scores": tuple(s for s in run.scores if s.item in done)})


HOSTILE = (
    "</script><script>alert(1)</script> <img src=x onerror=alert(2)> & \" ' ` | @octocat #12 "
    "[link](javascript:alert(3)) ![i](https://evil.example/p.png) --> ]]> {{ 7*7 }} {% raw %} **bold** $x$\n"
    "\x1b[31mred\x1b]0;t\x07\x00\u202e\u2028\u2029\ud800 [red]markup[/red]"
)


def hostile_run(n: int = 12) -> Run:
    """A run in which every text that comes from outside tries to break out of the report."""
    run = good_run(n)
    items = tuple(
        item.model_copy(
            update={
                "id": f"{HOSTILE}{i}",
                "question": HOSTILE,
                "reference": HOSTILE,
                "answer": HOSTILE,
                "contexts": (HOSTILE, HOSTILE + "2"),
                "kind": HOSTILE,
                "cluster": HOSTILE,
            }
        )
        for i, item in enumerate(run.items)
    )
    ids = {old.id: new.id for old, new in zip(run.items, items, strict=True)}
    scores = tuple(
        score.model_copy(
            update={
                "item": ids[score.item],
                "error": HOSTILE,
                "claims": tuple(
                    claim.model_copy(update={"text": HOSTILE, "reason": HOSTILE}) for claim in score.claims
                ),
            }
        )
        for score in run.scores
    )
    calls = {
        key: call.model_copy(update={"input": HOSTILE, "output": HOSTILE, "finish": HOSTILE})
        for key, call in run.calls.items()
    }
    return run.model_copy(
        update={
            "suite": HOSTILE,
            "testset": HOSTILE,
            "judge": HOSTILE,
            "judge_note": HOSTILE,
            "target": HOSTILE,
            "items": items,
            "scores": scores,
            "calls": calls,
            "prompt_heads": dict.fromkeys(run.prompt_heads, HOSTILE),
            "fingerprint": {"judge": HOSTILE},
        }
    )


def timings() -> dict[str, Any]:
    """What `timings.json` beside a run holds, as `evaluate.Timings` makes it."""
    return {
        "seconds": {"prepare": 2.4, "answers": 31.0, "embed": 2.1, "total": 156.9},
        "calls_judged": 800,
        "calls_resumed": 100,
        "answers_resumed": 0,
        "call_ms": dict.fromkeys(good_run(12).calls, 1234.5),
        "prompt_tokens_sent": 1_124_310,
        "prompt_tokens_computed": 322_804,
        "engine": {
            "requests": 900,
            "prompt_tokens": 1_124_310,
            "prompt_tokens_cached": 801_506,
            "tokens_out": 60_117,
            "tokens_forced": 21_870,
            "steps": 2410,
            "seconds_plan": 1.1,
            "seconds_forward": 104.2,
            "seconds_sample": 6.0,
            "seconds_idle": 0.2,
        },
    }


def _full_run(n: int, *, harm: float, changes: dict[str, Any]) -> Run:
    items, scores = [], []
    calls: dict[str, Call] = {}
    for i in range(n):
        item = _item(i)
        items.append(item)
        for metric in METRICS:
            claims = _claims(item, metric, i, harm)
            keys = _calls(item, metric, claims, calls)
            scores.append(
                Score(
                    item=item.id,
                    metric=metric,
                    state="ok",
                    value=_value(metric, claims),
                    claims=claims,
                    calls=tuple(keys),
                )
            )
    sent = sum(call.prompt_tokens for call in calls.values())
    out = sum(call.output_tokens for call in calls.values())
    fields: dict[str, Any] = {
        "items": tuple(items),
        "scores": tuple(scores),
        "calls": calls,
        "prompt_heads": {name: text + "Example: " + text * 20 for name, text in HEADS.items()},
        "tokens": Tokens(calls=11 * n, distinct_calls=len(calls), prompt_tokens=sent, output_tokens=out),
    }
    return plain_run({metric: [0.0] * n for metric in METRICS}, **(fields | changes))


def _item(i: int) -> ItemRecord:
    question, reference, cluster = TOPICS[i % len(TOPICS)]
    if i >= len(TOPICS):
        question = f"{question[:-1]} in case {i // len(TOPICS) + 1}?"
    contexts = [PASSAGES[(i + k) % 5] + f" This is passage {k + 1} of document {cluster}." for k in range(5)]
    answer = f"{reference} " + " ".join(STATEMENTS[(i + j) % 8] for j in range(3))
    kind = ("single fact", "multi-document", "numeric", "unanswerable")[i % 4]
    return ItemRecord(
        id=f"serving-{i:03}",
        question=question,
        reference=reference,
        answer=answer,
        contexts=tuple(contexts),
        kind=kind,
        cluster=cluster,
        critical=i % 25 == 4,
        line=i + 1,
    )


def _claims(item: ItemRecord, metric: str, i: int, harm: float) -> tuple[Claim, ...]:
    rng = random.Random(f"{metric}-{i}")
    share = {"faithfulness": 1.0, "context_recall": 0.4}.get(metric, 0.15)
    damaged = not item.critical and random.Random(f"harm-{metric}-{i}").random() < harm * share
    repaired = harm > 0 and random.Random(f"repair-{metric}-{i}").random() < 0.05
    weak = {"context_precision": 0.25, "context_recall": 0.08, "faithfulness": 0.06}.get(metric, 0.0)
    counts = {"context_precision": len(item.contexts), "context_recall": rng.randint(1, 3)}
    count = counts.get(metric, rng.randint(3, 5))
    if metric == "answer_relevance":
        similarity = round(0.75 + 0.25 * rng.random() - (0.4 if damaged else 0.0), 6)
        text = item.question if similarity > 0.9 else f"Could you explain {item.cluster} to me?"
        return (Claim(text=text, verdict=1, probability=0.98, similarity=similarity),)
    claims = []
    for j in range(count):
        bad = rng.random() < weak or (damaged and j % 3 != 2)
        verdict = 0 if bad and not repaired else 1
        p = round(0.5 + 0.49 * rng.random() ** 0.4, 6)
        claims.append(
            Claim(
                text="" if metric == "context_precision" else STATEMENTS[(i + j) % 8],
                verdict=verdict,
                probability=p if verdict else round(1 - p, 6),
                reason=(
                    "The context states this directly in its second sentence."
                    if verdict
                    else "No passage mentions it; the closest one speaks of another step."
                ),
                context=j if metric == "context_precision" else None,
            )
        )
    return tuple(claims)


def _value(metric: str, claims: tuple[Claim, ...]) -> float:
    if metric == "answer_relevance":
        return claims[0].similarity or 0.0
    if metric == "context_precision":
        hits, total = 0, 0.0
        for rank, claim in enumerate(claims, 1):
            hits += claim.verdict
            total += claim.verdict * hits / rank
        return total / hits if hits else 0.0
    return sum(claim.verdict for claim in claims) / len(claims)


def _calls(item: ItemRecord, metric: str, claims: tuple[Claim, ...], calls: dict[str, Call]) -> list[str]:
    joined = "\n".join(item.contexts)
    verdicts = [{"statement": c.text, "reason": c.reason, "verdict": c.verdict} for c in claims]
    made: list[tuple[str, Any, Any]] = []
    if metric == "faithfulness":
        split = {"statements": [c.text for c in claims]}
        made.append(("faithfulness.statements", {"question": item.question, "answer": item.answer}, split))
        made.append(("faithfulness.nli", {"context": joined, **split}, {"statements": verdicts}))
    elif metric == "context_precision":
        for context, verdict in zip(item.contexts, verdicts, strict=True):
            asked = {"question": item.question, "context": context, "answer": item.reference}
            made.append((metric, asked, {"reason": verdict["reason"], "verdict": verdict["verdict"]}))
    elif metric == "context_recall":
        asked = {"question": item.question, "context": joined, "answer": item.reference}
        made.append((metric, asked, {"classifications": verdicts}))
    else:
        made.append((metric, {"response": item.answer}, {"question": claims[0].text, "noncommittal": 0}))
    keys = []
    for head, asked, answered in made:
        text, output = json.dumps(asked), json.dumps(answered)
        key = hashlib.sha256(f"{head}{text}".encode()).hexdigest()[:16]
        calls[key] = Call(
            head=head,
            input=text,
            output=output,
            prompt_tokens=640 + len(text) // 4,
            output_tokens=len(output) // 4,
            finish="stop",
        )
        keys.append(key)
    return keys
