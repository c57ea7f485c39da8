"""Response bodies of the routes for logins inside sandboxes."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from gateway.api.schemas.fields import Count


class AccessReady(BaseModel):
    status: Literal["ready"] = "ready"
    email: Annotated[str, Field(examples=["inst-student-1-abc@labs.example.com"])]
    # No text of the document looks like a password.
    password: Annotated[str, Field(examples=["<the password>"])]
    user_id: Annotated[
        str, Field(examples=["5b1e7c52-2f3b-4f7e-8d0b-1d2c3e4f5a6b"], description="id of the user in CSP")
    ]
    login_url: Annotated[str, Field(examples=["https://csp.infoblox.com"])]


class AccessPending(BaseModel):
    """The broker is creating the login. A new account needs some minutes."""

    status: Literal["pending"] = "pending"
    retry_after: Annotated[int, Field(examples=[5], description="seconds until the request should be repeated")]


class AccessFailed(BaseModel):
    """The broker could not create the login. It tries again, so a later request may return the login."""

    status: Literal["failed"] = "failed"
    reason: str = Field(examples=["The account has no group admin. Its groups are: act_admin, user."])


class KeysRotated(BaseModel):
    rotated: Count = Field(description="passwords that the first key of ACCESS_KEYS encrypts now")
    remaining: Count = Field(description="passwords that another key still encrypts")
    unreadable: Count = Field(description="passwords that no key of ACCESS_KEYS decrypts")
