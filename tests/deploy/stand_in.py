"""A stand-in Jetson: the files and programs of a board, under a folder, answering as NVIDIA's do."""

from pathlib import Path

NVPMODEL_CONF = """\
###########################
# POWER_MODEL DEFINITIONS #
###########################
< POWER_MODEL ID=0 NAME=MAXN >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=5W >
CPU_ONLINE CORE_0 1
< PM_CONFIG DEFAULT=0 >
"""

NVPMODEL = """\
#!/bin/sh
state={root}/power_mode
case "$1" in
  -q) id=$(cat $state); [ $id = 0 ] && name=MAXN || name=5W; echo "NV Power Mode: $name"; echo $id ;;
  -m) echo $2 > $state; echo "nvpmodel -m $2" >> {root}/calls ;;
esac
"""

JETSON_CLOCKS = """\
#!/bin/sh
policy={root}/sys/devices/system/cpu/cpufreq/policy0
gpu={root}/sys/class/devfreq/57000000.gpu
echo "jetson_clocks $1" >> {root}/calls
case "$1" in
  --store) cat $policy/scaling_min_freq $gpu/min_freq > "$2" ;;
  --restore) sed -n 1p "$2" > $policy/scaling_min_freq; sed -n 2p "$2" > $gpu/min_freq ;;
  "") cat $policy/scaling_max_freq > $policy/scaling_min_freq; cat $gpu/max_freq > $gpu/min_freq ;;
esac
"""

MEMINFO = """\
MemTotal: 4059712 kB
MemAvailable: 2900000 kB
SwapTotal: 2029856 kB
SwapFree: 2029856 kB
"""

TEGRASTATS = """\
#!/bin/sh
while true; do
  echo "RAM 330/3964MB (lfb 758x4MB) SWAP 0/1982MB (cached 0MB) CPU [5%@102,0%@102,off,off] EMC_FREQ 0% \
GR3D_FREQ 61% PLL@20.5C CPU@23C PMIC@100C GPU@22.5C thermal@22.5C POM_5V_IN 933/933 POM_5V_GPU 0/0"
  sleep 0.2
done
"""


class StandIn:
    """Attributes:
    root: stands for / on the board.
    environment: of whatever runs "on" the board.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for name, text in (
            (
                "etc/nv_tegra_release",
                "# R32 (release), REVISION: 7.6, GCID: 1, BOARD: t210ref, EABI: aarch64\n",
            ),
            ("etc/nvpmodel.conf", NVPMODEL_CONF),
            ("proc/device-tree/model", "NVIDIA Jetson Nano Developer Kit\0"),
            (
                "proc/meminfo",
                MEMINFO,
            ),
            ("sys/class/thermal/thermal_zone0/type", "CPU-therm\n"),
            ("sys/class/thermal/thermal_zone0/temp", "23000\n"),
            ("sys/class/thermal/thermal_zone1/type", "CV0\n"),
            ("sys/class/thermal/thermal_zone1/temp", "-256000\n"),
            ("sys/class/thermal/thermal_zone2/type", "PMIC-Die\n"),
            ("sys/class/thermal/thermal_zone2/temp", "100000\n"),
            ("sys/class/devfreq/57000000.gpu/min_freq", "76800000\n"),
            ("sys/class/devfreq/57000000.gpu/max_freq", "921600000\n"),
            ("sys/class/devfreq/57000000.gpu/cur_freq", "460800000\n"),
            ("sys/class/devfreq/57000000.gpu/device/load", "610\n"),
            ("sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq", "102000\n"),
            ("sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq", "1479000\n"),
            ("sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq", "1428000\n"),
            ("power_mode", "0\n"),
            ("calls", ""),
        ):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for name, text in (
            ("nvpmodel", NVPMODEL),
            ("jetson_clocks", JETSON_CLOCKS),
            ("tegrastats", TEGRASTATS),
        ):
            self._program(name, text.replace("{root}", str(root)))
        self._program(
            "sudo", '#!/bin/sh\nshift\nexec "$@"\n'
        )  # sudo -n COMMAND, where the tests are not root
        self.environment = {"EDGEPRUNE_DEVICE_ROOT": str(root), "PATH": f"{root}/bin:/usr/bin:/bin"}

    def _program(self, name: str, text: str) -> None:
        path = self.root / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        """What was called that changes the board."""
        return (self.root / "calls").read_text().splitlines()

    @property
    def power_mode(self) -> str:
        return (self.root / "power_mode").read_text().strip()

    @property
    def clocks_locked(self) -> bool:
        clocks = (
            ("sys/devices/system/cpu/cpufreq/policy0", "scaling_"),
            ("sys/class/devfreq/57000000.gpu", ""),
        )
        return all(
            len({(self.root / folder / f"{prefix}{end}_freq").read_text() for end in ("min", "max")}) == 1
            for folder, prefix in clocks
        )
