"""What a user can act on when measuring or comparing."""

from edgeprune.data.errors import EdgePruneError


class BenchmarkError(EdgePruneError):
    """A benchmark, a run to compare, or a condition that cannot be used as it is."""
