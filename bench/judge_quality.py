"""How far judges can be believed: held against human labels through ragas' own prompts and schemas, one table for all.

Sets (from --data): `ragtruth` (RAGTruth QA dev, faithfulness of answers), `wice` (WiCE dev, relevance of up to 12
sentences a claim), `ragbench` (RAGBench's questions that lessons leave out, relevance of passages as GPT-4 labelled
it), `begin` (BEGIN dev, attribution: a sanity set that word overlap nearly solves).

On `ragtruth` the gate is tried too: each generator's answers as the baseline of each other's (bench/judge_pairs.py).

Where everything is at hand:
    python bench/judge_quality.py smollm2-135m qwen-0.5b --device cpu --items 20 --out result.json
A machine with a card has no ragas. So: prompts are made here, answered there, scored here:
    python bench/judge_quality.py --render prompts.jsonl.gz
    python bench/judge_quality.py qwen-0.5b --prompts prompts.jsonl.gz --out answers.jsonl [--adapter FOLDER]
    python bench/judge_quality.py --answers answers.jsonl other.jsonl --out result.json
With `--statements judge` ragas' pipeline as it is, in two rounds: --render, answer, then --render with the --answers
of that judge makes the second round's prompts.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragate.verdicts import LOGPROBS, verdict_probabilities
from ragate_engine import Engine, EngineConfig, SamplingParams

if TYPE_CHECKING:
    from ragate.judging.asks import Ask, Row
    from ragate.judging.labelled import Labelled, Subject
    from ragate.judging.quality import Quality

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
SETS: dict[str, tuple[str, Subject, int | None]] = {
    "ragtruth": ("ragtruth_qa_dev.jsonl", "faithfulness", None),
    "wice": ("wice_dev.jsonl", "relevance", None),
    "ragbench": ("ragbench_validation.jsonl", "relevance", None),
    "begin": ("begin_dev.jsonl", "faithfulness", 400),
}
"""Name -> (file, what is labelled, items taken)."""
CONTEXTS = 12
"""Sentences of a WiCE claim that are asked about, at most"""
SUPPORTING = 4
"""of them supporting ones."""

Rows = list[dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("judges", nargs="*", help="names of the catalogue, .gguf files or folders")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the labelled data")
    parser.add_argument("--items", type=int, help="take only so many items of each set, evenly spaced")
    parser.add_argument("--statements", choices=("sentences", "judge"), default="sentences")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--max-batch", type=int, help="requests that run at once")
    parser.add_argument("--adapter", type=Path, help="LoRA adapter that the judges wear, if not their own")
    parser.add_argument("--beside", action="store_true", help="keep it beside the weights, not merged")
    parser.add_argument(
        "--render", type=Path, metavar="FILE", help="only write the prompts (.jsonl or .jsonl.gz)"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="answer these prompts")
    parser.add_argument("--answers", type=Path, nargs="+", metavar="FILE", help="score these answers")
    parser.add_argument("--out", type=Path, help="answers (with --prompts) or the result, as JSON")
    options = parser.parse_args(arguments)
    if options.render:
        statements = read_rows(options.answers[0]) if options.answers else None
        write_rows(options.render, prompts_of(options, statements))
    elif options.prompts:
        if len(options.judges) != 1 or not options.out:
            parser.error("--prompts wants one judge and --out")
        write_rows(options.out, answers_of(options.judges[0], read_rows(options.prompts), options))
    elif options.answers:
        report([(path.name.partition(".jsonl")[0], read_rows(path)) for path in options.answers], options)
    elif options.judges:
        answered = [both_rounds(judge, options) for judge in options.judges]
        report([(rows[0]["judge"], rows) for rows in answered], options)
    else:
        parser.error("name judges, or one of --render, --prompts and --answers")


def both_rounds(judge: str, options: argparse.Namespace) -> Rows:
    """Prompts made and answered, in the one or two rounds that the way of --statements takes."""
    answers = answers_of(judge, prompts_of(options, None), options)
    if options.statements == "judge":
        second = answers_of(judge, prompts_of(options, answers), options)
        return [second[0], *answers[1:], *second[1:]]
    return answers


def read_rows(path: Path) -> Rows:
    """The rows of a .jsonl or .jsonl.gz file."""
    with (
        gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as f
    ):
        return [json.loads(line) for line in f]


def write_rows(path: Path, rows: Rows) -> None:
    """Write rows, the same rows as the same bytes."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())
    print(f"wrote {path}: {len(rows)} rows", file=sys.stderr)


# Prompts: needs ragas


