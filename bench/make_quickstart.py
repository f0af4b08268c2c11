"""Writes testsets/quickstart.jsonl: twelve core cases with the demo pipeline's own answers, written by Qwen-0.5B.

usage: python bench/make_quickstart.py
"""

import asyncio
import json
from pathlib import Path

from ragate.demo import pipeline
from ragate.session import close_engines

IDS = ["001", "005", "017", "029", "041", "077", "097", "031", "083", "019", "035", "080"]


async def main() -> None:
    cases = {}
    for line in Path("testsets/llm-serving/core.jsonl").read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        cases[case["id"]] = case
    chosen = [cases[f"ls-{number}"] for number in sorted(IDS)]
    ask = pipeline(k=2, chunk_words=120, model="qwen-0.5b")
    answers = await asyncio.gather(*(ask(case["question"]) for case in chosen))
    lines = [
        json.dumps({**case, **answer}, ensure_ascii=False)
        for case, answer in zip(chosen, answers, strict=True)
    ]
    Path("testsets/quickstart.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    close_engines()


if __name__ == "__main__":
    asyncio.run(main())
