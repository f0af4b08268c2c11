"""`ragate models advise`: what weights take, what fits a card, which format is advised, and how it is said."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from rich.console import Console

from bench.random_model import LLAMA_8B, SMOL_135M, TINY, write_safetensors
from ragate import advise, rates
from ragate.advise import INT4, MEASURED, QUALITIES, Advice, Machine, Row, advice_on, share_reached
from ragate.cli import run
from ragate.report.advice import print_advice
from ragate_engine import Form, devices
from ragate_engine.config import ModelConfig
from ragate_engine.devices import Card
from ragate_engine.roofline import Ceilings
from ragate_engine.weights import Checkpoint
from ragate_engine.weights.stream import Joined

GIB = 1 << 30
H200 = Ceilings(737e12, 4200e9, "made up")
BENCH = Path(__file__).parents[2] / "bench" / "results"


def advice(
    gib: float, context: int = 4096, quantization: str = "bfloat16", config: ModelConfig = LLAMA_8B
) -> Advice:
    """Advice on a model that has no files, on a card with so much memory, all of it free."""
    card = Card("NVIDIA X", (9, 0), int(gib * GIB), int(gib * GIB))
    checkpoint = Checkpoint(Path("made"), config, None, {}, quantization, files=())
    return advice_on("judge", checkpoint, Machine(card, card.total, card.free, 16, H200), context)


def rows_of(found: Advice) -> dict[str, Row]:
    return {row.name: row for row in found.rows if not row.unpacked}


# ---- what weights take ----


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("Q8_0", 8.541e9),
        ("Q6_K", 6.596e9),
        ("Q5_K_M", 5.733e9),
        ("Q4_K_M", 4.921e9),
        ("Q4_0", 4.661e9),
        ("Q2_K", 3.179e9),
    ],
)
def test_files_have_the_size_of_those_that_are_published_of_llama_3_8b(name: str, published: float) -> None:
    # which carry some 8 MB of vocabulary besides
    assert rows_of(advice(80))[name].file_bytes + 7.8e6 == pytest.approx(published, rel=5e-4)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GGUF model of two layers with a quantized, tied embedding, in an otherwise empty folder."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "engine"))
    monkeypatch.chdir(tmp_path)
    from tiny_gguf import write_tiny

    kinds = {
        "token_embd.weight": gguf.GGMLQuantizationType.Q8_0,
        "blk.0.ffn_up.weight": gguf.GGMLQuantizationType.Q4_1,
    }
    write_tiny(tmp_path / "tiny.gguf", kinds=kinds)
    return tmp_path / "tiny.gguf"


# ---- what fits ----


def test_requests_that_fit_80_gib_worked_out_by_hand() -> None:
    weights = 2 * 8_030_261_248
    # rows of a step: hidden state four times, q twice, k and v, gate, up and product
    activations = 8192 * 2 * (4 * 4096 + 2 * 4096 + 2 * 1024 + 3 * 14336)
    partial_results = 4 * 16384 * 32 * 130
    logits, tables = 2 * 4 * 1024 * 128256, 4 * 1024 * 512
    work = 2 * activations + (256 << 20) + partial_results + logits + tables
    rope = 512 * 8192
    left = 80 * GIB - 80 * GIB // 50 - weights - work - rope
    blocks = int(left // (2 << 20) * 0.8)
    found = rows_of(advice(80))["bf16"]
    assert found.kv_bytes == 512 << 20 and found.kv_fp8_bytes == 256 << 20
    assert found.requests == blocks // 256 == 95
    assert found.requests_fp8 == int(left // (1 << 20) * 0.8) // 256


@pytest.mark.parametrize(
    ("gib", "advised", "requests"),
    [
        (8, None, 0),
        (9.2, "Q2_K", 1),
        (12, "Q5_K_M", 2),
        (24, "Q8_0", 18),
        (80, "bf16", 95),
        (141, "bf16", 191),
    ],
)
def test_an_8b_model_on_cards_of_all_sizes(gib: float, advised: str | None, requests: int) -> None:
    found = advice(gib)
    assert found.advised == advised
    if advised:
        assert rows_of(found)[advised].requests == requests
        finer = [q.name for q in QUALITIES[: [q.name for q in QUALITIES].index(advised)]]
        assert all(rows_of(found)[name].requests < 16 for name in finer)


def test_formats_come_finest_first_and_smaller_ones_leave_no_less_room() -> None:
    found = advice(24)
    assert [row.name for row in found.rows] == [
        *("bf16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "int4 g128", "Q4_0", "Q2_K")
    ]
    held = [row.weight_bytes for row in found.rows]
    assert held == sorted(held, reverse=True)
    room = [row.requests for row in found.rows]
    assert room == sorted(room)


def test_an_eight_bit_cache_comes_before_a_format_that_leaves_too_little_room() -> None:
    found = advice(18)
    assert found.advised == "Q8_0" and found.why.endswith('tokens at once, given kv_dtype = "fp8_e4m3"')
    assert rows_of(found)["Q8_0"].requests < 16 <= (rows_of(found)["Q8_0"].requests_fp8 or 0)
    assert 'Q8_0 would, given kv_dtype = "fp8_e4m3"' in advice(20).why


def test_what_fits_in_no_format_is_told_in_a_sentence_with_the_way_out() -> None:
    found = advice(8)
    assert found.advised is None and found.how == ""
    assert found.why.startswith("judge fits NVIDIA X in no format: as Q2_K the weights need 4.7 GiB")
    assert "are missing" in found.why and found.why.endswith("use device cpu") and "\n" not in found.why
    assert all(row.refused and row.alone is None for row in found.rows)


def test_where_weights_fit_but_no_request_does_less_context_is_asked_for() -> None:
    assert advice(8.8).why == (
        "beside judge there is no room for a request of 4,096 tokens on NVIDIA X: lower --context"
    )
    assert advice(8.8, context=512).advised is not None


def test_a_quantized_model_is_shown_packed_and_unpacked() -> None:
    found = advice(24, quantization="GPTQ int4 g128 act-order")
    packed, unpacked = (row for row in found.rows if row.is_file)
    assert (packed.name, packed.kept) == (unpacked.name, "packed") == (INT4, "packed")
    plain = rows_of(found)["bf16"]
    assert unpacked.unpacked
    assert (unpacked.weight_bytes, unpacked.requests) == (plain.weight_bytes, plain.requests)
    assert found.how == (
        f"judge is {INT4}, from which nothing finer can be made: fetch it as Q8_0. "
        'Keep it packed: weights = "packed" in ragate.toml.'
    )
    assert "ragate models quantize judge Q8_0.gguf --method gguf --type Q8_0" in advice(24).how
    assert advice(80).how == "judge has this format."


def test_a_format_of_unknown_quality_has_its_rows_and_is_not_advised() -> None:
    tensors = {"layers.0.q": Joined({}, lambda parts: torch.empty(0), Form(1 + 3 / 32, 8, 32, True))}
    checkpoint = Checkpoint(Path("made"), LLAMA_8B, None, tensors, "GPTQ int8 g32", files=())
    card = Card("NVIDIA X", (9, 0), 24 * GIB, 24 * GIB)
    found = advice_on("judge", checkpoint, Machine(card, card.total, card.free, 16, H200), 4096)
    assert [row.kept for row in found.rows if row.name == "GPTQ int8 g32"] == ["packed", "bf16"]
    assert found.rows[-1].loss is None and found.advised == "Q8_0"


def test_on_a_cpu_every_format_takes_float32_and_the_memory_decides() -> None:
    checkpoint = Checkpoint(Path("made"), LLAMA_8B, None, {}, "bfloat16", files=())
    cpu = Machine(None, 64 * GIB, 60 * GIB, 8, Ceilings(1e12, 50e9, "made up"))
    found = advice_on("judge", checkpoint, cpu, 4096)
    rows = rows_of(found)
    assert rows["bf16"].weight_bytes == 4 * 8_030_261_248
    # codes of a byte, and a float32 scale and offset for every 32 of them, in place of four bytes
    table = 128256 * 4096
    assert rows["Q4_K_M"].weight_bytes == 4 * (8_030_261_248 - table) + table + table // 32 * 8
    assert {row.kv_bytes for row in rows.values()} == {GIB} and found.kv_gib == 16
    assert found.advised == "bf16" and rows["bf16"].requests == 16
    assert rows["bf16"].requests_fp8 is None
    alone, moved = rows["bf16"].alone, 4 * (8_030_261_248 - table) + 4097 * 2 * 32 * 8 * 128 * 4
    assert alone is not None and alone.expected is None
    assert alone.limit == pytest.approx(50e9 / moved)
    small = replace(cpu, total=32 * GIB, free=30 * GIB)
    none = advice_on("judge", checkpoint, small, 4096)
    assert none.advised is None
    assert none.why.startswith("judge fits the CPU, 8 cores in no format") and "smaller model" in none.why


# ---- how fast it is ----


def test_decoding_8b_alone_worked_out_by_hand() -> None:
    read = 2 * (8_030_261_248 - 128256 * 4096)
    kv = 2 * 32 * 8 * 128 * 2
    seconds = (read + kv * 4096 + kv) / 4200e9
    speed = rows_of(advice(80))["bf16"].alone
    assert speed is not None
    assert speed.limit == pytest.approx(1 / seconds) and speed.limit == pytest.approx(270, abs=1)
    assert speed.expected == pytest.approx(0.785 * speed.limit)
    packed = rows_of(advice(80))["Q4_0"].alone
    assert packed is not None and packed.expected is None and packed.limit > 3 * speed.limit


def test_many_requests_with_short_contexts_are_bound_by_arithmetic() -> None:
    row = rows_of(advice(80, context=16))["bf16"]
    assert row.requests == 1024 and row.together is not None
    per_token = 2 * (8_030_261_248 - 128256 * 4096 - 65 * 4096) + 4 * 32 * 4096 * 16
    assert row.together.limit == pytest.approx(737e12 / per_token)


def test_layers_that_slide_read_no_more_than_their_window() -> None:
    sliding = replace(LLAMA_8B, window=512, window_layers=(True,) * 24 + (False,) * 8)
    there, full = (rows_of(advice(80, config=c))["bf16"].alone for c in (sliding, LLAMA_8B))
    assert there is not None and full is not None
    kv = 2 * 8 * 128 * 2
    saved = 24 * kv * (4096 - 512) / 4200e9
    assert 1 / full.limit - 1 / there.limit == pytest.approx(saved)


def test_the_share_reached_is_the_measured_one_and_in_between_between() -> None:
    for batch, *models in MEASURED:
        for limit_ms, share in models:
            assert share_reached(batch, limit_ms) == pytest.approx(share)
    assert share_reached(1, 0.001) == 0.107 and share_reached(1, 50) == 0.785
    assert share_reached(4096, 50) == 0.501
    assert 0.107 < share_reached(1, 1.0) < 0.785
    middle = math.sqrt(0.065 * 3.591)
    assert share_reached(1, middle) == pytest.approx((0.107 + 0.785) / 2)


@pytest.mark.parametrize(("model", "place"), [("135m", 0), ("8b", 1)])
def test_the_shares_are_those_of_the_stored_results(model: str, place: int) -> None:
    found = json.loads((BENCH / f"engine-h200-{model}.json").read_text())
    steps = found["sizes"]["decode_out"] - 1
    for batch, *models in MEASURED:
        point = found["decode"][str(batch)]
        limit_ms, share = models[place]
        assert share == pytest.approx(point["of_limit"], abs=5e-4)
        assert limit_ms == pytest.approx(point["limit_s"] / steps * 1e3, abs=5e-4)


# ---- rates ----


@pytest.mark.parametrize(
    ("name", "bandwidth", "flops"),
    [
        ("NVIDIA H200", 4800, 989.5),
        ("NVIDIA A100-PCIE-40GB", 1555, 312),
        ("NVIDIA A10", 600, 125),
        ("NVIDIA GeForce RTX 4090", 1008, 165.2),
    ],
)
def test_a_known_card_has_the_rates_of_its_data_sheet(name: str, bandwidth: float, flops: float) -> None:
    found = rates.of_card(name, torch.device("cuda"))
    assert found.bytes == pytest.approx(bandwidth * 1e9 * rates.REACHED[0])
    assert found.flops == pytest.approx(flops * 1e12 * rates.REACHED[1])
    assert found.origin.startswith("data sheet")


def test_what_a_card_reaches_of_its_data_sheet_is_what_was_measured() -> None:
    limits = json.loads((BENCH / "limits-h200.json").read_text())["limits"]
    bandwidth, flops = rates.CARDS["NVIDIA H200"]
    assert rates.REACHED[0] == pytest.approx(limits["copy_GBps"] / bandwidth, abs=1e-3)
    assert rates.REACHED[1] == pytest.approx(limits["matmul_TFLOPs"] / flops, abs=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA A10G",
        "NVIDIA T1000",
    ],
)
def test_another_card_is_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Ceilings(1.0, 1.0, "measured")
    monkeypatch.setattr(rates, "_measured_card", lambda device: measured)
    assert rates.of_card(name, torch.device("cuda")) is measured


def test_a_card_is_measured_by_a_product_and_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[bool] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    monkeypatch.setattr(rates, "SIDE", 64)
    monkeypatch.setattr(rates, "MOVED_BYTES", 1 << 16)
    monkeypatch.setattr(rates, "SECONDS", 0.0)
    monkeypatch.setattr(rates, "seconds_of", lambda work, wait: (work(), wait(), 0.5)[-1])
    found = rates._measured_card(torch.device("cpu"))
    assert (found.flops, found.bytes) == (2 * 64**3 / 0.5, 2 * (1 << 16) / 0.5)
    assert found.origin.startswith("measured") and len(waited) == 2


def test_a_cpu_is_measured_by_the_kernels_that_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "MOVED_BYTES", 1 << 20)
    monkeypatch.setattr(rates, "seconds_of", lambda work: (work(), 0.5)[-1])
    found = rates.of_cpu(2)
    assert (found.bytes, found.flops) == ((1 << 20) / 0.5, 2 * 64 * 1024**2 / 0.5)
    assert found.origin.startswith("measured on 2 threads")


def test_the_least_of_several_times_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 4.0, 4.0, 5.0, 7.0, 7.0, 20.0, 29.0, 30.0])
    monkeypatch.setattr(rates.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(rates, "SECONDS", 10.0)
    done: list[bool] = []
    assert rates.seconds_of(lambda: done.append(True)) == 2.0
    assert len(done) == 4  # the first is not counted


# ---- the command ----


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "of_cpu", lambda threads: Ceilings(1e12, 50e9, "measured on 2 threads"))


def test_json_has_every_row_of_a_file_of_which_only_the_header_is_read(
    tiny: Path, cpu: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "load", lambda self, name: pytest.fail("a tensor was read"))
    assert run(["models", "advise", "tiny.gguf", "--device", "cpu", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["context"], found["kv_gib"]) == ("tiny.gguf", 128, 2)
    own = next(row for row in found["rows"] if row["is_file"])
    assert own["kept"] == "float32" and own["file_bytes"] == tiny.stat().st_size
    assert own["kv_bytes"] == 2 * 2 * 2 * 16 * 128 * 4
    assert own["requests"] == 64 and own["alone"]["limit"] > 0 and own["alone"]["expected"] is None
    assert found["advised"] == "bf16" and found["rates"] == "measured on 2 threads"


def test_the_table_marks_the_model_and_the_advice(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(devices, "pick_device", lambda wanted: torch.device("cuda"))
    monkeypatch.setattr(devices, "card", lambda: Card("NVIDIA H200", (9, 0), 140 * GIB, 139 * GIB))
    write_safetensors(TINY, Path("folder"))
    assert run(["models", "advise", "folder", "--context", "1024"]) == 0
    said = capsys.readouterr().out
    assert "→ bf16 *" in said and "  Q4_K_M " in said and "folder has this format." in said
    assert "139.0 GiB of 140.0 GiB free" in said and "data sheet, 4,800 GB/s" in said
    assert run(["models", "advise", "tiny.gguf"]) == 0
    assert "… as bf16 *" in capsys.readouterr().out


@pytest.mark.parametrize("config", [LLAMA_8B, SMOL_135M], ids=["8b", "135m"])
@pytest.mark.parametrize("quantization", ["bfloat16", "Q4_K_M"])
def test_the_table_fits_a_terminal_of_80_columns(config: ModelConfig, quantization: str) -> None:
    screen = Console(width=80, record=True, soft_wrap=True, file=io.StringIO())
    print_advice(screen, advice(141, config=config, quantization=quantization))
    lines = [line for line in screen.export_text().splitlines() if line.strip()]
    assert max(map(len, lines)) <= 80
    assert all("…" not in line or "… as bf16" in line for line in lines)


def test_a_context_that_the_model_does_not_read_is_refused(
    tiny: Path, cpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["models", "advise", "tiny.gguf", "--context", "129"]) == 4
    assert capsys.readouterr().err == (
        "error: tiny.gguf reads 1 to 128 tokens and --context is 129: ask for less\n"
    )


def test_without_a_card_the_cpu_is_taken_or_the_lack_is_told(
    tiny: Path, cpu: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(["models", "advise", "tiny.gguf"]) == 0
    assert "the CPU, " in capsys.readouterr().out
    assert run(["models", "advise", "tiny.gguf", "--device", "cuda"]) == 4
    assert "use device cpu or auto" in capsys.readouterr().err
    assert run(["models", "advise", "missing.gguf"]) == 4
    assert "no such file" in capsys.readouterr().err


def test_memory_is_what_the_machine_or_its_container_can_give(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    2048 kB\n"}
    monkeypatch.setattr(advise, "_text", lambda path: files.get(path, ""))
    monkeypatch.setattr(advise.os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 1024)
    assert advise._memory() == (4 << 20, 2 << 20)
    files["/sys/fs/cgroup/memory.max"] = f"{1 << 20}\n"
    assert advise._memory() == (1 << 20, 1 << 20)
    files.clear()
    assert advise._memory() == (4 << 20, 4 << 20)
