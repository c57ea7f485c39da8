"""Where a service can be told to die; crashing.py has it done."""

POINTS = {
    "allocator": ("before commit", "after commit", "after reply", "before ack"),
    "reaper": ("before CSP", "after CSP"),
}
