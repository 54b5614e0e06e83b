"""The errors a user can act on: what failed, where, what to do next.

    EdgePruneError
    ├── DataError     images, boxes, videos
    └── AssetError    weights and videos fetched by name

Other folders add their subclasses beside their code. The command line prints one line and exits with 1;
any other exception is a bug of ours and keeps its traceback.
"""


class EdgePruneError(Exception):
    """What failed, where, and what to do next, in one line."""


class DataError(EdgePruneError):
    """Images, boxes or a video cannot be used."""


class AssetError(EdgePruneError):
    """A file known by name cannot be had, or is not the file that its hash says."""
