"""Which machines add products of 8-bit integers exactly, by each of the places where that can be read."""

import platform
import subprocess

import pytest
import torch

from daqconvert.deploy.onnx import hardware
from daqconvert.deploy.onnx.hardware import exact_int8, features, may_saturate

CPUINFO = "processor\t: 0\nmodel name\t: X\nflags\t\t: fpu avx2 {}\nbugs\t\t: avx512_vnni\n"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Make this an x86 machine of which nothing is known; returns what gives it a source."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(platform, "system", lambda: "Nothing")
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")

    def give(source, words):
        if source == "torch":
            monkeypatch.setattr(
                torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_int8": False, "l2": 1}
                | dict.fromkeys(words, True), raising=False,
            )  # fmt: skip
        elif source == "cpuinfo":
            (tmp_path / "cpuinfo").write_text(CPUINFO.format(" ".join(words)))
        else:
            monkeypatch.setattr(platform, "system", lambda: "Darwin")
            said = "FPU SSE4.2\nAVX2 " + " ".join(word.upper().replace("_", "") for word in words)
            monkeypatch.setattr(
                subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, said, "")
            )

    return give


@pytest.mark.parametrize("source", ["torch", "cpuinfo", "sysctl"])
@pytest.mark.parametrize(
    ("words", "exact"),
    [((), False), (("avx512_vnni",), True), (("avx_vnni",), True), (("amx_int8",), True), (("avx512_bf16",), False)],
    ids=str,
)
def test_x86(machine, source, words, exact):
    machine(source, words)
    assert exact_int8() is exact
    assert "avx2" in features()


def test_what_cannot_be_found_out_is_none(machine, monkeypatch):
    assert exact_int8() is None
    hardware.CPUINFO.write_text("processor: 0\n")
    assert exact_int8() is None

    def fails(command, **_):
        raise FileNotFoundError(command[0])

    machine("sysctl", ())
    hardware.CPUINFO.unlink()
    monkeypatch.setattr(subprocess, "run", fails)
    assert exact_int8() is None


@pytest.mark.parametrize(("name", "exact"), [("arm64", True), ("aarch64", True), ("AMD64", False), ("riscv64", None)])
def test_other_machines(machine, monkeypatch, name, exact):
    machine("torch", ())
    monkeypatch.setattr(platform, "machine", lambda: name)
    assert exact_int8() is exact


def test_this_machine_says_the_same_twice(monkeypatch):
    """torch and the kernel are asked about one processor."""
    if not (hasattr(torch.cpu, "get_capabilities") and hardware.CPUINFO.is_file()):
        pytest.skip("only one source here")
    first = exact_int8()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert exact_int8() is first


@pytest.mark.parametrize(
    ("inputs", "weights", "saturates"),
    [(255, 64, False), (255, 65, True), (129, 127, False), (130, 127, True), (15, 127, False)],
)
def test_products_beyond_16_bits(inputs, weights, saturates):
    assert may_saturate(inputs, weights) is saturates
