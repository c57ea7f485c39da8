"""Background tasks of the allocator, beside the command consumers."""
