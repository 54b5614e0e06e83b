"""A run whose budget is a latency or memory: its table, and the engines that are measured on its device."""

from collections.abc import Callable
from typing import cast

from torch import nn

from edgeprune.benchmarks.engine_timing import EngineTimer, exporter
from edgeprune.cli.config import BuildConfig
from edgeprune.cli.latency_table import measured_table
from edgeprune.cli.progress import say
from edgeprune.cli.run_device import RunDevice
from edgeprune.cli.run_folder import RunError, RunFolder
from edgeprune.data.files import read_json
from edgeprune.detectors.protocol import Detector
from edgeprune.pruning.checkpoint import RECORD, trace_detector
from edgeprune.pruning.graph import Network
from edgeprune.pruning.groups import find_groups
from edgeprune.pruning.latency import FILE_NAME, LatencyTable
from edgeprune.pruning.narrowing import LatencyBudget
from edgeprune.pruning.records import MeasuredLatency, PruningStep


def latency_budget(
    config: BuildConfig, run: RunFolder, device: RunDevice, detector: nn.Module
) -> LatencyBudget:
    """What the options ask of the run's device; where it is away the table alone is gone by.

    The table is the run's own once it has begun; else the one that was given, else it is measured.

    Raises:
        EdgePruneError: If the device fails, or the table cannot be used.
    """
    protocol = cast(Detector, detector)
    network = trace_detector(detector, protocol.input_size).eval()
    measure = None
    if not device.away:
        timer = EngineTimer(
            device.session,
            lambda model: device.build(model, config.precision, f"{model.stem} network: building its engine"),
            exporter(protocol, device.session.target, config.precision),
            protocol.preprocessing,
            network,
            _unpruned_ms(run),
        )

        def measure(network: Network) -> MeasuredLatency:
            found = timer(network)
            within = "" if found.low_ms is None else f" ({found.low_ms:.2f} to {found.high_ms:.2f})"
            memory = "" if found.memory_mib is None else f" and {found.memory_mib:.1f} MiB"
            say(f"Its engine takes {found.ms:.2f} ms{within}{memory}.")
            return found

    return _budget(config, _table(config, run, device, protocol, network), measure)


def _budget(
    config: BuildConfig, table: LatencyTable, measure: Callable[[Network], MeasuredLatency] | None
) -> LatencyBudget:
    return LatencyBudget(
        table=table,
        goal_ms=config.latency_budget_ms,
        speedup=config.speedup,
        energy_mj=config.energy_budget_mj,
        memory_mib=config.memory_budget_mib,
        measure=measure,
    )


def check_latency_options(config: BuildConfig, device: RunDevice) -> None:
    """Refuse what would fail after the run has begun.

    Raises:
        EdgePruneError: If there is neither a device nor a table, or the table is of another device, or does not
            hold what is asked for.
    """
    if config.precision == "int8":
        raise RunError("--precision int8 has no latency tables: ask for --remove, or for fp32 or fp16")
    if config.latency_table is not None:
        table = LatencyTable.read(config.latency_table)
        _check(table, config, device)
        _budget(config, table, None)
    elif device.away:
        raise RunError(
            f"how long kernels take on {config.target} is not known, and it is out of reach: give --host, or "
            "--latency-table with a table that was measured on one"
        )


def _table(
    config: BuildConfig, run: RunFolder, device: RunDevice, detector: Detector, network: Network
) -> LatencyTable:
    own = run.path / FILE_NAME
    given = own if own.is_file() else config.latency_table
    if given is not None:
        table = LatencyTable.read(given)
        _check(table, config, device)
    else:
        table = measured_table(
            device.session,
            detector,
            find_groups(network),
            precision=config.precision,
            options=device.connection.engine_options(device.session.target),
        )
    if given != own:
        table.write(own)
    return table


def _check(table: LatencyTable, config: BuildConfig, device: RunDevice) -> None:
    """That a table is of the run's device, as far as that is known.

    Milliseconds are corrected by what engines take; energy is by the table's power, which is of its power mode.
    """
    info = None if device.away else device.session.probe()
    power_mode = device.connection.power_mode or (info.power_mode if info else None)
    table.check(
        device=info.board if info else table.device,
        target=config.target,
        backend=info.backend if info else table.backend,
        backend_version=info.backend_version if info else table.backend_version,
        precision=config.precision,
        dla_core=device.connection.engine_options(device.target).get("dla_core"),
        power_mode=None if config.energy_budget_mj is None else power_mode,
    )


def _unpruned_ms(run: RunFolder) -> float | None:
    """What a run that goes on measured when it began."""
    path = run.step(0) / RECORD
    if not path.is_file():
        return None
    latency = PruningStep.from_json(read_json(path)["steps"][0]).latency
    return latency.ms if latency else None
