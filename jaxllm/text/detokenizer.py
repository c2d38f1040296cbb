"""The growing text of one output: stop strings, and what of it may be sent already."""

from __future__ import annotations

from collections.abc import Sequence

from jaxllm.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Decodes one sequence's output as its tokens come, and looks for stop strings.

    The stop string that is complete first wins, so how the text falls into tokens does not matter;
    of those that end together, the longest. The text ends before it, or after it with
    include_stop_str_in_output. As in vLLM, a stop string counts only if it ends in the text of
    tokens after the first min_tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._decoder = tokenizer.piece_decoder(prompt_token_ids, skip_special_tokens)
        self._stop = tuple(stop)
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._num_tail = max(map(len, self._stop), default=1) - 1
        self._tail = ""  # the last characters that a stop string could still reach back into
        self._parts: list[str] = []  # the text; joined when asked, as appending would copy it
        self._unsent: list[str] = []
        self._num_chars = 0
        self._num_unchecked_chars = 0  # no stop string is looked for up to here
        self._finished = False
        self.num_tokens = 0  # that belong to the text: those up to the stop string
        self.stop_reason: str | None = None

    @property
    def text(self) -> str:
        """All text so far, without what may still be an incomplete character."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def push(self, token_ids: Sequence[int]) -> str | None:
        """Appends tokens. Returns the stop string if one is complete; then the text has ended and
        num_tokens says how many tokens were used, later ones are ignored."""
        if not self._stop:
            self.num_tokens += len(token_ids)
            self._append(self._decoder.push(token_ids))
            return None
        for token_id in token_ids:
            if self.stop_reason is not None:
                break
            self.num_tokens += 1
            self._append_checked(self._decoder.push((token_id,)))
        return self.stop_reason

    def finish(self) -> str | None:
        """Ends the text: an incomplete character becomes U+FFFD, and nothing is held back any
        more. Returns the stop string if there is one."""
        self._finished = True
        if self.stop_reason is None:
            self._append_checked(self._decoder.finish())
        return self.stop_reason

    def take_delta(self) -> str:
        """The text that is new since the last call and can no longer change: the start of what may
        become a stop string waits. All deltas together are the final text."""
        unsent = self._unsent[0] if len(self._unsent) == 1 else "".join(self._unsent)
        if not self._stop:
            self._unsent.clear()
            return unsent
        num_held = self._num_held_chars(unsent)
        cut = len(unsent) - num_held
        self._unsent = [unsent[cut:]] if num_held else []
        return unsent[:cut] if num_held else unsent

    def _append(self, text: str) -> None:
        if text:
            self._num_chars += len(text)
            self._parts.append(text)
            self._unsent.append(text)

    def _append_checked(self, text: str) -> None:
        self._append(text)
        if self.num_tokens <= self._min_tokens:
            self._num_unchecked_chars = self._num_chars
        if text and self._stop:
            window = self._tail + text
            self._check_stop(window)
            self._tail = window[-self._num_tail :] if self._num_tail else ""

    def _check_stop(self, window: str) -> None:
        """window is the end of the text: what is new, and before it what a stop string may reach
        back into."""
        window_start = self._num_chars - len(window)
        first_end = self._num_unchecked_chars + 1 - window_start
        found = []
        for stop in self._stop:
            start = window.find(stop, max(0, first_end - len(stop)))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        if found:
            end, start, self.stop_reason = min(found)
            self._truncate(window_start + (end if self._include_stop else start))

    def _truncate(self, num_chars: int) -> None:
        unsent = "".join(self._unsent)
        num_sent = self._num_chars - len(unsent)
        assert num_sent <= num_chars, "text that may become a stop string was sent"
        self._unsent = [unsent[: num_chars - num_sent]]
        self._parts = [self.text[:num_chars]]
        self._num_chars = num_chars

    def _num_held_chars(self, unsent: str) -> int:
        """The length of the longest end of unsent that starts a stop string."""
        if self._include_stop or self._finished or self.stop_reason is not None:
            return 0
        num_held = 0
        for stop in self._stop:
            start = unsent.find(stop[0], max(0, len(unsent) - len(stop) + 1))
            while start >= 0 and len(unsent) - start > num_held:
                if stop.startswith(unsent[start:]):
                    num_held = len(unsent) - start
                start = unsent.find(stop[0], start + 1)
        return num_held
