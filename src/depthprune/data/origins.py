"""From the number of a training document back to the file and row where it stands."""

from __future__ import annotations

from collections.abc import Sequence

from depthprune.data.roles import RoleShares
from depthprune.data.text import Origin, Text, role_documents


def document_origins(text: Text, role: str, shares: RoleShares, numbers: Sequence[int]) -> list[Origin]:
    """Where documents stand. Reads the text from its beginning, so it is for errors only.

    Args:
        text: the text.
        role: the documents' role.
        shares: of the roles.
        numbers: as :class:`~depthprune.data.streaming.ShuffledDocuments` counts: in reading order, over all passes.
    """
    wanted, found = set(numbers), dict[int, Origin]()
    count = 0
    for count, document in enumerate(role_documents(text, role, shares), start=1):
        if count - 1 in wanted:
            found[count - 1] = document.origin
            if len(found) == len(wanted):
                break
    if len(found) < len(wanted):  # from a later pass over the text, whose length is known now
        return document_origins(text, role, shares, [number % count for number in numbers])
    return [found[number] for number in numbers]
