WITH claimed AS (
    UPDATE sandboxes SET status = 'allocated', status_since = now()
    WHERE sandbox_id = (
        SELECT sandbox_id FROM sandboxes WHERE available_since IS NOT NULL
        ORDER BY available_since, sandbox_id LIMIT 1 FOR UPDATE SKIP LOCKED
    )
    RETURNING sandbox_id, name, external_id, sfdc_account_id
),
leased AS (
    INSERT INTO leases (sandbox_id, holder, track_name, expires_at)
    SELECT sandbox_id, gen_random_uuid(), 'bench-track', now() + interval '4 hours' FROM claimed
    RETURNING sandbox_id, holder, track_name, allocated_at, expires_at
),
announced AS (
    INSERT INTO outbox (type, subject, data)
    SELECT 'sandbox.allocated', sandbox_id, jsonb_build_object(
        'sandbox_id', sandbox_id, 'external_id', external_id, 'name', name, 'holder', holder,
        'track_name', track_name, 'expires_at', floor(extract(epoch FROM expires_at))::bigint
    )
    FROM claimed JOIN leased USING (sandbox_id)
)
SELECT * FROM claimed JOIN leased USING (sandbox_id);
