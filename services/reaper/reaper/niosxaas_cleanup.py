"""Removal of the NIOSXaaS services inside a used sandbox, before its account is deleted. Off by default."""

import structlog

from reaper import metrics
from reaper.settings import Settings
from sandbox_broker.contract.replies import DueDeletion
from sandbox_broker.csp.http import CspError
from sandbox_broker.csp.niosxaas import NiosxaasClient

TIMEOUT_SEC = 30.0
"""Time limit per account."""

log = structlog.get_logger()


def build_client(settings: Settings) -> NiosxaasClient | None:
    """Return None when NIOSXAAS_ENABLED is off; CSP then removes the services with the account."""
    if not settings.niosxaas_enabled:
        return None
    return NiosxaasClient(
        settings.niosxaas_base_url,
        settings.niosxaas_email,
        settings.niosxaas_password.get_secret_value(),
        service_name=settings.niosxaas_service_name,
        shadow_mode=settings.niosxaas_shadow_mode,
        timeout_sec=TIMEOUT_SEC,
    )


async def remove_services(niosxaas: NiosxaasClient, deletion: DueDeletion) -> str | None:
    """Remove the services inside the account of `deletion`. Return the problem, or None.

    The client first proves that its session is in that account, and otherwise removes none. The account is deleted
    in both cases.
    """
    try:
        cleaned = await niosxaas.clean_account(deletion.external_id)
    except CspError as error:
        problem = str(error)
    else:
        log.info(
            "services.removed",
            deleted=cleaned.deleted,
            would_delete=cleaned.would_delete,
        )
        problem = "; ".join(cleaned.failed)
    if not problem:
        return None
    metrics.SERVICES_FAILED.inc()
    log.warning("services.not_removed", error=problem)
    return problem
