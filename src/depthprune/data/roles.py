"""The four roles of text, and which of them a document has."""

from dataclasses import astuple, dataclass
from hashlib import blake2b

ROLES = ("score", "fit", "tune", "test")
"""What a document may be used for: influence and search; moments and training; early stopping; the final figure."""


@dataclass(frozen=True)
class RoleShares:
    """Which share of the groups each role gets.

    Raises:
        ValueError: a share is negative, or they do not sum to 1.
    """

    score: float = 0.2
    fit: float = 0.4
    tune: float = 0.15
    test: float = 0.25

    def __post_init__(self) -> None:
        values = astuple(self)
        if not (min(values) >= 0 and abs(sum(values) - 1) <= 1e-6):  # also if one is NaN
            raise ValueError(f"The shares of the roles must be 0 or more and sum to 1, not {self}: change them.")


def role_of(group: str, shares: RoleShares) -> str:
    """The role of all documents of a group: the same in every command and run, whatever their seeds."""
    place = int.from_bytes(digest(f"0:{group}")[:8], "big") / 2**64
    for role in ROLES:
        place -= getattr(shares, role)
        if place < 0:
            return role
    return max(ROLES, key=lambda role: getattr(shares, role))  # the shares sum to a little less than 1


def sample_of(group: str, samples: int) -> int:
    """Which of so many disjoint samples the documents of a group belong to; independent of their role."""
    return int.from_bytes(digest(f"sample:{group}")[:8], "big") % samples


def digest(text: str) -> bytes:
    """16 bytes that depend on the text alone, on every machine and in every run."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
