-- Roles of the services with their permissions. Run it in the broker's database as a superuser, or as the owner if the
-- owner may create roles. Run it before or after the migration, any number of times. Passwords are set elsewhere.
--
-- The migration uses the owner of the database, sandbox_broker. Only this role creates and alters tables.

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'sandbox_broker') THEN
        CREATE ROLE sandbox_broker LOGIN;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'sandbox_broker_gateway') THEN
        CREATE ROLE sandbox_broker_gateway LOGIN;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'sandbox_broker_allocator') THEN
        CREATE ROLE sandbox_broker_allocator LOGIN;
    END IF;
    EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());
    EXECUTE format('GRANT ALL ON DATABASE %I TO sandbox_broker', current_database());
    EXECUTE format(
        'GRANT CONNECT ON DATABASE %I TO sandbox_broker_gateway, sandbox_broker_allocator', current_database()
    );
END
$$;

REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO sandbox_broker;
GRANT USAGE ON SCHEMA public TO sandbox_broker_gateway, sandbox_broker_allocator;

-- The gateway only reads.
GRANT SELECT ON ALL TABLES IN SCHEMA public TO sandbox_broker_gateway;
ALTER DEFAULT PRIVILEGES FOR ROLE sandbox_broker IN SCHEMA public
    GRANT SELECT ON TABLES TO sandbox_broker_gateway;

-- The allocator writes rows and uses the sequences of their keys.
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO sandbox_broker_allocator;
GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO sandbox_broker_allocator;
ALTER DEFAULT PRIVILEGES FOR ROLE sandbox_broker IN SCHEMA public
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO sandbox_broker_allocator;
ALTER DEFAULT PRIVILEGES FOR ROLE sandbox_broker IN SCHEMA public
    GRANT USAGE ON SEQUENCES TO sandbox_broker_allocator;
