"""The benches run, on a CPU with a tiny model; what they count is right; the page shows what was measured."""

from __future__ import annotations

import hashlib
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import engine as engine_bench
from bench import invariance, kernel_times, limits, peer, performance_page, plots, repeat_eval, soak, workload
from bench import tune as tune_bench
from bench.random_model import LLAMA_8B, QWEN_1_5B, SMOL_135M, TINY, random_checkpoint, write_safetensors
from bench.roofline import Ceilings, Shape, Work
from ragate_engine import Engine, EngineConfig, SamplingParams
from ragate_engine.weights import names, open_checkpoint

CARD = Ceilings(790e12, 4239e9, "test")


# ---- the work ----


@pytest.mark.parametrize(
    ("prompts", "sha256"),
    [
        (workload.warm_up(49152), "9c65281d18aa768d"),
        (workload.decode(1, 49152), "b1f0e743d0ca123e"),
        (workload.decode(256, 49152), "f3a643d5d35cd524"),
        (workload.prefill(49152), "b8789754590348aa"),
        (workload.judge(49152), "0310a4c2fd196d4a"),
        (workload.judge(128256), "0cd5e3bdbe0eff78"),
    ],
)
def test_the_token_ids_are_those_that_the_peers_figures_were_made_with(
    prompts: list[workload.Prompt], sha256: str
) -> None:
    assert hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16] == sha256


def test_a_random_tensor_depends_on_its_name_and_the_seed_alone() -> None:
    one, same, other = (random_checkpoint(TINY, seed) for seed in (1, 1, 2))
    assert one.names == set(names.expected(TINY))
    assert torch.equal(one.load("layers.1.q"), same.load("layers.1.q"))
    assert not torch.equal(one.load("layers.1.q"), other.load("layers.1.q"))
    assert not torch.equal(one.load("layers.1.q"), one.load("layers.0.q"))
    down = one.load("layers.0.down")
    assert isinstance(down, torch.Tensor) and down.dtype == torch.bfloat16
    assert float(down.float().std()) == pytest.approx(TINY.intermediate_size**-0.5, rel=0.05)


def test_written_weights_are_a_model_that_answers(tmp_path: Path) -> None:
    total = write_safetensors(TINY, tmp_path, shard_bytes=100_000)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == TINY
    assert total == 2 * sum(torch.Size(shape).numel() for shape in names.expected(TINY).values())
    with Engine(checkpoint, EngineConfig(device="cpu", kv_bytes=1 << 20)) as engine:
        answer = engine.submit([7, 8, 9], SamplingParams(max_tokens=3, logprobs=1)).result()
    assert len(answer.tokens) == 3


@pytest.mark.parametrize(
    "config", [LLAMA_8B, SMOL_135M, QWEN_1_5B], ids=lambda config: str(config.num_layers)
)
def test_the_config_that_is_written_is_read_back_as_the_same_model(config: Any, tmp_path: Path) -> None:
    from bench.random_model import _hf_config
    from ragate_engine.weights.safetensors import model_config

    (tmp_path / "config.json").write_text(json.dumps(_hf_config(config)))
    assert model_config(tmp_path) == config


def test_the_roofline_knows_the_8b_model() -> None:
    shape = Shape(LLAMA_8B)
    assert shape.weights_read().bytes == pytest.approx(15.0e9, rel=0.01)
    assert shape.kv_bytes == 128 * 1024
    one = shape.decode(1, 1, 64, 256)
    assert CARD.bound(one) == "memory"
    assert 256 / CARD.seconds(one) == pytest.approx(282, rel=0.01)
    own = [len(prompt) - 1200 for prompt in workload.judge(LLAMA_8B.vocab_size)]
    judge = shape.judge(1200, own, 128, 256)
    assert CARD.bound(judge) == "arithmetic"
    assert judge.flops == pytest.approx(8.7e15, rel=0.02)
    assert CARD.seconds(judge) == pytest.approx(11, rel=0.02)


def test_sharing_a_prefix_leaves_less_work_than_computing_it_each_time() -> None:
    shape = Shape(SMOL_135M)
    shared, apart = shape.judge(1200, [300] * 16, 2, 8), shape.prefill([1500] * 16)
    assert shared.flops < 0.5 * apart.flops


