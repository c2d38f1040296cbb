"""A model that writes what a test says, in place of the engine's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from jaxllm import CompletionOutput, RequestOutput, RequestOutputKind

CALL = '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>'
OSLO, ROME = CALL % '{"city": "Oslo"}', CALL % '{"city": "Rome"}'
TEXT = f"<think>\nWhich city?\n</think>\n\nLet me look.\n{OSLO}\n{ROME}"


@dataclass
class ScriptedChat:
    """Its `chat` takes the place of AsyncEngine.chat, and streams three characters an output.
    delay: seconds before the first. raises_after: outputs before it raises. seen: the last call's
    arguments."""

    text: str = TEXT
    finish_reason: str = "stop"
    prompt: str = "the prompt"
    delay: float = 0
    raises_after: int | None = None
    seen: dict[str, Any] = field(default_factory=dict)

    async def chat(
        self, messages: Any, params: Any, request_id: str, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        self.seen = {"messages": messages, "params": params, **options}
        is_stream = params.output_kind is RequestOutputKind.DELTA
        step = 3 if is_stream else max(len(self.text), 1)
        pieces = [self.text[i : i + step] for i in range(0, len(self.text), step)] or [""]
        await asyncio.sleep(self.delay)
        for i, piece in enumerate(pieces, 1):
            if self.raises_after is not None and i > self.raises_after:
                raise RuntimeError("secret of the engine")
            reason = self.finish_reason if i == len(pieces) else None
            answer = CompletionOutput(0, piece, [7] * len(piece), finish_reason=reason)
            yield RequestOutput(request_id, self.prompt, [1, 2], [answer], i == len(pieces))
