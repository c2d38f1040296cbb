"""The error that is the user's."""

from __future__ import annotations


class RequestError(ValueError):
    """What was asked for cannot be done; the message says why and what would do, and may be shown
    to whoever asked.

    param: the option that is wrong, as SamplingParams, StructuredOutputsParams or Request name it;
    "prompt" for whatever the prompt was made of. code: a word for programs.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
