"""Figures and pages of a large pool without a scan of it: counters, indexes for each page, and the history of each
sandbox.

The counters are right whatever statement changes the pool, because triggers log each change with it. They only
insert rows, so no transaction waits for another, and the relay adds the logged changes up. The indexes of pages are
over expressions that no statement of the allocator uses ('' || sandbox_id, 0 + lease_id), so that its plans cannot
use them.
"""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


UP = """
LOCK TABLE sandboxes, leases IN SHARE ROW EXCLUSIVE MODE;

ALTER TABLE sandboxes ADD COLUMN track_name text;

COMMENT ON COLUMN sandboxes.track_name IS 'of the lease that it has or had';

UPDATE sandboxes s SET track_name = l.track_name
    FROM leases l WHERE l.sandbox_id = s.sandbox_id AND l.track_name IS NOT NULL;

CREATE INDEX sandboxes_by_name ON sandboxes (name, ('' || sandbox_id));

DROP INDEX sandboxes_to_purge;

CREATE INDEX sandboxes_by_status ON sandboxes (status, status_since, sandbox_id)
    WHERE status IN ('pending_deletion', 'deletion_failed', 'stale', 'deleted');

CREATE INDEX sandboxes_missing ON sandboxes (sandbox_id) WHERE missing_since IS NOT NULL;

CREATE INDEX leases_by_time ON leases (allocated_at, (0 + lease_id));

CREATE INDEX leases_by_holder ON leases (('' || holder), allocated_at, (0 + lease_id));

CREATE INDEX leases_by_track ON leases (track_name, allocated_at, (0 + lease_id)) WHERE track_name IS NOT NULL;

CREATE TABLE pool_changes (
    status text NOT NULL,
    stem text COLLATE "C" NOT NULL,
    track_name text,
    number bigint NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);

COMMENT ON TABLE pool_changes IS 'what pool_counts does not contain yet';

CREATE TABLE pool_counts (
    kind text NOT NULL,
    value text COLLATE "C" NOT NULL,
    status text NOT NULL,
    number bigint NOT NULL,
    PRIMARY KEY (kind, value, status),
    CONSTRAINT pool_counts_kind CHECK (kind IN ('pool', 'name_prefix', 'track_name'))
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);

CREATE INDEX pool_counts_zero ON pool_counts (kind) WHERE number = 0;

COMMENT ON TABLE pool_counts IS 'how many sandboxes there are; exact together with pool_changes';

CREATE TABLE history (
    sandbox_id text NOT NULL,
    outbox_id bigint NOT NULL,
    type text NOT NULL,
    occurred_at timestamptz NOT NULL,
    data jsonb NOT NULL,
    PRIMARY KEY (sandbox_id, outbox_id)
);

COMMENT ON TABLE history IS 'the published events of each sandbox whose record is kept';

INSERT INTO pool_changes
    SELECT status, rtrim(name, '0123456789'), track_name, count(*) FROM sandboxes GROUP BY 1, 2, 3;

CREATE FUNCTION sandboxes_added() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO pool_changes (status, stem, track_name, number)
    SELECT status, rtrim(name, '0123456789'), track_name, count(*) FROM added GROUP BY 1, 2, 3;
    RETURN NULL;
END $$;

CREATE FUNCTION sandboxes_removed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO pool_changes (status, stem, track_name, number)
    SELECT status, rtrim(name, '0123456789'), track_name, -count(*) FROM removed GROUP BY 1, 2, 3;
    RETURN NULL;
END $$;

CREATE FUNCTION sandboxes_changed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO pool_changes (status, stem, track_name, number)
    SELECT status, rtrim(name, '0123456789'), track_name, sum(number)
    FROM (
        SELECT status, name, track_name, 1 AS number FROM added
        UNION ALL
        SELECT status, name, track_name, -1 FROM removed
    ) both_sides
    GROUP BY 1, 2, 3 HAVING sum(number) <> 0;
    RETURN NULL;
END $$;

CREATE TRIGGER sandboxes_added AFTER INSERT ON sandboxes
    REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION sandboxes_added();

CREATE TRIGGER sandboxes_removed AFTER DELETE ON sandboxes
    REFERENCING OLD TABLE AS removed FOR EACH STATEMENT EXECUTE FUNCTION sandboxes_removed();

CREATE TRIGGER sandboxes_changed AFTER UPDATE ON sandboxes
    REFERENCING NEW TABLE AS added OLD TABLE AS removed FOR EACH STATEMENT EXECUTE FUNCTION sandboxes_changed()
"""

DOWN = """
DROP TRIGGER sandboxes_added ON sandboxes;
DROP TRIGGER sandboxes_removed ON sandboxes;
DROP TRIGGER sandboxes_changed ON sandboxes;
DROP FUNCTION sandboxes_added, sandboxes_removed, sandboxes_changed;
DROP TABLE history, pool_counts, pool_changes;
DROP INDEX leases_by_time, leases_by_holder, leases_by_track;
DROP INDEX sandboxes_by_name, sandboxes_by_status, sandboxes_missing;
CREATE INDEX sandboxes_to_purge ON sandboxes (status, status_since)
    WHERE status IN ('stale', 'deletion_failed', 'deleted');
ALTER TABLE sandboxes DROP COLUMN track_name
"""


def upgrade() -> None:
    for statement in UP.split("\n\n"):  # not at each semicolon: functions have their own
        op.execute(statement)


def downgrade() -> None:
    for statement in DOWN.strip().split(";\n"):
        op.execute(statement)
