"""Telemetry: lines of tegrastats as boards print them, and power monitors as the kernel shows them."""

from pathlib import Path

import pytest

from edgeprune.deploy.device import system
from edgeprune.deploy.device.power import clocks_locked
from edgeprune.deploy.device.telemetry import Telemetry, clocks, ina3221_mw, parse_tegrastats

NANO = (
    "RAM 330/3964MB (lfb 758x4MB) SWAP 0/1982MB (cached 0MB) CPU [5%@102,0%@102,0%@102,0%@102] EMC_FREQ 0% "
    "GR3D_FREQ 0% PLL@20.5C CPU@23C PMIC@100C GPU@22.5C AO@27C thermal@22.5C POM_5V_IN 933/933 "
    "POM_5V_GPU 0/0 POM_5V_CPU 84/84"
)
XAVIER = (
    "EMC_FREQ 0%@2133 GR3D_FREQ 7%@1377 APE 150 MTS fg 0% bg 0% AO@26.5C GPU@28C GPU 1155/1155 CPU 385/385 "
    "SOC 2502/2502 CV 0/0"
)
ORIN = "GR3D_FREQ 7%@0 GR3D2_FREQ 7%@0 CV0@-256C CPU@41.437C VDD_GPU_SOC 2390mW/2390mW"
ORIN_JETPACK_7 = (
    "07-25-2026 09:08:28 RAM 20642/62817MB (lfb 1x2MB) CPU [23%@2201,off] EMC_FREQ 3%@3199 "
    "GR3D_FREQ 12%@[1300,1300] NVENC0 off cpu@52.968C/52.968C VDD_GPU_SOC 5139mW/5139mW/5139mW"
)
THOR = "GR3D_FREQ @[1000,1000,1000]"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            NANO,
            {
                "ram_used_mib": 330,
                "ram_total_mib": 3964,
                "swap_used_mib": 0,
                "cpu_percent": [5, 0, 0, 0],
                "gpu_percent": 0,
                "emc_percent": 0,
                "temperatures_c": {"pll": 20.5, "cpu": 23, "gpu": 22.5, "ao": 27, "thermal": 22.5},
                "power_mw": {"POM_5V_IN": 933, "POM_5V_GPU": 0, "POM_5V_CPU": 84},
            },
        ),
        (
            XAVIER,
            {
                "gpu_percent": 7,
                "gpu_mhz": [1377],
                "emc_percent": 0,
                "temperatures_c": {"ao": 26.5, "gpu": 28},
                "power_mw": {"GPU": 1155, "CPU": 385, "SOC": 2502, "CV": 0},
            },
        ),
        (
            ORIN,
            {
                "gpu_percent": 7,
                "gpu_mhz": [0],
                "temperatures_c": {"cpu": 41.437},
                "power_mw": {"VDD_GPU_SOC": 2390},
            },
        ),
        (
            ORIN_JETPACK_7,
            {
                "ram_used_mib": 20642,
                "ram_total_mib": 62817,
                "cpu_percent": [23, None],
                "gpu_percent": 12,
                "gpu_mhz": [1300, 1300],
                "emc_percent": 3,
                "temperatures_c": {"cpu": 52.968},
                "power_mw": {"VDD_GPU_SOC": 5139},
            },
        ),
        (THOR, {"gpu_mhz": [1000, 1000, 1000]}),
        ("", {}),
        ("NVENC0 off nonsense [[[ @C 5/", {}),
    ],
)
def test_every_board_s_line_is_read(line: str, expected: dict[str, object]) -> None:
    """Each field that a line has is read as printed, and none that it has not."""
    assert parse_tegrastats(line) == expected


def test_power_is_voltage_times_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An INA3221's channels give mV x mA; the sum of its shunts and other monitors give nothing."""
    monkeypatch.setattr(system, "ROOT", str(tmp_path))
    monitor = tmp_path / "sys/class/hwmon/hwmon2"
    fan = tmp_path / "sys/class/hwmon/hwmon0"
    for folder in (monitor, fan):
        folder.mkdir(parents=True)
    (fan / "name").write_text("pwmfan\n")
    (monitor / "name").write_text("ina3221\n")
    for channel, label, volt, ampere in ((1, "VDD_IN", "4980", "1200"), (2, "VDD_CPU", "4980", "0")):
        (monitor / f"in{channel}_label").write_text(label + "\n")
        (monitor / f"in{channel}_input").write_text(volt + "\n")
        (monitor / f"curr{channel}_input").write_text(ampere + "\n")
    (monitor / "in7_label").write_text("sum of shunt voltages\n")
    (monitor / "in7_input").write_text("12\n")
    assert ina3221_mw() == {"VDD_IN": pytest.approx(5976), "VDD_CPU": 0}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


@pytest.mark.parametrize(
    "gpu", ["57000000.gpu", "17000000.gp10b", "17000000.gv11b", "17000000.ga10b", "17000000.gpu"]
)
def test_clocks_are_read_under_each_board_s_name(
    gpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hz of the GPU and kHz of the processors are MHz, its load is in tenths of a percent; the video engine's
    clock is not the GPU's. Locked means that least and greatest agree for both."""
    monkeypatch.setattr(system, "ROOT", str(tmp_path))
    assert clocks() == {}
    folder = tmp_path / "sys/class/devfreq" / gpu
    write(folder / "cur_freq", "921600000")
    write(folder / "device/load", "987")
    write(tmp_path / "sys/class/devfreq/15340000.vic/cur_freq", "601600000")
    for number, khz in enumerate(("1479000", "102000")):
        policy = tmp_path / f"sys/devices/system/cpu/cpufreq/policy{number}"
        write(policy / "scaling_cur_freq", khz)
        write(policy / "scaling_min_freq", "1479000")
        write(policy / "scaling_max_freq", "1479000")
    assert clocks() == {"gpu_mhz": [921.6], "cpu_mhz": [1479.0, 102.0], "gpu_percent": 98.7}
    write(folder / "min_freq", "76800000")
    write(folder / "max_freq", "921600000")
    assert clocks_locked() is False
    write(folder / "min_freq", "921600000")
    assert clocks_locked() is True


def test_a_placeholder_is_no_temperature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PMIC-Die stands at 100 degrees on every Nano, and sensors that are off at -256: neither is measured."""
    monkeypatch.setattr(system, "ROOT", str(tmp_path))
    for number, (zone, value) in enumerate(
        (("AO-therm", "41500"), ("PMIC-Die", "100000"), ("CV0", "-256000"), ("GPU-therm", "99500"))
    ):
        folder = tmp_path / f"sys/class/thermal/thermal_zone{number}"
        write(folder / "type", zone)
        write(folder / "temp", value)
    assert system.temperatures_c() == {"AO-therm": 41.5, "GPU-therm": 99.5}


def test_samples_take_the_newest_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tegrastats runs beside the job and is ended with it; a sample holds the last whole line."""
    program = tmp_path / "tegrastats"
    program.write_text(f"#!/bin/sh\necho '{ORIN}'\necho '{NANO}'\nprintf 'RAM 1/2'\nsleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("edgeprune.deploy.device.telemetry.INTERVAL_S", 0.0)
    with Telemetry() as telemetry:
        while not telemetry.samples or "ram_used_mib" not in telemetry.samples[-1]:
            telemetry.tick()
            assert len(telemetry.samples) < 200_000
        process = telemetry._process
    assert telemetry.samples[-1]["ram_used_mib"] == 330
    assert telemetry.samples[-1]["power_mw"]["POM_5V_IN"] == 933
    assert process is not None
    assert process.poll() is not None
