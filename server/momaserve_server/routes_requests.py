"""`DELETE /v1/requests/{id}`: aborts a request that somebody else is reading."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from momaserve_server import examples
from momaserve_server.context import context_of
from momaserve_server.errors import RequestNotFoundError
from momaserve_server.openapi import READS, no_body

router = APIRouter()


@router.delete(
    "/v1/requests/{request_id}",
    openapi_extra=no_body(examples.ABORTED, statuses=(404, *READS)),
)
async def abort_request(request: Request, request_id: str) -> dict[str, Any]:
    """Its stream ends with an error event, its memory is free by the next step."""
    if not context_of(request).running.abort(request_id):
        raise RequestNotFoundError(f"no request {request_id!r} is waiting or running")
    return {"id": request_id, "object": "request", "aborted": True}
