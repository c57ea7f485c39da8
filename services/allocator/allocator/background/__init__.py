"""Tasks of the allocator that run beside the command consumers."""
