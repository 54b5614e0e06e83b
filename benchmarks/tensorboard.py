"""A run's scalars for TensorBoard, where it is installed."""

import shutil
from importlib.util import find_spec
from pathlib import Path

from edgeprune.benchmarks.records import Report
from edgeprune.benchmarks.summary import row_figures

# By iteration; each becomes a curve under "pruning".
FIGURES = (
    "params",
    "macs",
    "ap_before",
    "ap50_before",
    "ap_after",
    "ap50_after",
    "device_ap",
    "device_ap50",
    "latency_engine_p50_ms",
    "latency_end_to_end_p50_ms",
    "fps",
)


def write_scalars(report: Report, folder: Path) -> bool:
    """Write figures by iteration and each fine-tuning's loss and AP by epoch, in place of old ones.

    Returns:
        Whether TensorBoard is installed; if not, nothing is written.
    """
    if find_spec("tensorboard") is None:
        return False
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        for figures in row_figures(report):
            for name in FIGURES:
                if figures[name] is not None:
                    writer.add_scalar(f"pruning/{name}", figures[name], figures["iteration"])
        for row in report.rows:
            if row.step.finetune is None:
                continue
            inside = f"fine-tuning/iteration-{row.step.iteration:02d}"
            for epoch, loss in enumerate(row.step.finetune.losses, start=1):
                writer.add_scalar(f"{inside}/loss", loss, epoch)
            for epoch, ap in enumerate(row.step.finetune.select_ap):
                writer.add_scalar(f"{inside}/held_out_ap", ap, epoch)
    return True
