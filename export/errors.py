"""What a user of the export can act on."""

from edgeprune.data.errors import EdgePruneError


class ExportError(EdgePruneError):
    """A model could not be exported, read, run or quantised, or is not the network that it came from."""
