"""What a user of the deployment can act on."""

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
