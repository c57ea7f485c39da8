UPDATE sandboxes SET status = 'allocated', status_since = now()
WHERE sandbox_id = (
    SELECT sandbox_id FROM sandboxes WHERE available_since IS NOT NULL
    ORDER BY available_since, sandbox_id LIMIT 1 FOR UPDATE SKIP LOCKED
)
RETURNING sandbox_id, name, external_id, sfdc_account_id;
