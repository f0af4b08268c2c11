"""`ragate doctor` on a machine with a card: the card, its kernels, and what the judge has room for."""

from __future__ import annotations

from pathlib import Path

import pytest

from ragate import doctor
from ragate.catalog import JudgeChoice
from ragate.config import Settings, load_settings
from ragate_engine import DeviceError, devices

GIB = 1 << 30


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "engine"))
    from tiny_gguf import write_tiny

    write_tiny(tmp_path / "judge.gguf")
    return load_settings({"judge": str(tmp_path / "judge.gguf"), "max_batch": 16}, tmp_path)


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    import torch

    monkeypatch.setattr(devices, "why_no_card", lambda: None)
    monkeypatch.setattr(devices, "card", lambda: devices.Card("NVIDIA H200", (9, 0), 140 * GIB, 138 * GIB))
    monkeypatch.setattr(devices, "pick_device", lambda wanted: torch.device("cuda"))
    monkeypatch.setattr(doctor, "_driver", lambda: "580.159.04")
    monkeypatch.setattr(doctor, "_tried", lambda choice, device, weights: "triton-3, all compiled")
    return monkeypatch


def lines(settings: Settings) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in doctor.findings(settings):
        name = line[:12].strip() or "more"
        found[name] = found.get(name, "") + line[12:]
    return found


def test_a_card_is_described_with_its_kernels_and_the_room_for_requests(settings: Settings, h200) -> None:
    said = lines(settings)
    assert said["card"] == "NVIDIA H200, compute capability 9.0, 138.0 of 140.0 GiB free, driver 580.159.04"
    assert said["kernels"].endswith(": triton-3, all compiled")
    assert said["kernels"].startswith("Triton ")
    # a window of 128 tokens is 8 blocks, and 16 requests use no more than 128
    assert "128 KV blocks of 16 tokens: room for 1 requests of 2,000 tokens at once" in said["more"]


def test_kernels_that_fell_back_are_named(settings: Settings, h200) -> None:
    h200.setattr(doctor, "_tried", lambda choice, device, weights: "triton-3 (attention: reference)")
    assert lines(settings)["kernels"].endswith(": triton-3 (attention: reference)")

    def breaks(choice: JudgeChoice | None, device: str, weights: str) -> str:
        raise OSError("no such\ncompiler")

    h200.setattr(doctor, "_tried", breaks)
    assert lines(settings)["kernels"] == "they do not run here: OSError: no such compiler"


def test_a_judge_that_does_not_fit_the_card_is_told_before_any_run(settings: Settings, h200) -> None:
    h200.setattr(devices, "card", lambda: devices.Card("NVIDIA X", (8, 6), 2 * GIB, GIB // 4))
    said = lines(settings)["more"]
    assert "it does not fit: the weights need 0.0 GiB" in said
    assert "0.2 GiB are free on NVIDIA X" in said
    assert said.endswith("judge.gguf` shows what would)") and "(`ragate models advise " in said


def test_a_card_that_does_not_answer_is_told(settings: Settings, h200) -> None:
    def gone() -> devices.Card:
        raise DeviceError("the NVIDIA card does not answer (CUDA error: ECC): use device cpu")

    h200.setattr(devices, "card", gone)
    assert lines(settings)["card"].startswith("the NVIDIA card does not answer")


def test_kernels_are_tried_with_a_made_up_layer_of_the_judge(settings: Settings) -> None:
    choice = JudgeChoice(None, Path(settings.judge), None, False)
    for tried in (choice, None):
        said = doctor._tried(tried, "cpu")
        assert said.endswith(", all compiled") and said.startswith(("cpu-", "reference-"))
