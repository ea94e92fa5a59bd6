"""The API's description, OpenAPI 3.1, at `/openapi.json`: for people, generators of clients, and the test that sends
every route what its description allows and what it does not.

FastAPI describes what it reads itself. Bodies are read here only once the caller is known (`deps.py`), so the functions
that read them say what they take (`describes`), and this module puts that into the description. Descriptions of fields
are the texts that stand below them in the schemas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.scopes import PUBLIC, find_scope

F = TypeVar("F", bound=Callable[..., Any])

_BODY = "openapi_body"
_REFERENCES = "#/components/schemas/{model}"
_DESCRIPTION = (
    "Fine-tunes all parameters of language models in about the memory that inference takes. Speaks OpenAI's "
    "fine-tuning API; what is ours stands under `lomo`. Sizes are bytes (`_bytes`), times are seconds (`_s`), moments "
    "are Unix seconds (`_at`)."
)
_EXAMPLES: dict[str, Any] = {
    "CreateJob": {
        "model": "smollm2-135m-instruct",
        "training_file": "file-0123456789abcdef01234567",
        "suffix": "support",
        "seed": 7,
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": "auto"}}},
        "lomo": {"optimizer": "lomo", "learning_rate": 0.01, "max_seq_length": 512, "activation_checkpointing": "auto"},
    },
    "CreateUpload": {"filename": "train.jsonl", "purpose": "fine-tune", "bytes": 1048576, "mime_type": "text/jsonl"},
    "CreateChat": {
        "model": "ft:smollm2-135m-instruct::support:01234567",
        "messages": [{"role": "user", "content": "How do I reset my password?"}],
        "max_tokens": 64,
    },
    "CreateWebhookEndpoint": {
        "name": "ops",
        "url": "https://example.com/hook",
        "event_types": ["fine_tuning.job.succeeded"],
    },
    "PlanRequest": {"model": "smollm2-135m-instruct", "lomo": {"max_seq_length": 1024}},
}
_ERROR = {
    "description": "What was wrong, where, and what to do.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": ["string", "null"]},
                        },
                    }
                },
            }
        }
    },
}


def describes(schema: type[BaseModel], *, partial: bool = False) -> Callable[[F], F]:
    """Mark a dependency as the reader of a JSON body of this schema; `partial`: of any of its fields, or none."""

    def mark(function: F) -> F:
        setattr(function, _BODY, {"schema": schema, "partial": partial})
        return function

    return mark


def describes_form(
    optional: Mapping[str, dict[str, Any]] | None = None, **required: dict[str, Any]
) -> Callable[[F], F]:
    """Mark a dependency as the reader of a multipart form with these fields."""
    form = {"type": "object", "required": sorted(required), "properties": {**required, **(optional or {})}}

    def mark(function: F) -> F:
        setattr(function, _BODY, {"form": form})
        return function

    return mark


def describe(app: FastAPI) -> dict[str, Any]:
    """The description of every route."""
    document = app.openapi()
    document["info"] |= {"title": "LOMO fine-tuning job server", "description": _DESCRIPTION}
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    routes = [route for route in app.routes if isinstance(route, APIRoute)]
    bodies = [(route, body) for route in routes for body in _bodies(route.dependant)]
    models = {body["schema"] for _, body in bodies if "schema" in body}
    names, definitions = models_json_schema([(model, "validation") for model in models], ref_template=_REFERENCES)
    schemas.update(definitions.get("$defs", {}))
    for route, body in bodies:
        for operation in _operations(document, route):
            operation["requestBody"] = _request_body(body, names, schemas)
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for route in routes:
        for method, operation in zip(sorted(route.methods or ()), _operations(document, route), strict=False):
            _finish(operation, method, route.path)
    return document


def _bodies(dependant: Dependant) -> Iterator[dict[str, Any]]:
    body = getattr(dependant.call, _BODY, None)
    if body is not None:
        yield body
    for inner in dependant.dependencies:
        yield from _bodies(inner)


def _operations(document: dict[str, Any], route: APIRoute) -> list[dict[str, Any]]:
    path = document["paths"].get(route.path_format, {})
    return [path[method.lower()] for method in sorted(route.methods or ()) if method.lower() in path]


def _request_body(
    body: dict[str, Any], names: dict[tuple[Any, Any], dict[str, Any]], schemas: dict[str, Any]
) -> dict[str, Any]:
    if "form" in body:
        return {"required": True, "content": {"multipart/form-data": {"schema": body["form"]}}}
    reference = names[body["schema"], "validation"]
    name = reference["$ref"].rpartition("/")[2]
    if body["partial"]:
        whole = schemas[name]
        content = {"schema": {key: value for key, value in whole.items() if key != "required"}}
        return {"required": False, "content": {"application/json": content}}
    content = {"schema": reference}
    if name in _EXAMPLES:
        content["example"] = _EXAMPLES[name]
    # Without a body it is an empty object (`deps.json_body`), which suffices where no field has to be there.
    return {"required": bool(schemas[name].get("required")), "content": {"application/json": content}}


def _finish(operation: dict[str, Any], method: str, path: str) -> None:
    """The answers that any route may give, and what key it asks for."""
    # FastAPI's own answer to a wrong value; ours is 400.
    operation["responses"].pop("422", None)
    operation["responses"]["4XX"] = _ERROR
    operation["responses"]["503"] = _ERROR
    if f"{method} {path}" in PUBLIC:
        return
    operation["security"] = [{"key": []}]
    scope = find_scope(method, path)
    if scope is not None:
        operation["description"] = f"{operation.get('description', '')}\n\nScope: `{scope.value}`.".strip()
