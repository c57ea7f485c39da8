"""Admin route for the personal data of a student."""

from fastapi import APIRouter, Request

from gateway.api.responses import responses
from gateway.api.schemas.students import StudentForgotten, StudentRequest
from gateway.routes.admin_actions import COMMON_ERRORS, request_maintenance
from gateway.web.bodies import describe_body, read_body
from sandbox_broker.contract.commands import ForgetStudent

router = APIRouter(prefix="/v1/admin", tags=["admin"])


@router.post(
    "/forget",
    openapi_extra=describe_body(StudentRequest),
    responses=responses(*COMMON_ERRORS, "STUDENT_HAS_LEASE", "ALLOCATOR_UNAVAILABLE", "MAINTENANCE_TIMEOUT"),
)
async def forget_student(request: Request) -> StudentForgotten:
    """Replace a student id in leases, history, audit and unpublished events by a pseudonym. The call is
    refused while the student has a lease or waits for one. Subscribers of events keep their own copies."""
    body = await read_body(request, StudentRequest)
    reply = await request_maintenance(
        request, ForgetStudent(request_id=request.state.request_id, student=body.student)
    )
    return StudentForgotten.model_validate(reply, from_attributes=True)
