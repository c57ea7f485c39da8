"""Request bodies of the routes that have one.

FastAPI would parse a body before it authenticates the request, and would require a `Content-Type`, which curl and
small scripts do not send.
"""

import json
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from gateway.api.errors import ApiError

M = TypeVar("M", bound=BaseModel)


async def read_body(request: Request, model: type[M]) -> M:
    """Return the JSON body of the request. Raises ApiError INVALID_REQUEST."""
    try:
        return model.model_validate_json(await request.body())
    except ValidationError as error:
        fields = [
            {"field": ".".join(map(str, problem["loc"])) or "body", "problem": problem["msg"]}
            for problem in error.errors(include_url=False, include_input=False, include_context=False)
        ]
        names = ", ".join(field["field"] for field in fields)
        (example,) = model.model_json_schema()["examples"]
        message = f"The request body is invalid: {names}. Send JSON like {json.dumps(example)}."
        raise ApiError("INVALID_REQUEST", message, fields=fields) from None


def describe_body(model: type[BaseModel]) -> dict[str, Any]:
    """Return the entry of a route with this body for the OpenAPI document."""
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}
    }
