"""SQL of the command handlers: one module per handler module, one function per statement.

Handlers call the functions with named parameters and get typed rows. Row types are TypedDicts: they type the items
of asyncpg's records, so no statement creates an object per row.

Only `leases`, `deletions`, `listings` and `purge` write the pool: sandboxes and their leases. `waiting`, `jobs` and
`dead_letters` write other tables.

Rules for every statement:

- Each change is one statement in a transaction of its own, which also writes the outbox rows. No change is ever
  half done, and a frozen allocator holds no locks between statements.
- Each statement begins with the epoch guard (`write_session.GUARD`). Under a stale epoch it changes nothing and
  returns no row, and the write session raises Fenced.
- Conditional updates (`WHERE status = …`, `WHERE ended_at IS NULL`) and the unique indexes leases_one_per_sandbox,
  leases_one_per_holder and sandboxes_one_per_account make each effect happen once. They hold for any number of
  concurrent allocators. The epoch and the single active consumer serve order, not safety.
"""
