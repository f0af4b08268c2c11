"""How often our greedy text agrees with llama.cpp's: same first 16 of 64 tokens, on 20 prompts.

llama.cpp rounds activations to 8 bits before it multiplies them with a quantized weight; we do not. So each model is
compared twice: the file as it is, and the same weights dequantized into a float32 GGUF, where llama.cpp rounds nothing.

usage: python bench/agreement.py [MODEL ...]    (catalogue names; needs the dev extra)
"""

import json
import platform
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "engine"))

import gguf
import numpy as np
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


def theirs(path: Path, prompts: list[list[int]], exact: bool) -> list[list[int]]:
    """The same through llama.cpp, by its defaults or with an `exact` KV cache."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 2048
    params.n_parallel = 1
    params.warmup = False
    if exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = 2
    server = xllamacpp.Server(params)
    found = []
    for prompt in prompts:
        request = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0.0, "top_k": 1, "ignore_eos": True,
                   "logprobs": 1, "cache_prompt": False}  # fmt: skip
        reply = server.handle_completions(request)
        found.append([token["id"] for token in reply["choices"][0]["logprobs"]["content"]])
    return found


def dequantized(path: Path, folder: Path) -> Path:
    """The same model with float32 tensors."""
    reader = gguf.GGUFReader(path)
    made = folder / f"{path.stem}-f32.gguf"
    writer = gguf.GGUFWriter(made, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(
            tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def agreement(mine: list[list[int]], other: list[list[int]]) -> dict[str, object]:
    """Tokens until the first difference, per prompt."""
    pairs = zip(mine, other, strict=True)
    agree = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), TOKENS) for x, y in pairs
    ]
    return {"prompts": len(agree), "same_first_16": sum(n >= 16 for n in agree), "agreeing_tokens": agree}


def main() -> None:
    rows: dict[str, dict[str, object]] = {}
    for name in sys.argv[1:] or ["smollm2-135m", "qwen-0.5b", "gemma-3-270m"]:
        path = model_path(name)
        prompts, mine = ours(path)
        rows[name] = {"as it is": agreement(mine, theirs(path, prompts, False))}
        with tempfile.TemporaryDirectory() as folder:
            rows[name]["dequantized to float32"] = agreement(
                mine, theirs(dequantized(path, Path(folder)), prompts, True)
            )
        for how, row in rows[name].items():
            print(f"{name}, {how}: {row}")
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
