"""`ldm2 doctor`: what it finds, and what it does when a kernel is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import ldm2_kernels
import pytest
import torch
from ldm2_kernels import cpu

import ldm2
from ldm2 import ops
from ldm2.cli.commands import main
from ldm2.cli.doctor import lines
from ldm2.runtime import doctor
from ldm2.runtime.profiling import Limits

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    """Nothing is measured or asked."""
    monkeypatch.setattr(doctor.profiling, "limits", lambda *_, **__: Limits(1.5e11, 2.5e10))
    monkeypatch.setattr(doctor, "_answer", lambda: "answers")


@pytest.fixture
def kernels(monkeypatch):
    """kernels(name=function, ...) are those that are loaded for the CPU; the table has these operations alone."""
    def become(**functions):
        monkeypatch.setitem(ldm2_kernels.MODULES, "cpu", dict.fromkeys(functions, "somewhere"))
        monkeypatch.setattr(ldm2_kernels, "load", lambda device_type: functions)

    return become


def test_the_table_says_why_where_there_is_no_kernel():
    for device, modules in ldm2_kernels.MODULES.items():
        assert {name for name, module in modules.items() if module is None} == ldm2_kernels.REASONS[device].keys()


def test_a_kernel_that_agrees_is_told_with_its_share_of_the_rule(kernels):
    kernels(leaky_relu=ops.leaky_relu.reference)
    [row] = doctor.kernels(CPU)
    assert (row["operation"], row["why"], row["faults"]) == ("leaky_relu", None, {})
    assert 0 <= row["shares"]["float32"] <= 1
    assert row["shares"]["bfloat16"] == pytest.approx(0.5, abs=0.01)         # twice plain PyTorch is allowed


def test_a_kernel_that_differs_raises_or_leaves_a_dtype_alone(kernels):
    def linear(x, weight, bias):
        return NotImplemented if x.dtype == torch.bfloat16 else ops.linear.reference(x, weight, bias) + 1e-3

    def geglu(x, gate):
        raise RuntimeError("no kernel image is available for execution on the device")

    kernels(linear=linear, geglu=geglu)
    first, second = doctor.kernels(CPU)
    assert first["shares"] == dict.fromkeys(("float32", "bfloat16", "int8", "w8a8"))
    assert first["faults"].keys() == {"float32", "int8", "w8a8"}
    assert all("times what the rule allows" in fault for fault in first["faults"].values())
    assert second["faults"]["bfloat16"] == "RuntimeError: no kernel image is available for execution on the device"
    assert len(doctor.faults({"kernels": [first, second]})) == 5


def test_linear_layers_are_tried_with_weights_of_bytes(kernels):
    taken = []

    def linear(x, weight, bias):
        taken.append((x.dtype, type(weight)))
        if isinstance(weight, ops.W8A8):                    # as a kernel that does not round would be
            weight = ops.Int8(*weight)
        return ops.linear.reference(x, weight, bias)

    kernels(linear=linear)
    [row] = doctor.kernels(CPU)
    assert taken[2:] == [(torch.float32, ops.Int8), (torch.float32, ops.W8A8)]
    assert row["shares"]["int8"] <= 1 and "w8a8" in row["faults"]


def test_kernels_that_are_not_built_say_how_to_build_them(monkeypatch):
    monkeypatch.setattr(cpu, "folders", list)
    rows = {row["operation"]: row["why"] for row in doctor.kernels(CPU)}
    assert "python -m ldm2.build_kernels" in rows["conv3x3"]
    assert rows["geglu"] == "part of the linear layer before it"


def test_kernels_that_cannot_be_loaded_say_why(monkeypatch):
    def load(device_type):
        raise OSError("undefined symbol: _ZN2at")

    monkeypatch.setattr(ldm2_kernels, "load", load)
    assert {row["why"] for row in doctor.kernels(CPU) if row["operation"] == "linear"} == {
        "they cannot be loaded: undefined symbol: _ZN2at"
    }


def test_without_the_package_of_kernels_one_row_says_so(monkeypatch):
    monkeypatch.setattr(ops, "ldm2_kernels", None)
    assert [row["why"] for row in doctor.kernels(CPU)] == ["the package ldm2_kernels is not installed"]


def test_json_and_lines_hold_the_same_findings(quick, kernels, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("LDM2_CPU_ISA", "avx2")
    kernels(leaky_relu=ops.leaky_relu.reference)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["ldm2"] == ldm2.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["environment"]["LDM2_CPU_ISA"] == "avx2"
    assert found["machine"]["cores"] >= 1
    assert found["speed"][0] == {"device": "cpu", "dtype": "float32", "flop_rate": 1.5e11, "copy_rate": 2.5e10}
    assert {row["place"] for row in found["disk"]} == {"cache", "current folder", "temporary"}
    assert all(row["free"] > 0 for row in found["disk"])
    text = "\n".join(lines(found))
    for words in (f"ldm2 {ldm2.__version__}", "matrix products 150 GFLOP/s, copies 25.0 GB/s", "LDM2_CPU_ISA=avx2",
                  "hub: https://huggingface.co answers" if "HF_ENDPOINT" not in os.environ else "answers"):
        assert words in text


def test_a_wrong_kernel_ends_in_exit_code_1_and_a_line(quick, kernels, capsys):
    kernels(leaky_relu=lambda x, slope: x)
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert "float32 FAILS: its error is" in out
    assert err.startswith("ldm2: error: the fused leaky_relu on cpu in float32: its error is")
    assert len(err.splitlines()) == 1


def test_a_hub_that_does_not_answer_is_told_and_no_fault():
    code = "from ldm2.runtime import doctor; print(doctor._answer())"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    for settings, words in (({"HF_ENDPOINT": "http://127.0.0.1:9"}, "does not answer ("),
                            ({"HF_HUB_OFFLINE": "1"}, "not asked, HF_HUB_OFFLINE is set")):
        done = subprocess.run([sys.executable, "-c", code], env=clean | settings, capture_output=True, text=True)
        assert done.stdout.startswith(words), done.stderr
