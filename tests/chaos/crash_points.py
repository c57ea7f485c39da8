"""Points at which a service can crash or freeze. crash_runner.py implements them."""

POINTS = {
    "gateway": ("before sending", "after sending", "before answering"),
    "allocator": (
        "before a student's commit",
        "after a student's commit",
        "after a student's reply",
        "before a student's ack",
    ),
    "reaper": ("after the claim", "before CSP", "after CSP", "after the record"),
    "csp_syncer": ("before BeginListing", "after StageListing", "before ApplyListing", "after ApplyListing"),
    "provisioner": (
        "after the claim",
        "before CSP",
        "during CSP",
        "after CSP",
        "after the look-up",
        "after the record",
    ),
}
