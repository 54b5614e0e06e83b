"""What the agent can say went wrong."""

from typing import Any, Dict


class AgentError(Exception):
    """A failure that the user can act on.

    Attributes:
        kind: a word for programs, as "killed", "checksum" or "backend".
        message: what failed, where.
        remedy: what to do next; may be empty.
    """

    def __init__(self, kind: str, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.remedy = remedy

    def to_json(self) -> Dict[str, Any]:
        return {"kind": self.kind, "message": self.message, "remedy": self.remedy}
