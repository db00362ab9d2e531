"""How prompts are written: the part of the settings that a run shares with whatever asks its model later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wpn_ds.settings.parse import Flag, option
from wpn_ds.settings.run import DataConfig

AUTO = "auto"
PLAIN_TEMPLATE = "Question: {prompt}\nAnswer:"
"""Text around a prompt under ``auto``, for a tokenizer without a chat template."""


@dataclass(frozen=True)
class PromptStyle:
    """How prompts are written, the same for a run and for what is asked of its model later.

    Attributes:
        template: text around a prompt, with one ``{prompt}``; ``auto``: a plain prompt is a user's turn in the
            tokenizer's chat template, or stands in :data:`PLAIN_TEMPLATE` where the tokenizer has none. Prompts that
            are chats go through the chat template, if there is one, whatever this is.
        system_prompt: the system turn of a prompt that has none of its own.
        chat_date: the day that a chat template writes as today's, ``YYYY-MM-DD``; None: today.
        parse_special_tokens: whether a special token that a prompt or an answer spells out is that token, not text.
    """

    template: str = AUTO
    system_prompt: str | None = None
    chat_date: str | None = None
    parse_special_tokens: bool = False

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> PromptStyle:
        """That of a run's settings by their flags; one that a run of long ago hadn't yet has its default."""
        return cls(
            template=settings.get("prompt_template") or AUTO,
            system_prompt=settings.get("system_prompt"),
            chat_date=settings.get("chat_date"),
            parse_special_tokens=bool(settings.get("parse_special_tokens")),
        )


@dataclass(frozen=True, kw_only=True)
class StyleFlags:
    """Prompts: how they are written (default: auto, no system turn; evaluate: as the model was trained)."""

    prompt_template: str | None = option(None, line_breaks=True)
    """auto (the chat template as a user's turn, or a plain one), or text with {prompt} in it, \\n for a line break."""
    system_prompt: str | None = option(None, line_breaks=True)
    """System turn of prompts that have none of their own."""
    chat_date: str | None = None
    """Day that a chat template writes as today's, YYYY-MM-DD."""
    parse_special_tokens: Flag = False
    """Read special tokens that texts spell out (</s>) as such, not as text."""

    def __post_init__(self) -> None:
        DataConfig(**self._given())

    def style(self, recorded: Mapping[str, Any] | None = None) -> PromptStyle:
        """The style that the flags name, over that of a run's ``recorded`` settings."""
        return PromptStyle.of({**(recorded or {}), **self._given()})

    def _given(self) -> dict[str, Any]:
        names = ("prompt_template", "system_prompt", "chat_date", "parse_special_tokens")
        return {name: value for name in names if (value := getattr(self, name)) not in (None, False)}
