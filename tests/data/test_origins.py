"""From a document's number back to its place."""

from __future__ import annotations

import json
from pathlib import Path

from depthprune.data.opening import open_text
from depthprune.data.origins import document_origins
from depthprune.data.roles import RoleShares
from depthprune.data.streaming import ShuffledDocuments
from depthprune.data.text import TextSource


def test_numbers_lead_back_to_rows_over_several_passes(tmp_path: Path) -> None:
    for part in range(3):
        rows = [json.dumps({"text": f"document {part} {row}"}) + "\n" for row in range(7)]
        (tmp_path / f"part-{part}.jsonl").write_text("".join(rows))
    text = open_text(TextSource(str(tmp_path)))
    shares = RoleShares(0.2, 0.6, 0.1, 0.1)
    documents = ShuffledDocuments(text, "fit", shares, seed=3, buffer=4)
    drawn = dict(next(documents) for _ in range(30))  # more than two passes
    assert documents.passes >= 1
    numbers = list(drawn)
    for number, origin in zip(numbers, document_origins(text, "fit", shares, numbers), strict=True):
        rows = Path(origin.file).read_text().splitlines()
        assert json.loads(rows[origin.row])["text"] == drawn[number]
