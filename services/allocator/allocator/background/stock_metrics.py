"""Stock metrics: levels and forecasts of the stock rules."""

import math
from collections.abc import Iterable, Mapping

import structlog
from prometheus_client import Gauge
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from allocator import metrics
from sandbox_broker.database import connections
from sandbox_broker.database.schema import stock_forecasts, stock_levels
from sandbox_broker.runtime import service

PERIOD_SEC = 15
"""The forecasts read thousands of leases under load."""

log = structlog.get_logger()


class StockMetrics:
    """Periodic update of the stock gauges. Every allocator sets them, on standby too."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def run(self) -> None:
        await service.run_periodically(PERIOD_SEC, self._update)

    async def _update(self) -> None:
        try:
            async with self._engine.connect() as connection:
                levels = (await connection.execute(select(stock_levels))).mappings().all()
                forecasts = (await connection.execute(select(stock_forecasts))).mappings().all() if levels else []
        except connections.CONNECTION_ERRORS as error:
            log.warning("stock.not_counted", error=connections.describe_error(error))
            return
        for column, gauge in metrics.STOCK.items():
            _set_series(gauge, {(level["name_prefix"],): float(level[column]) for level in levels})
        _set_series(
            metrics.STOCK_STOPPED,
            {(level["name_prefix"],): float(level["stopped_at"] is not None) for level in levels},
        )
        metrics.EXHAUSTION.parts = {
            forecast["name_prefix"]: math.inf if forecast["exhaustion_sec"] is None else forecast["exhaustion_sec"]
            for forecast in forecasts
        }
        _set_series(
            metrics.STOCK_CREATION,
            {
                (forecast["name_prefix"], quantile): forecast[column]
                for forecast in forecasts
                for quantile, column in (("0.5", "creation_p50_sec"), ("0.9", "creation_p90_sec"))
                if forecast[column] is not None
            },
        )


def _set_series(gauge: Gauge, values: Mapping[tuple[str, ...], float]) -> None:
    """Set the series with these label values, and remove all others."""
    for labels in _label_values(gauge) - values.keys():
        gauge.remove(*labels)
    for labels, value in values.items():
        gauge.labels(*labels).set(value)


def _label_values(gauge: Gauge) -> set[tuple[str, ...]]:
    samples: Iterable[Mapping[str, str]] = (
        sample.labels for metric in gauge.collect() for sample in metric.samples
    )
    return {tuple(labels.values()) for labels in samples}
