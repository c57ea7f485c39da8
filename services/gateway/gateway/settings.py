from pydantic import Field

from sandbox_broker.settings import DatabaseUrl, Port, ServiceSettings, Tokens


class Settings(ServiceSettings):
    database_url: DatabaseUrl = Field(repr=False)
    broker_api_token: Tokens
    broker_admin_token: Tokens
    gateway_port: Port = 8080
    allocate_timeout_sec: float = Field(default=5, gt=0, le=60)
    admin_wait_sec: float = Field(default=25, gt=0, le=300)
