"""Python environments that the device agent is tested in, one per interpreter: .venvs/NAME, made on demand.

``python tests/deploy/agent_venvs.py`` makes all of them. An interpreter is looked for as pythonX.Y on the
PATH, then under ~/.pyenv/versions.
"""

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

VENVS = Path(__file__).resolve().parent.parent.parent / ".venvs"

# What a JetPack of that Python has, or the last releases that support it. 3.12 has Pillow and no OpenCV.
REQUIREMENTS = {
    "3.6": ("numpy==1.19.5", "opencv-python-headless==4.5.5.64", "onnxruntime==1.10.0"),
    "3.8": ("numpy==1.24.4", "opencv-python-headless==5.0.0.93", "onnxruntime==1.19.2"),
    "3.10": ("numpy==2.2.6", "opencv-python-headless==5.0.0.93", "onnxruntime==1.23.2"),
    "3.12": ("numpy==2.5.5", "pillow==13.0.0", "onnxruntime==1.32.0"),
    # TensorRT for RTX builds engines on a machine without a GPU. 90 MB, proprietary: for tests alone.
    "rtx": ("numpy==2.2.6", "tensorrt-rtx-cu12==1.7.1.116"),
    # Debian's own Python with its OpenCV, which has GStreamer as JetPack's has.
    "debian": ("onnxruntime==1.19.2",),
}
DEBIAN_PYTHON = Path("/usr/bin/python3")
DEBIAN_PACKAGES = "python3-opencv python3-venv gstreamer1.0-tools gstreamer1.0-plugins-base"
PYTHON_OF = {"rtx": "3.10"}
PIP = {"3.6": "pip==21.3.1"}  # the last one for it


class Missing(Exception):
    """An environment cannot be made here; the message says why."""


def find_interpreter(version: str) -> Path:
    """A CPython of that version.

    Raises:
        Missing: If there is none.
    """
    candidates = [
        shutil.which(f"python{version}"),
        *Path.home().glob(f".pyenv/versions/{version}.*/bin/python"),
    ]
    for candidate in filter(None, candidates):
        # A version manager's shim is on the PATH also where it refuses to run.
        told = subprocess.run([candidate, "--version"], capture_output=True, text=True, check=False)
        if told.returncode == 0 and told.stdout.startswith(f"Python {version}."):
            return Path(candidate)
    raise Missing(
        f"no python{version} on the PATH and none under ~/.pyenv/versions (pyenv install {version})"
    )


def ensure(name: str) -> Path:
    """The environment's interpreter; the environment is made if it is not there.

    Raises:
        Missing: If there is no such interpreter, or its packages cannot be installed.
    """
    folder, requirements = VENVS / name, REQUIREMENTS[name]
    python, mark = folder / "bin" / "python", folder / ".installed"
    VENVS.mkdir(exist_ok=True)
    with (VENVS / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test workers share the environments
        if mark.is_file() and mark.read_text() == "\n".join(requirements):
            return python
        shutil.rmtree(folder, ignore_errors=True)
        if name == "debian":
            if not shutil.which("gst-inspect-1.0") or not DEBIAN_PYTHON.is_file():
                raise Missing(f"no GStreamer here (apt-get install {DEBIAN_PACKAGES})")
            _run([str(DEBIAN_PYTHON), "-c", "import cv2"])
            _run([str(DEBIAN_PYTHON), "-m", "venv", "--system-site-packages", str(folder)])
        else:
            interpreter = find_interpreter(PYTHON_OF.get(name, name))
            _run([str(interpreter), "-m", "venv", str(folder)])
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if name in PIP:
            _run([*pip, PIP[name]])
        _run([*pip, *requirements])
        mark.write_text("\n".join(requirements))
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")


if __name__ == "__main__":
    try:
        for name in REQUIREMENTS:
            print(name, ensure(name))
    except Missing as error:
        sys.exit(str(error))
