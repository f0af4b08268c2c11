"""Start an engine and answer one token, with the clock read on the way; `bench/engine.py` runs it in fresh processes.

usage: python bench/first_token.py MODEL_PATH DEVICE WEIGHTS       (prints one line of JSON)
"""

import time

BEGAN = time.monotonic()

import json  # noqa: E402
import sys  # noqa: E402

from ragate_engine import Engine, EngineConfig, SamplingParams  # noqa: E402


def main() -> None:
    path, device, weights = sys.argv[1:]
    settings = EngineConfig(device=device, weights=weights, max_len=4096)  # type: ignore[arg-type]
    imported = time.monotonic()
    with Engine.load(path, settings) as engine:
        loaded = time.monotonic()
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        answer = engine.submit(list(range(100, 164)), params).result()
        done = time.monotonic()
        assert len(answer.tokens) == 1
    print(json.dumps({"began": BEGAN, "imported": imported, "loaded": loaded, "first_token": done}))


if __name__ == "__main__":
    main()
