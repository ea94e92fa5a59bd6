"""What the bodies of several endpoints share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

Cursor = Annotated[str | None, AfterValidator(lambda after: after or None)]
"""The id of the last item that the caller has. Empty, as at the beginning of a shell's loop: of none yet."""


class Request(BaseModel):
    """A body: unknown keys are errors, nothing is coerced."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class Answer(BaseModel):
    """What is answered, and queries: the texts below fields are their descriptions."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Page(Answer):
    """A list of which there may be more."""

    object: Literal["list"] = "list"
    has_more: bool


class EdgedPage(Page):
    """A list that names its first and last id, where OpenAI's schema requires it."""

    first_id: str | None
    last_id: str | None
