-- The first start of the database server in docker-compose.yaml: an application, and who may freeze it.
CREATE ROLE app LOGIN PASSWORD 'app';
CREATE DATABASE app OWNER app;

CREATE ROLE freezer LOGIN PASSWORD 'freezer';
GRANT pg_read_all_stats, pg_signal_backend, pg_checkpoint TO freezer;
GRANT app TO freezer;
-- The first pause makes the journal, which belongs to freezer: as a superuser rather `pg-freeze install --grant freezer`.
GRANT CREATE ON DATABASE postgres TO freezer;