# ---- the benches ----


def test_the_engine_bench_measures_every_point(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    arguments = ["tiny", "--device", "cpu", "--small", "--kv-bytes", "4000000", "--starts", "1"]
    engine_bench.main([*arguments, "--out", str(out)])
    found = json.loads(out.read_text())
    assert set(found["decode"]) == {"1", "4"}
    assert found["prefill"]["tok_s"] == pytest.approx(80 / found["prefill"]["seconds"][-1])
    judge = found["judge"]
    assert judge["usage"]["tokens_out"] == 2 * 12 * workload.SMALL.judge_out
    assert judge["usage"]["prompt_tokens_cached"] > 0
    assert 0 <= judge["kv"]["unused_share"] < 0.5
    start = found["startup"]["cold_kernels"]
    phases = sum(seconds for phase, seconds in start.items() if phase != "total")
    assert start["total"] == pytest.approx(phases)
    assert "peer" not in found and "ratio" not in judge


def test_invariance_is_shown_and_a_difference_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tiny", "--device", "cpu", "--requests", "24"]
    out = tmp_path / "result.json"
    assert invariance.main([*arguments, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["settings"]
    assert {row["differ"] for row in rows} == {0}
    assert next(row for row in rows if "preempted" in row["setting"])["preemptions"] > 0

    run = invariance._run

    def tampered(checkpoint: Any, setting: invariance.Setting, *rest: Any) -> Any:
        answers, usage, cached = run(checkpoint, setting, *rest)
        if setting.name == "alone":
            answers[5] = ("", (), "length")
        return answers, usage, cached

    monkeypatch.setattr(invariance, "_run", tampered)
    monkeypatch.setattr(invariance, "SETTINGS", invariance.SETTINGS[:4])
    assert invariance.main(arguments) == 1
    assert "1 of 24 DIFFER" in capsys.readouterr().out


def test_a_soak_finds_nothing_wrong_with_the_engine(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    assert (
        soak.main(["tiny", "--device", "cpu", "--requests", "800", "--max-batch", "24", "--out", str(out)])
        == 0
    )
    found = json.loads(out.read_text())
    assert found["answered"] + found["aborted"] == found["requests"] == 800
    assert found["checks"] == soak.ROUNDS


def test_a_soak_reports_memory_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    grown = iter(range(1000))
    monkeypatch.setattr(soak, "memory", lambda device: {"process": 100.0 + 10 * next(grown)})
    with Engine(random_checkpoint(TINY), EngineConfig(device="cpu", max_len=96, kv_bytes=60_000)) as engine:
        run = soak.Soak(engine, soak.kinds(TINY), 80, "cpu")
        run.run()
    assert "process drifted by +120 MiB" in run.problems()


@pytest.mark.parametrize("base", ["dense", "packed"])
def test_training_is_timed_without_its_first_steps(base: str, tmp_path: Path) -> None:
    out = tmp_path / "tune.json"
    tune_bench.main(["tiny", "--device", "cpu", "--small", "--base", base, "--out", str(out)])
    found = json.loads(out.read_text())
    last = found["log"][-2:]
    seconds = sum(row["seconds"] for row in last)
    assert len(found["log"]) == 5
    assert found["tokens_per_second"] == pytest.approx(sum(row["tokens"] for row in last) / seconds)
    assert found["minutes_for_40000"] == pytest.approx(40_000 / 16 * seconds / 60)
    assert found["computed_share"] < 0.9


def test_limits_are_measured_on_a_cpu_too(tmp_path: Path) -> None:
    found = limits.main(["--device", "cpu", "--small", "--out", str(tmp_path / "limits.json")])
    assert found["limits"]["copy_GBps"] > 0 and found["limits"]["page_cache_read_GBps"] > 0
    assert found["command"].startswith("python ")


# ---- the peer, the profiler's trace, the page ----

LOG = """INFO 11-22 vllm started
8b start-up s 60.5
8b warm-up: 1.00 s, 32.0 req/s, out 4096 tok/s, prompt 9000 tok/s
8b decode b=1: 1.27 s, 0.8 req/s, out 202 tok/s, prompt 50 tok/s
8b decode b=256: 2.86 s, 89.5 req/s, out 22915 tok/s, prompt 5729 tok/s
8b prefill 16x1000: 0.374 s, 42.8 req/s, out 43 tok/s, prompt 42773 tok/s
8b judge 1000 requests: 20.77 s, 48.1 req/s, out 6163 tok/s, prompt 79000 tok/s
8b judge 1000 requests, again: 20.88 s, 47.9 req/s, out 6130 tok/s, prompt 79000 tok/s
"""


def test_the_peers_figures_come_from_its_log_or_from_the_results(tmp_path: Path) -> None:
    path = tmp_path / "vllm.log"
    path.write_text(LOG)
    found, committed = peer.from_log(path, "8b"), peer.committed("8b")
    assert committed is not None
    assert found.decode_tok_s == {"1": 202, "256": 22915}
    assert (found.startup_s, found.prefill_tok_s) == (committed.startup_s, committed.prefill_tok_s)
    assert found.judge_s == committed.judge_s == [20.77, 20.88]
    assert peer.committed("8b", "invariant").judge_s == [25.27, 25.3]  # type: ignore[union-attr]
    assert peer.committed("1.5b") is None
    with pytest.raises(ValueError, match="no line of 135m"):
        peer.from_log(path, "135m")


def test_time_by_kernel_is_a_difference_of_two_traces() -> None:
    def trace(steps: int) -> dict[str, Any]:
        def event(name: str, dur: float, cat: str = "kernel") -> dict[str, Any]:
            return {"ph": "X", "cat": cat, "name": name, "ts": 0, "dur": dur}

        long = "void at::native::(anonymous namespace)::fill_kernel<4, float>(int, float*)"
        return {
            "traceEvents": [
                event("prefill_kernel", 50.0),
                event("cudaLaunchKernel", 5.0, "cuda_runtime"),
                *[event("linear_kernel", 3.0), event("linear_kernel", 2.0), event(long, 1.0)] * steps,
            ]
        }

    few, more = (kernel_times.kernels_in(trace(steps)) for steps in (2, 6))
    step = kernel_times.step_result(kernel_times.difference(few, more), 4, seconds=8e-6)
    assert [row["name"] for row in step["kernels"]] == ["linear_kernel", "fill_kernel"]
    assert step["kernels"][0] == {
        "name": "linear_kernel", "us": 5.0, "launches": 2.0, "share": pytest.approx(5 / 6),
    }  # fmt: skip
    assert (step["kernel_us"], step["wall_us"]) == (6.0, pytest.approx(8.0))


HEADER = {
    "date": "2026-01-01T00:00:00+00:00",
    "hardware": "a card, 16 cores",
    "versions": {"torch": "2.11"},
    "commit": "0123456789abcdef",
    "command": "python bench/some.py",
}


def made_up(folder: Path) -> None:
    """Results of a run that never was."""

    def write(name: str, **fields: Any) -> None:
        (folder / f"{name}.json").write_text(json.dumps(HEADER | fields))

    committed = peer.committed("8b")
    assert committed is not None
    shape = Shape(LLAMA_8B)

    def point(seconds: float, tokens: int, work: Work, theirs: float) -> dict[str, Any]:
        return {
            "seconds": [seconds + 1, seconds],
            "tok_s": tokens / seconds,
            "flops": work.flops,
            "bytes": work.bytes,
            "limit_s": CARD.seconds(work),
            "of_limit": CARD.seconds(work) / seconds,
            "bound": CARD.bound(work),
            "peer_tok_s": theirs,
            "ratio": tokens / seconds / theirs,
        }

    passes = [(1, 1.15, 202), (8, 1.2, 1572), (32, 1.25, 5775), (128, 1.6, 17348), (256, 2.4, 22915)]
    over_time = [{"s": s / 10, "paged": 0.01 + 0.0002 * s, "contiguous": 0.08 - 0.001 * s} for s in range(60)]
    kv = {
        "unused_share": 0.005,
        "contiguous_unused_share": 0.2,
        "held_to_contiguous": 0.4,
        "over_time": over_time,
    }
    start = {"total": 6.0, "python": 0.1, "imports": 2.0, "load": 3.5, "first_token": 0.4}
    alone = point(0.38, 16000, shape.prefill([1000] * 16), 1.0)
    del alone["peer_tok_s"], alone["ratio"]
    write("engine-h200-1.5b", limits=vars(CARD), sizes=vars(workload.FULL), prefill=alone)
    write(
        "engine-h200-8b",
        peer=committed.describe(),
        limits=vars(CARD),
        sizes=vars(workload.FULL),
        decode={
            str(batch): point(seconds, 256 * batch, shape.decode(batch, min(4, batch), 64, 256), theirs)
            for batch, seconds, theirs in passes
        },
        prefill=point(0.38, 16000, shape.prefill([1000] * 16), 42773),
        judge=point(16.0, 128000, shape.judge(1200, [450] * 1000, 128, 256), 6150) | {"kv": kv},
        startup={"cold_kernels": start | {"total": 9.0, "first_token": 3.4}, "warm": [start]},
    )
    settings = [
        {"setting": name, "differ": 0, "preemptions": 12 * ("pool" in name)}
        for name in ("together", "alone", "a small pool")
    ]
    write("invariance-h200-8b", requests=200, settings=settings)
    kernels = [
        {"name": f"kernel_{i}", "us": 100.0 - 9 * i, "launches": 32, "share": (100 - 9 * i) / 604}
        for i in range(10)
    ]
    write(
        "kernels-h200",
        models={"8b": {"decode b=1": {"wall_us": 4300.0, "kernel_us": 4000.0, "kernels": kernels}}},
    )
    kind = {"of_copy": 0.541, "of_bf16_rate": 0.968}
    rows = {rows: {"int4 g128": kind} for rows in ("1", "16", "4096")}
    write("quantized-products-h200", differ=0, products={"gate, up": rows, "down": rows})
    write(
        "limits-h200",
        limits={"copy_GBps": 4239.0, "one_row_linear_GBps": {"8b o": 2434.0}, "graph_kernel_us": 1.5},
    )


def test_the_page_shows_what_was_measured(tmp_path: Path) -> None:
    made_up(tmp_path)
    page = tmp_path / "docs" / "performance.md"
    performance_page.main(tmp_path, page)
    text = page.read_text()
    assert "| decode, batch 1 | 223 tok/s | 202 | 56 | **1.10** | 79% (memory) |" in text
    assert (
        "| judge workload | 17.00 / 16.00 s | 20.77 / 20.88 s | 25.27 / 25.30 s | **1.30** | 69% (arithmetic) |"
        in text
    )
    assert (
        "| | ragate | of the limit |\n|---|---|---|\n| prefill, 16 x 1,000 | 42,105 tok/s | 76% (arithmetic) |"
        in text
    )
    assert "| a small pool | 0 (12 preemptions) |" in text
    assert "| int4 g128 | 54% / 54% | 54% / 54% | 0.97 | 0.97 |" in text
    assert "| one row linear, 8b o | 2,434 GB/s |" in text
    assert "Soak" not in text  # it was not measured
    for figure in ("roofline", "kv", "startup", "kernels-8b"):
        assert f"(img/perf-{figure}.svg)" in text
        root = ET.fromstring((page.parent / "img" / f"perf-{figure}.svg").read_text())
        assert root.attrib["aria-label"]


def test_a_page_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run bench/engine\.py"):
        performance_page.main(tmp_path, tmp_path / "page.md")


def test_labels_of_a_figure_cannot_break_it() -> None:
    svg = plots.bars("a < b & c", [plots.Bar('<x> "y"', (("k<int>", 1.0),))], "s")
    texts = [node.text for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert texts[:2] == ["a < b & c", '<x> "y"']


def test_evaluations_that_differ_by_a_byte_are_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def evaluate(options: list[str], folder: Path, alone: bool) -> dict[str, object]:
        sha = "other" if folder.name == different else "same"
        return {"seconds": 2.0, "evaluation_s": 1.0, "alone": alone, "sha256": sha}

    monkeypatch.setattr(repeat_eval, "evaluate", evaluate)
    command = ["--runs", "5", "--device", "cpu", "--out", str(tmp_path / "r.json"), "--", "--judge", "x"]
    different = ""
    assert repeat_eval.main(command) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["options"] == ["--judge", "x"] and found["identical"]
    assert [run["alone"] for run in found["runs"]] == [True, True, False, False, False]
    different = "4"
    assert repeat_eval.main(command) == 1
