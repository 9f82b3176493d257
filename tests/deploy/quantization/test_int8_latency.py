"""Tests of latency measurements and of the processor's int8 extensions."""

import pytest
import torch

from deit.core import hardware
from deit.deploy import latency
from deit.deploy.export_formats import onnx_inference_fn

pytest.importorskip("sklearn")
pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize(
    ("flags", "machine", "expected"),
    [
        ("avx2 avx512f avx512_vnni", "x86_64", False),
        ("avx2 avx_vnni", "x86_64", False),
        ("avx512f amx_int8", "AMD64", False),
        ("avx2", "x86_64", True),
        ("avx2 avx512f", "x86_64", True),
        ("", "AMD64", True),
        ("asimddp", "aarch64", False),
        ("", "arm64", False),
    ],
)
def test_saturates_on_x86_without_vnni(flags, machine, expected):
    assert hardware.int8_sums_saturate(tuple(flags.split()), machine) == expected


def test_int8_flags_are_read_from_cpuinfo(tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(hardware, "_CPUINFO", cpuinfo)
    assert hardware.int8_flags() == ()
    cpuinfo.write_text("model name\t: A CPU\nflags\t\t: fpu avx2 avx512_vnni_x avx_vnni\n")
    assert hardware.int8_flags() == ("avx2", "avx_vnni")
    assert hardware.cpu_name().startswith("A CPU, ")
    cpuinfo.write_text("BogoMIPS\t: 50\nFeatures\t: fp asimd asimddp i8mm\n")
    assert hardware.int8_flags() == ("asimddp", "i8mm")


def test_onnx_inference_fn_threads_are_set_and_do_not_spin(micro, monkeypatch):
    used_options, session = [], onnxruntime.InferenceSession

    def recording_session(path, options, **others):
        used_options.append(options)
        return session(path, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", recording_session)
    onnx_inference_fn(micro[0], threads=2)
    assert used_options[0].intra_op_num_threads == 2
    assert used_options[0].get_session_config_entry("session.force_spinning_stop") == "1"


def test_latencies_networks_are_interleaved(monkeypatch):
    now, called = [0.0], []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])

    def network(name, milliseconds):
        def call(images):
            called.append(name)
            now[0] += next(milliseconds) / 1000

        return call

    slow = iter([5.0, 10.0] * 20)  # every second call is timed
    fast = iter([9.0, 1.0] * 19 + [9.0, 3.0])
    measured = latency.latencies(
        {"slow": network("slow", slow), "fast": network("fast", fast)},
        torch.zeros(1),
        seconds=0.49,
    )
    assert measured["slow"] == pytest.approx((10, 10, 10, 20))
    assert measured["fast"] == pytest.approx((1, 1, 1, 20))
    assert called[:8] == ["slow", "slow", "fast", "fast", "fast", "fast", "slow", "slow"]


def test_latencies_slow_network_has_ten_turns_without_warm_up(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])

    def network(images):
        calls.append(len(calls))
        now[0] += (100 + len(calls)) / 1000

    measured = latency.latencies({"one": network}, torch.zeros(1), seconds=0)["one"]
    assert measured.turns == 10
    assert len(calls) == 11  # the first turn has a warm-up call
    assert measured.median_ms == pytest.approx(106.5)
    assert measured.p10_ms == pytest.approx(102.9)
    assert measured.p90_ms == pytest.approx(110.1)
