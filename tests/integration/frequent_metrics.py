"""Run a service that measures often and repeats soon: `python frequent_metrics.py MODULE`.

The periods of the gauges, the window of the depletion forecast, and the claims of the reaper are shorter. The
modules of the service may be imported already. The script imports no other service, because this service would
export the metrics of both.
"""

import runpy
import sys

module = sys.argv.pop(1)

if module == "allocator":
    from allocator.background import depletion_forecast, pool_metrics

    pool_metrics.PERIOD_SEC = 0.5  # type: ignore[assignment]
    depletion_forecast.WINDOW_SEC = 5
if module == "gateway":
    from gateway.queries import queue_metrics

    queue_metrics.PERIOD_SEC = 0.5
if module == "reaper":
    from reaper import cleanup, deletion, main

    # After a refused deletion, the reaper calls CSP again when its claim ends.
    deletion.CSP_TIMEOUT_SEC = main.CSP_TIMEOUT_SEC = 1  # type: ignore[attr-defined]
    main.REQUEST_TIMEOUT_SEC = 1
    cleanup.CLAIM_MARGIN_SEC = 0.5
    cleanup.NO_REPLY_PAUSE_SEC = 0.2

runpy.run_module(module, run_name="__main__", alter_sys=True)
