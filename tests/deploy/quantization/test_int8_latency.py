"""Timing of int8 files, and what the processor does with int8 sums."""

import pytest
import torch

from deit.core import hardware
from deit.deploy import latency
from deit.deploy.formats import onnx_inference_fn

pytest.importorskip("sklearn")
pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


# the processor, the clock


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
def test_sums_are_cut_off_on_x86_without_vnni(flags, machine, expected):
    assert hardware.int8_sums_saturate(tuple(flags.split()), machine) == expected


def test_flags_are_read_where_linux_tells_them(tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(hardware, "_CPUINFO", cpuinfo)
    assert hardware.int8_flags() == ()
    cpuinfo.write_text("model name\t: A CPU\nflags\t\t: fpu avx2 avx512_vnni_x avx_vnni\n")
    assert hardware.int8_flags() == ("avx2", "avx_vnni")
    assert hardware.cpu_name().startswith("A CPU, ")
    cpuinfo.write_text("BogoMIPS\t: 50\nFeatures\t: fp asimd asimddp i8mm\n")
    assert hardware.int8_flags() == ("asimddp", "i8mm")


def test_a_timed_session_has_its_threads_and_lets_them_rest(micro, monkeypatch):
    asked, session = [], onnxruntime.InferenceSession

    def watched(path, options, **others):
        asked.append(options)
        return session(path, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    onnx_inference_fn(micro[0], threads=2)
    assert asked[0].intra_op_num_threads == 2
    assert asked[0].get_session_config_entry("session.force_spinning_stop") == "1"


def test_networks_are_timed_in_turns(monkeypatch):
    now, called = [0.0], []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])

    def network(name, milliseconds):
        def call(images):
            called.append(name)
            now[0] += next(milliseconds) / 1000

        return call

    slow = iter([5.0, 10.0] * 20)  # each second call is the one that counts
    fast = iter([9.0, 1.0] * 19 + [9.0, 3.0])
    found = latency.latencies(
        {"slow": network("slow", slow), "fast": network("fast", fast)},
        torch.zeros(1),
        seconds=0.49,
    )
    assert found["slow"] == pytest.approx((10, 10, 10, 20))
    assert found["fast"] == pytest.approx((1, 1, 1, 20))
    assert called[:8] == ["slow", "slow", "fast", "fast", "fast", "fast", "slow", "slow"]


def test_ten_turns_are_made_and_long_calls_need_no_warming(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])

    def network(images):
        calls.append(len(calls))
        now[0] += (100 + len(calls)) / 1000

    found = latency.latencies({"one": network}, torch.zeros(1), seconds=0)
    assert found["one"].turns == 10
    assert len(calls) == 11  # the first turn cannot know
    assert found["one"].median_ms == pytest.approx(106.5)
    assert found["one"].p10_ms == pytest.approx(102.9)
    assert found["one"].p90_ms == pytest.approx(110.1)