def items_of(name: str, options: argparse.Namespace) -> list[Labelled]:
    """The items of a set, as many as are taken."""
    from ragate.judging.labelled import load_labelled, spread

    file, subject, count = SETS[name]
    items, _ = load_labelled(options.data / file, subject)
    if name == "ragbench":
        items = _left_out(items, options.data / file)
    items = spread(items, count if options.items is None else options.items)
    return [_thinned(item) for item in items] if name == "wice" else items


def _left_out(items: Sequence[Labelled], path: Path) -> list[Labelled]:
    """The items whose questions no lesson is of, those of one question as one source."""
    from ragate.tuning.recipe import is_held_out
    from ragate.tuning.sources import cluster_of

    clusters = {row["id"]: cluster_of(row) for row in read_rows(path)}
    return [
        dataclasses.replace(item, cluster=clusters[item.id])
        for item in items
        if is_held_out(clusters[item.id])
    ]


def _thinned(item: Labelled) -> Labelled:
    """The item with few of its contexts, chosen by their hash: supporting ones first, in their old order."""
    assert item.context_relevant is not None

    def chance(index: int) -> bytes:
        return hashlib.sha256(f"{item.id}#{index}".encode()).digest()

    positions = sorted(range(len(item.contexts)), key=chance)
    supporting = [i for i in positions if item.context_relevant[i]][:SUPPORTING]
    others = [i for i in positions if not item.context_relevant[i]][: CONTEXTS - len(supporting)]
    kept = sorted(supporting + others)
    return dataclasses.replace(
        item,
        contexts=tuple(item.contexts[i] for i in kept),
        context_relevant=tuple(item.context_relevant[i] for i in kept),
    )


def prompts_of(options: argparse.Namespace, answers: Rows | None) -> Rows:
    """Every call with its schema. By the way `judge`: the decompositions, or with their answers what follows."""
    from ragate.judging.prompts import MODELS, asks_of, nli_asks, statements_ask
    from ragate.schemas import answer_schema

    said = {row["id"]: row for row in answers or () if "id" in row}
    rows: Rows = []
    for name in options.sets:
        subject = SETS[name][1]
        for item in items_of(name, options):
            asks: Iterable[Ask]
            if subject == "relevance" or options.statements == "sentences":
                asks = () if answers is not None else asks_of(item, subject)
            elif answers is None:
                asks = [statements_ask(item)]
            else:
                answer = said.get(f"{name}:{statements_ask(item).id}")
                done = answer is not None and answer["finish"] == "stop"
                asks = nli_asks(item, json.loads(answer["output"])["statements"]) if answer and done else ()
            for ask in asks:
                schema = answer_schema(MODELS[ask.call], ask.prompt)
                rows.append(
                    ask.model_dump()
                    | {"id": f"{name}:{ask.id}", "set": name}
                    | {"schema": schema.text, "chars": schema.chars, "octets": schema.octets}
                )
    return rows


# Answers: needs neither ragas nor pydantic


def answers_of(judge: str, prompts: Rows, options: argparse.Namespace) -> Rows:
    """What the judge says, greedy, as `ragate.judge.EngineJudge` asks it; the first row says who it was."""
    path, adapter = Path(judge), options.adapter
    if not path.exists():
        from ragate.catalog import resolve_judge

        choice = resolve_judge(judge)
        path, adapter = choice.path, adapter or choice.adapter
    config = engine_config(options, adapter)
    worn = {"adapter": adapter.name} if adapter and options.beside else {}
    started = time.perf_counter()
    with Engine.load(path, config) as engine:
        loaded = time.perf_counter()
        found = []
        for row in prompts:
            ids = engine.chat_prompt([{"role": "user", "content": row["prompt"]}])
            room = engine.max_len - len(ids)
            if room < row["chars"]:
                found.append((row, None))
                continue
            limit = min(row["octets"], room)
            params = SamplingParams(max_tokens=limit, schema=row["schema"], logprobs=LOGPROBS)
            found.append((row, engine.submit(ids, params, **worn)))
        rows = []
        for row, future in found:
            if future is None:
                rows.append({"id": row["id"], "finish": "too long", "output": "", "verdicts": []})
                continue
            completion = future.result()
            rows.append(
                {
                    "id": row["id"],
                    "finish": completion.finish,
                    "output": completion.text,
                    "verdicts": verdict_probabilities(completion.text, completion.tokens),
                    "prompt_tokens": completion.prompt_tokens,
                    "output_tokens": len(completion.tokens),
                }
            )
            if len(rows) % 200 == 0:
                print(f"{judge}: {len(rows)} of {len(found)}", file=sys.stderr)
        header = {
            "judge": judge if options.adapter is None else f"{judge} + {options.adapter.name}",
            "adapter": None if adapter is None else "beside" if options.beside else "merged",
            "describe": engine.describe(),
            "load_seconds": round(loaded - started, 1),
            "seconds": round(time.perf_counter() - loaded, 1),
            "calls": len(rows),
        }
    return [header, *rows]


