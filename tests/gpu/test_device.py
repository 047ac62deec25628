import pytest
import torch

from shared.engine.device import find_device
from shared.errors import SettingsInvalid


def refusal(name: str) -> str:
    with pytest.raises(SettingsInvalid) as refused:
        find_device(name)
    assert f"PDSERVE_DEVICE={name!r}" in str(refused.value)
    return str(refused.value)


def test_the_cpu_is_always_there() -> None:
    assert find_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "mps"])
def test_no_name_of_a_device(name: str) -> None:
    assert "cuda:N" in refusal(name)


def test_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    assert "built without CUDA" in refusal("cuda")


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "no NVIDIA GPU" in refusal("cuda:0")


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("shared.engine.device.find_spec", lambda _: None)
    assert "Triton is not installed" in refusal("cuda")
    monkeypatch.setattr("shared.engine.device.find_spec", lambda _: "there")
    assert find_device("cuda") == torch.device("cuda", 0)
    assert find_device("cuda:1") == torch.device("cuda", 1)
    assert "2 GPUs" in refusal("cuda:2")
