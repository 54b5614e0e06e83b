"""What a user of the deployment can act on."""

from __future__ import annotations

from collections.abc import Mapping

from edgeprune.data.errors import EdgePruneError


class TargetError(EdgePruneError):
    """A target's name is unknown, or the device is not of that kind."""


class DeviceError(EdgePruneError):
    """The device, or the way to it, failed.

    Attributes:
        kind: a word for programs, as "killed", "busy" or "connection".
    """

    def __init__(self, message: str, kind: str = "device") -> None:
        super().__init__(message)
        self.kind = kind

    @classmethod
    def of_agent(cls, what: str, error: Mapping[str, str]) -> DeviceError:
        """The agent's record of an error: "kind", "message", "remedy"; `what` says what it was that failed."""
        remedy = f": {error['remedy']}" if error["remedy"] else ""
        return cls(f"{what}: {error['message']}{remedy}", error["kind"])
