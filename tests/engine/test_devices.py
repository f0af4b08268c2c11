"""Cards that are missing, too old, broken or lost: one sentence each, and `auto` goes on with the CPU."""

from __future__ import annotations

import warnings

import pytest
import torch

from ragate_engine import DeviceError, OutOfMemoryError
from ragate_engine.devices import card, failure, is_lost, pick_device, wake, why_no_card

CPU = torch.device("cpu")


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a card; change what it says of itself with the fixture."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100, 150))
    return monkeypatch


def refusal() -> str:
    assert pick_device("auto") == pick_device("cpu") == CPU
    with pytest.raises(DeviceError) as caught:
        pick_device("cuda")
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(": use device cpu or auto")
    return text


def test_a_new_enough_card_is_used(h200) -> None:
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert pick_device("cpu") == CPU
    assert why_no_card() is None
    found = card()
    assert (found.name, found.capability, found.total, found.free) == ("NVIDIA H200", (9, 0), 150, 100)


@pytest.mark.parametrize(
    ("capability", "old"), [((7, 5), True), ((7, 0), True), ((8, 0), False), ((12, 0), False)]
)
def test_a_card_older_than_ampere_is_refused(h200, capability, old) -> None:
    h200.setattr(torch.cuda, "get_device_capability", lambda: capability)
    h200.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    if old:
        said = f"Tesla T4 has compute capability {capability[0]}.{capability[1]} and this engine needs 8.0"
        assert refusal().startswith(said)
    else:
        assert pick_device("auto").type == "cuda"


def test_a_machine_without_a_card_says_why(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert refusal().startswith("no NVIDIA card is usable here (torch.cuda.is_available() is false)")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this torch is built without CUDA" in refusal()


def test_what_torch_warns_of_is_told_in_the_sentence_and_not_printed(monkeypatch) -> None:
    def too_old() -> bool:
        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update "
            "your GPU driver\nby downloading it",
            stacklevel=1,
        )
        return False

    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "driver on your system is too old (found version 11040)): use" in refusal()


def test_a_card_that_does_not_answer_is_no_card(h200) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be")

    h200.setattr(torch.cuda, "get_device_capability", broken)
    said = "the NVIDIA card does not answer (CUDA error: uncorrectable ECC error encountered)"
    assert refusal().startswith(said)
    h200.setattr(torch.cuda, "mem_get_info", broken)
    with pytest.raises(DeviceError, match="does not answer"):
        card()


def test_a_card_of_another_make_is_not_taken_for_nvidias(h200) -> None:
    h200.setattr(torch.version, "hip", "6.2")
    assert "not NVIDIA's" in refusal()


def lost_errors() -> list[RuntimeError]:
    return [
        RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be"),
        RuntimeError("Triton Error [CUDA]: unspecified launch failure"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        *([torch.AcceleratorError("the device is gone")] if hasattr(torch, "AcceleratorError") else []),
    ]


@pytest.mark.parametrize("error", lost_errors(), ids=str)
def test_a_lost_card_is_told_in_one_sentence(error: RuntimeError) -> None:
    said = failure(error, "NVIDIA H200")
    assert isinstance(said, DeviceError)
    assert str(said) == f"NVIDIA H200 was lost in mid-run ({str(error).splitlines()[0]})"


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("CUDA error: out of memory")],
    ids=str,
)
def test_a_card_that_others_filled_in_mid_run_is_not_called_lost(error: RuntimeError) -> None:
    said = failure(error, "NVIDIA H200")
    assert isinstance(said, DeviceError)
    assert str(said).startswith("NVIDIA H200 ran out of memory in mid-run: end what else uses it")


def test_other_failures_keep_their_own_words() -> None:
    ours = OutOfMemoryError("no memory")
    assert failure(ours) is ours
    assert str(failure(ValueError("a shape"))) == "the engine stopped: ValueError: a shape"
    assert not is_lost(ValueError("CUDA error: said by another"))
    assert not is_lost(RuntimeError("shapes do not fit"))


def test_waking_a_card_fails_in_silence_and_a_cpu_needs_none(monkeypatch) -> None:
    ended: list[object] = []
    monkeypatch.setattr("threading.excepthook", ended.append)
    wake(CPU)
    if not torch.cuda.is_available():
        from ragate_engine import devices

        devices._touch(torch.device("cuda"))
    assert ended == []
