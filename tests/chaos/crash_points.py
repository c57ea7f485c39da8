"""Where a service can be told to die; crashing.py has it done."""

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
}
