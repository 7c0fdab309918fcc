"""The Python of the README does what it says."""

import re
from pathlib import Path
from typing import Any

import pytest

import depthprune as dp

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.integration
def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    known: dict[str, Any] = {}
    exec(compile(code, str(README), "exec"), known)
    assert len(known["plan"].sites) == 10
    assert {site.kind for site in known["plan"].sites} == {"attention"}
    assert known["model"].name_or_path == "smollm2-135m-instruct-q4"  # not the cache folder of this machine
    reopened, tokenizer = dp.load("checkpoints/mine")
    ids = tokenizer("Some text.", return_tensors="pt")["input_ids"]
    assert reopened(ids).logits.equal(known["model"](ids).logits)