def engine_config(options: argparse.Namespace, adapter: Path | None) -> EngineConfig:
    """The engine as the options want it, with the adapter that the judge wears."""
    settings: dict[str, Any] = {"device": options.device, "max_batch": options.max_batch}
    if adapter is not None:
        settings |= {"adapters": (adapter,)} if options.beside else {"merge_adapter": adapter}
    return EngineConfig(**settings)


# Scores


def report(answered: Sequence[tuple[str, Rows]], options: argparse.Namespace) -> None:
    """All figures of all judges on all sets: a table, and JSON where it is wanted."""
    from bench.judge_pairs import LIMIT, lines_of, pairs_of, summary
    from bench.result import header, save

    lines = []
    result: dict[str, Any] = {"judges": {}}
    for name, rows in answered:
        head = {**(rows[0] if rows and "describe" in rows[0] else {}), "judge": name}
        found = {each: got for each in options.sets if (got := scored(each, rows, head, options))}
        entry: dict[str, Any] = {
            "answered": head,
            "sets": {
                each: json.loads(q.model_dump_json(exclude={"misses", "roc"}))
                for each, (q, _) in found.items()
            },
        }
        lines += [
            line for each, (quality, _) in found.items() for line in table(each, quality, head["judge"])
        ]
        if "ragtruth" in found:  # the set where several generators answered the same questions
            pairs = pairs_of(found["ragtruth"][1])
            entry["gate"] = {
                "limit": LIMIT,
                "verdicts": summary(pairs),
                "pairs": list(map(dataclasses.asdict, pairs)),
            }
            lines += lines_of(pairs, head["judge"])
        result["judges"][head["judge"]] = entry
    for line in dict.fromkeys(lines):  # the floors of a set are the same for all judges
        print(line)
    if options.out:
        result = header("cpu") | {"statements": options.statements, "items": options.items} | result
        save(result, options.out)


def scored(
    name: str, answers: Rows, head: dict[str, Any], options: argparse.Namespace
) -> tuple[Quality, list[Row]] | None:
    """(figures, rows) of one judge on one set; `None` where it was asked nothing of it."""
    from ragate.judging.asks import CALLS, Key, Said, rows_of, said_of
    from ragate.judging.quality import Source, quality_of

    file, subject, _ = SETS[name]
    call = CALLS[subject]
    items = items_of(name, options)
    by_id = {item.id: item for item in items}
    said: dict[Key, tuple[Said, ...]] = {}
    broken = set()
    asked = 0
    for row in answers:
        own, _, rest = row.get("id", "").partition(":")
        item, _, tail = rest.rpartition(f"/{call}/")
        if own != name or item not in by_id:
            continue
        asked += 1
        part = int(tail)
        try:
            text = by_id[item].contexts[part] if subject == "relevance" else ""
            said[call, item, part] = said_of(call, row["output"], row["verdicts"], text)
        except ValueError:  # cut at its limit, or too long to be asked
            broken.add(item)
    if not asked:
        return None
    if subject == "faithfulness":
        said = {key: value for key, value in said.items() if key[1] not in broken}
    rows, missing = rows_of(items, subject, said)
    if not rows:
        print(f"{head['judge']}: no verdict on {name}: {len(missing)} are missing", file=sys.stderr)
        return None
    source = Source(head["judge"], subject, options.statements, file, 0, tuple(missing))
    return quality_of(rows, source), rows


def table(name: str, quality: Quality, judge: str) -> list[str]:
    """A line a score: the set, who, then AUROC, within, balanced accuracy and gain over word overlap."""
    lines = []
    for figures in quality.scores:
        who = figures.name.replace("judge", judge) if figures.name.startswith("judge") else figures.name
        shown = (figures.auroc, figures.auroc_within, figures.balanced_accuracy, figures.gain)
        cells = "  ".join(f"{i.value:.3f} [{i.lower:.3f}, {i.upper:.3f}]" for i in shown if i is not None)
        lines.append(f"{name:9} {who:44} {cells}  n {quality.items}")
    now, best = quality.as_it_is, quality.at_threshold
    lines.append(
        f"{name:9} {judge:44} at P = 0.5: balanced accuracy {now.balanced_accuracy:.3f}, kappa {now.kappa:.3f}; at the "
        f"other half's threshold: kappa {best.kappa:.3f}; ECE {quality.error_before:.3f} -> "
        f"{quality.error_after[quality.scores_map.method]:.3f} ({quality.scores_map.method}); no verdict "
        f"{len(quality.failed)}"
    )
    return lines


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
