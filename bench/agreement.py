"""How often our greedy text agrees with llama.cpp's, which rounds activations to 8 bits: same first 16 of 64 tokens.

usage: python bench/agreement.py [MODEL ...]    (catalogue names; needs the dev extra)
"""

import json
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "engine"))

import xllamacpp
from models import PROMPTS

from ragate.catalog import model_path
from ragate.gate.baseline import git_commit
from ragate_engine import Engine, EngineConfig, SamplingParams

TOKENS = 64


def ours(path: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and greedy continuations as token ids."""
    with Engine.load(path, EngineConfig(device="cpu")) as engine:
        bos = [engine.tokenizer.bos_id] if engine.tokenizer.add_bos else []
        prompts = [[*bos, *engine.tokenizer.encode(text)] for text in PROMPTS]
        params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
        futures = [engine.submit(prompt, params) for prompt in prompts]
        return prompts, [[token.id for token in future.result().tokens] for future in futures]


def theirs(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """The same through llama.cpp."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 2048
    params.n_parallel = 1
    params.warmup = False
    params.cpuparams.n_threads = 2
    server = xllamacpp.Server(params)
    found = []
    for prompt in prompts:
        request = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0.0, "top_k": 1, "ignore_eos": True,
                   "logprobs": 1, "cache_prompt": False}  # fmt: skip
        reply = server.handle_completions(request)
        found.append([token["id"] for token in reply["choices"][0]["logprobs"]["content"]])
    return found


def main() -> None:
    rows = {}
    for name in sys.argv[1:] or ["smollm2-135m", "qwen-0.5b", "gemma-3-270m"]:
        path = model_path(name)
        prompts, mine = ours(path)
        other = theirs(path, prompts)
        agree = [next((i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), TOKENS)
                 for x, y in zip(mine, other, strict=True)]  # fmt: skip
        rows[name] = {
            "prompts": len(agree),
            "same_first_16": sum(n >= 16 for n in agree),
            "agreeing_tokens": agree,
        }
        print(name, rows[name])
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": platform.processor() or platform.machine(),
        "versions": {"xllamacpp": version("xllamacpp"), "torch": version("torch")},
        "commit": git_commit(Path.cwd()),
        "agreement_with_llama_cpp": rows,
    }
    Path("bench/results/agreement.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
