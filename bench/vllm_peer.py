"""vLLM on the same points as `bench/engine.py`, with dummy weights; the printed lines are what `--peer-log` reads.

usage: python bench/vllm_peer.py 8b|135m [--invariant] | tee vllm.log       (pip install vllm==0.23.0, an NVIDIA card)
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from typing import Any

from bench import workload

COMMON = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", torch_dtype="bfloat16",
              max_position_embeddings=8192, rms_norm_eps=1e-5)  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, head_dim=128, vocab_size=128256, rope_theta=500000.0,
               tie_word_embeddings=False, bos_token_id=128000, eos_token_id=128001),
    "135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                 num_key_value_heads=3, head_dim=64, vocab_size=49152, rope_theta=100000.0,
                 tie_word_embeddings=True, bos_token_id=1, eos_token_id=2),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("--invariant", action="store_true", help="vLLM's batch-invariant mode")
    args = parser.parse_args()
    if args.invariant:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    for name, value in {
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }.items():
        os.environ.setdefault(name, value)
    config: dict[str, Any] = {**COMMON, **CONFIGS[args.model]}
    folder = tempfile.mkdtemp()
    with open(f"{folder}/config.json", "w") as file:
        json.dump(config, file)

    started = time.time()
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    llm = LLM(model=folder, load_format="dummy", skip_tokenizer_init=True, enable_prefix_caching=True,
              max_model_len=4096, gpu_memory_utilization=0.85, max_num_seqs=256, disable_log_stats=True)  # fmt: skip
    print(f"{args.model} start-up s {time.time() - started:.1f}", flush=True)

    def run(prompts: list[workload.Prompt], out: int, label: str) -> None:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = SamplingParams(
            temperature=0, max_tokens=out, min_tokens=out, ignore_eos=True, detokenize=False
        )
        start = time.time()
        done = llm.generate(inputs, params, use_tqdm=False)
        seconds = time.time() - start
        produced = sum(len(request.outputs[0].token_ids) for request in done)
        sent = sum(len(prompt) for prompt in prompts)
        print(
            f"{args.model} {label}: {seconds:.3f} s, {len(prompts) / seconds:.1f} req/s, "
            f"out {produced / seconds:.0f} tok/s, prompt {sent / seconds:.0f} tok/s",
            flush=True,
        )

    vocab, sizes = config["vocab_size"], workload.FULL
    run(workload.warm_up(vocab), sizes.judge_out, "warm-up")
    for batch in sizes.decode_batches:
        run(workload.decode(batch, vocab), sizes.decode_out, f"decode b={batch}")
    llm.reset_prefix_cache()
    run(workload.prefill(vocab), 1, "prefill 16x1000")
    llm.reset_prefix_cache()
    run(workload.judge(vocab), sizes.judge_out, "judge 1000 requests")
    llm.reset_prefix_cache()
    run(workload.judge(vocab), sizes.judge_out, "judge 1000 requests, again")


if __name__ == "__main__":
    main()
