"""The doctor: what it reads, what it concludes, and that it says what to do."""

import json
import os

import pytest

from rt_neds import cli, doctor


def write(root, name, text):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text + "\n")


CLOCK = "devices/system/clocksource/clocksource0/current_clocksource"


def test_a_slow_clock_source_is_named_and_a_steady_one_is_not(tmp_path):
    assert doctor.clock_source(tmp_path).found == doctor.NOT_TOLD
    write(tmp_path, CLOCK, "tsc")
    assert doctor.clock_source(tmp_path).good
    write(tmp_path, CLOCK, "hpet")
    finding = doctor.clock_source(tmp_path)
    assert not finding.good
    assert "clocksource=tsc" in finding.do


def test_every_core_must_be_at_its_full_speed(tmp_path):
    assert doctor.governor(tmp_path).found == doctor.NOT_TOLD
    for core in range(2):
        write(tmp_path, f"devices/system/cpu/cpu{core}/cpufreq/scaling_governor", "performance")
    assert doctor.governor(tmp_path).good
    write(tmp_path, "devices/system/cpu/cpu1/cpufreq/scaling_governor", "powersave")
    finding = doctor.governor(tmp_path)
    assert not finding.good
    assert finding.found == "performance, powersave"


def test_no_core_may_sleep_so_deep_that_waking_takes_long(tmp_path):
    device = tmp_path / "cpu_dma_latency"

    def found():
        return doctor.idle_states(tmp_path, device, tmp_path)

    assert found().found == doctor.NOT_TOLD
    states = {"cpu0": [("POLL", 0, 0), ("C1", 2, 0), ("C6", 133, 1)], "cpu1": [("C1E", 20, 0)]}

    def write_states():
        for core, of in states.items():
            for n, (name, latency, disabled) in enumerate(of):
                state = f"devices/system/cpu/{core}/cpuidle/state{n}"
                for file, value in (("name", name), ("latency", latency), ("disable", disabled)):
                    write(tmp_path, f"{state}/{file}", str(value))

    write_states()
    finding = found()
    assert finding.good
    assert finding.found == "C1E is the deepest, 20 us to wake from"
    write(tmp_path, "cpuinfo", "flags : fpu hypervisor sse")
    assert not found().good  # whatever is told
    write(tmp_path, "cpuinfo", "flags : fpu sse")
    states["cpu0"][2] = ("C6", 133, 0)
    write_states()
    finding = found()
    assert not finding.good
    assert "C6" in finding.found
    assert 'KERNEL=="cpu_dma_latency", OWNER=' in finding.do
    device.write_bytes(b"")
    finding = found()
    assert finding.good
    assert finding.found == "C6 is the deepest, 133 us to wake from; serve keeps cores from it"


@pytest.mark.parametrize(("load", "good"), [(0.5, True), (3.5, False), (None, True)])
def test_a_loaded_machine_is_said_to_be(tmp_path, load, good):
    about = {"cpu": "x", "cores": 4, "load": None if load is None else [load, 0, 0]}
    findings = list(doctor.processor(about, tmp_path))
    assert [finding.good for finding in findings] == [good]
    write(tmp_path, "cpuinfo", "flags : fpu hypervisor sse")
    assert [f.what for f in doctor.processor(about, tmp_path)] == ["processor", "virtual machine"]
    ticks = os.sysconf("SC_CLK_TCK")  # a second
    write(tmp_path, "stat", f"cpu 1 2 3 4 5 6 7 {ticks} 9 0")
    write(tmp_path, "uptime", "50.0 20.1")  # of four cores
    told = list(doctor.processor(about, tmp_path))[1].found
    assert told == "yes; its host took 0.5% of the processor time"


def test_a_bin_holds_if_waking_up_and_decoding_leave_half_of_it():
    late, step = {"p99": 500.0}, {"paced": {"p99": 2_000.0}}
    holds = {w["bin_ms"]: w["holds"] for w in doctor.widths(late, step, 4.9)}
    assert holds == {1: False, 2: False, 4.9: False, 5: True, 10: True, 20: True, 50: True}


def test_a_bundle_that_does_not_hold_is_said_to():
    step = {"hot": {"p50": 1.0}, "paced": {"p50": 2.0, "p99": 3_000.0}}
    held = doctor.widths({"p99": 100.0}, step, 5.0)
    measured, width = doctor.decoding(step, held, 5.0)
    assert measured.good
    assert not width.good
    assert "from 10 ms on" in width.found
    assert width.do
    none_held = [{**w, "holds": False} for w in held]
    assert "holds none" in list(doctor.decoding(step, none_held, 5.0))[1].found


def test_a_timer_that_wakes_late_is_said_to():
    assert doctor.timer({"p50": 50.0, "p99": 900.0, "max": 9e3}).good
    assert not doctor.timer({"p50": 50.0, "p99": 1_100.0, "max": 9e3}).good


def test_by_command_with_a_bundle(tiny, capsys):
    bundle = str(tiny[1] / "bundle")
    assert cli.main(["doctor", "--bundle", bundle, "--seconds", "0.3", "--json", "-"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert set(result) == {"machine", "timer_us", "step_us", "bins", "findings"}
    whats = {finding["what"] for finding in result["findings"]}
    assert whats >= {"processor", "GPU", "clock source", "timer", "step", "bin width"}
    assert all(finding["good"] or finding["do"] for finding in result["findings"])
    assert 0 < result["step_us"]["hot"]["p50"] < 1e5
    assert result["timer_us"]["p50"] <= result["timer_us"]["p99"] <= result["timer_us"]["max"]
    for finding in result["findings"]:
        if not finding["good"]:
            assert f"{finding['what']}: {finding['do']}" in captured.err
    assert cli.main(["doctor", "--bundle", "nowhere"]) == 2
    told = capsys.readouterr()
    assert "measuring" not in told.out + told.err
    assert cli.main(["doctor", "--seconds", "0"]) == 2
