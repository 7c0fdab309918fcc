"""Conversations: read from a text's rows, carried as a line of JSON, formatted by a tokenizer's chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

_ROLES = {"human": "user", "gpt": "assistant"}  # as `conversations` name them, and as templates do
CHANGED = "The chat template changes a conversation with a special token in a message: leave such rows out."
_DATE = datetime(2024, 7, 26)  # for templates that name today's: text must not change from one day to the next


def conversation(value: Any, prompt: Any = None) -> str:
    """A row's conversation as a line of JSON, a list of ``{"role": str, "content": str}``; empty where nothing is said.

    Args:
        value: messages with ``role`` and ``content``, or with ``from`` and ``value``; where there is a prompt, the
            answer.
        prompt: what the user says, where the row has a column of its own for it.

    Raises:
        ValueError: it is none; the message says what it is, to be put behind the name of the row.
    """
    if isinstance(value, str) and isinstance(prompt, str):
        value = [{"role": "user", "content": prompt}, {"role": "assistant", "content": value}]
    elif prompt is not None:
        raise ValueError("has no string for the prompt or for the answer")
    if isinstance(value, str):
        raise ValueError("is a string, not a list of messages (an answer to another column needs prompt_column)")
    if not isinstance(value, list):
        raise ValueError(f"is {type(value).__name__}, not a list of messages")
    messages = []
    for message in value:
        names = ("role", "content") if isinstance(message, dict) and message.get("role") else ("from", "value")
        role, content = (message.get(name) if isinstance(message, dict) else None for name in names)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError("has a message without a string for its role (or from) or for its content (or value)")
        messages.append({"role": _ROLES.get(role, role), "content": content})
    if not any(message["content"].strip() for message in messages):
        return ""
    return json.dumps(messages, ensure_ascii=False)


def contents(text: str) -> list[str]:
    """What is said in a conversation, message by message."""
    return [message["content"] for message in json.loads(text)]


@dataclass(frozen=True)
class ChatFormat:
    """How a model wants its conversations.

    Attributes:
        tokenizer: the model's, with a chat template.
        backend: cuts formatted text into tokens; special tokens that stand in it count as such.
        special: the special tokens by their text.
    """

    tokenizer: PreTrainedTokenizerBase
    backend: Tokenizer
    special: dict[str, int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """The format of a tokenizer.

        Raises:
            ValueError: it has no chat template.
        """
        if tokenizer.chat_template is None:
            raise ValueError(
                "The tokenizer has no chat template, which a text with `chat: true` needs: take a model that was "
                "trained on conversations, or leave chat out."
            )
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        return cls(tokenizer, backend, special)

    def formatted(self, text: str) -> str:
        """A conversation as the chat template writes it.

        Raises:
            ValueError: the template refuses it.
        """
        messages = json.loads(text)
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=_DATE.strftime))
        except TemplateError as error:
            shown = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"The chat template refuses a conversation of {shown} ({error}): leave such rows out of the text."
            ) from error

    def pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """The formatted text in pieces, and whether special tokens in them count as such.

        It is one piece, unless a message holds the text of a special token, which must not end the message.

        Raises:
            ValueError: the template refuses the conversation, or changes messages of which one holds a special token.
        """
        rest, messages = self.formatted(text), json.loads(text)
        if not any(token in message["content"] for token in self.special for message in messages):
            yield rest, True
            return
        # a message may read like a part of the template, so its place is found by another in its stead
        nonce = next(str(number) for number in count() if str(number) not in rest)
        marks = [f"[{nonce}-{place}]" if message["content"].strip() else "" for place, message in enumerate(messages)]
        pairs = zip(messages, marks, strict=True)
        frame = self.formatted(json.dumps([{**message, "content": mark} for message, mark in pairs]))
        for message, mark in zip(messages, marks, strict=True):
            if not mark:
                continue
            before, _, frame = frame.partition(mark)
            forms = (before + form for form in (message["content"], message["content"].strip()))
            form = next((form for form in forms if rest.startswith(form)), None)
            if form is None:
                raise ValueError(CHANGED)
            yield before, True
            yield form.removeprefix(before), False
            rest = rest.removeprefix(form)
        if rest != frame:
            raise ValueError(CHANGED)
        yield rest, True
