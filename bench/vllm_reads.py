"""Does vLLM read the AWQ and GPTQ models that we write, and give the text the perplexity that we do, to 1 %?

Runs in the peer's environment, on what `bench/quality.py ... --keep FOLDER --out JSON` left: the models, and the
windows of text that their perplexities in the JSON are of.

usage: python bench/vllm_reads.py FOLDER JSON [--out JSON]       (pip install vllm==0.23.0, an NVIDIA card)
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
from pathlib import Path

LIMIT = 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("quality", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for name in ("VLLM_NO_USAGE_STATS", "HF_HUB_OFFLINE"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    windows = json.loads((args.folder / "windows.json").read_text())
    quality = json.loads(args.quality.read_text())
    import torch
    import vllm  # type: ignore[import-not-found]

    rows = []
    for made in quality["formats"]:
        path = args.folder / made["name"]
        if not (path / "config.json").is_file():
            continue
        llm = vllm.LLM(model=str(path), skip_tokenizer_init=True, enforce_eager=True, max_model_len=2048,
                       gpu_memory_utilization=0.6, disable_log_stats=True)  # fmt: skip
        params = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        answers = llm.generate([{"prompt_token_ids": w} for w in windows], params, use_tqdm=False)
        losses = [
            -token[window[at]].logprob
            for window, answer in zip(windows, answers, strict=True)
            for at, token in enumerate(answer.prompt_logprobs)
            if at
        ]
        theirs = math.exp(math.fsum(losses) / len(losses))
        rows.append({"name": made["name"], "ours": made["perplexity"], "vllm": theirs})
        rows[-1]["ratio"] = theirs / made["perplexity"]
        print(f"{made['name']}: ours {made['perplexity']:.4f}, vLLM {theirs:.4f}", flush=True)
        del llm
        gc.collect()
        torch.cuda.empty_cache()
    if args.out:
        versions = {"vllm": vllm.__version__, "torch": torch.__version__}
        kept = {key: quality[key] for key in ("date", "hardware", "commit", "model", "text")}
        args.out.write_text(json.dumps(kept | {"peer": versions, "formats": rows}, indent=1) + "\n")
    return int(not rows or any(abs(row["ratio"] - 1) > LIMIT for row in rows))


if __name__ == "__main__":
    sys.exit(main())
