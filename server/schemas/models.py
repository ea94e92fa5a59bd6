"""OpenAI's `model`."""

from __future__ import annotations

from typing import Literal

from server.schemas.base import Answer


class Model(Answer):
    """OpenAI's `model`."""

    object: Literal["model"] = "model"
    id: str
    created: int
    owned_by: str


class ModelList(Answer):
    """Every model; never paged."""

    object: Literal["list"] = "list"
    data: list[Model]


class DeletedModel(Answer):
    """The answer to a model's deletion."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True
