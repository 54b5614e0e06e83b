"""Does latency follow the MACs? NanoDet-g in eleven steps on this machine's CPU, measured interleaved.

    python benchmarks/experiments/latency_against_macs.py      # about 15 minutes on two quiet cores

Reads coco-person of the maintainers' data folder (EDGEPRUNE_SHARED). The run lies in build/experiments, and
an interrupted call goes on. Writes benchmarks/results/latency_against_macs/: report.json and report.html,
without frames. Aim: realised speed-up of at least 0.9 of the MAC reduction at each step;
where it falls short, the report's layers say why.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from edgeprune.benchmarks.provenance import provenance, without_folders
from edgeprune.benchmarks.report import write_report
from edgeprune.benchmarks.runs import load_report
from edgeprune.benchmarks.summary import headline, row_figures

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("EDGEPRUNE_SHARED", ROOT.parent / "shared" / "data")) / "coco-person"
RUN = ROOT / "build" / "experiments" / "latency_against_macs"
RESULTS = ROOT / "benchmarks" / "results" / "latency_against_macs"

# No fine-tuning: it changes no latency.
BUILD = (
    f"build --target host --train {SHARED / 'person_train2017.json'} --val {SHARED / 'person_val2017.json'} "
    "--input-size 320 --iterations 10 --remove 0.4 --per params --finetune-epochs 0 --resume"
).split()


def main() -> None:
    program = [sys.executable, "-c", "from edgeprune.cli import app; app()"]
    subprocess.run([*program, *BUILD, "--run-dir", str(RUN)], check=True)
    # Measured again, whatever else the build's own measurement shared the machine with.
    origin = provenance("latency_against_macs.py", ("torch", "onnxruntime", "numpy"))
    subprocess.run([*program, "bench", str(RUN)], check=True)
    report = load_report(RUN)
    told = without_folders({**report.provenance, "experiment": origin})
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_report(replace(report, provenance=told), RESULTS)
    shutil.rmtree(RESULTS / "tensorboard", ignore_errors=True)
    print(headline(report).text)
    for row in row_figures(report):
        realised = row["realised_speedup"]
        print(f"iteration {row['iteration']}: realised {realised:.2f}" if realised else "not measured")


if __name__ == "__main__":
    main()
