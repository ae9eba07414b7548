"""Device: precision and images per pass for the machines that a run may land on, without having them."""

from __future__ import annotations

import re
import subprocess
from types import SimpleNamespace

import pytest
import torch

from src import device
from src.device import choose_device


def pretend(monkeypatch, name: str, gigabytes: float, native_bf16: bool) -> None:
    """Make torch report one CUDA device. As torch does, bf16 counts as supported where it is emulated."""
    properties = SimpleNamespace(name=name, total_memory=int(gigabytes * 1e9))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: native_bf16 or including_emulation
    )


def test_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = choose_device(96, 128)
    assert (chosen.torch_device.type, chosen.precision) == ("cpu", "no")
    assert 1 <= chosen.micro_batch <= 128 and "CPU" in chosen.name
    assert choose_device(96, 4).micro_batch == 4


@pytest.mark.parametrize(
    ("name", "gigabytes", "native", "precision"), [("T4", 15.8, False, "fp16"), ("A100", 42.5, True, "bf16")]
)
def test_precision_is_what_the_gpu_computes_natively(monkeypatch, name, gigabytes, native, precision):
    pretend(monkeypatch, name, gigabytes, native)
    chosen = choose_device(224, 128)
    assert (chosen.torch_device.type, chosen.precision, chosen.name) == ("cuda", precision, name)
    assert chosen.micro_batch == 128 and chosen.eval_batch >= chosen.micro_batch


def test_micro_batch_shrinks_with_memory_and_image_size_and_stays_in_the_batch(monkeypatch):
    pretend(monkeypatch, "small", 4, False)
    sizes = [choose_device(size, 128).micro_batch for size in (64, 224, 384, 1024)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 128 > sizes[1] > sizes[2]
    assert all(size & (size - 1) == 0 and size >= 8 for size in sizes)
    pretend(monkeypatch, "large", 140, True)
    assert choose_device(224, 48).micro_batch == 48


@pytest.mark.parametrize(
    ("asked", "batch_size", "got"), [(0, 128, 64), (7, 128, 7), (100, 128, 100), (100, 48, 48)]
)
def test_images_per_pass_can_be_set_on_the_cpu(monkeypatch, asked, batch_size, got):
    """At most the batch, and no others than those asked for; prediction takes no notice."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = choose_device(96, batch_size, asked)
    assert (chosen.micro_batch, chosen.eval_batch) == (got, 128)
    if asked == 0:
        assert chosen == choose_device(96, batch_size)


@pytest.mark.parametrize(("asked", "got"), [(0, 32), (4, 4), (50, 50), (500, 128)])
def test_images_per_pass_can_be_set_on_a_gpu(monkeypatch, asked, got):
    """Also to more than are thought to fit: who asks knows better."""
    pretend(monkeypatch, "small", 4, False)
    chosen = choose_device(224, 128, asked)
    assert chosen.micro_batch == got and chosen.eval_batch == choose_device(224, 128).eval_batch


def test_memory_is_in_gigabytes():
    tensor = torch.ones(25_000_000)
    peak = device.peak_memory_gb(torch.device("cpu"))
    assert 0.1 < peak < 200 and len(tensor)


def test_what_is_recorded():
    versions = device.versions()
    assert versions["torch"] == torch.__version__.split("+")[0] or versions["torch"] == torch.__version__
    assert {"python", "timm", "torchvision", "accelerate", "numpy"} <= set(versions)
    assert device.git_commit()


def test_the_commit_is_dirty_where_the_code_differs_and_not_where_results_do(tmp_path, monkeypatch):
    """A run writes results; the next one is of the same commit."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "device.py").write_text("")
    (tmp_path / "metrics.json").write_text("{}")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    monkeypatch.setattr(device, "__file__", str(tmp_path / "src" / "device.py"))
    commit = device.git_commit()
    assert re.fullmatch("[0-9a-f]{12}", commit)
    (tmp_path / "metrics.json").write_text("changed")
    assert device.git_commit() == commit
    (tmp_path / "src" / "device.py").write_text("changed")
    assert device.git_commit() == f"{commit}-dirty"


def test_no_checkout_is_no_failure(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(device.subprocess, "run", missing)
    assert device.git_commit() == "unknown"
    monkeypatch.setattr(device.ctypes, "CDLL", missing)
    device.keep_freed_memory()
