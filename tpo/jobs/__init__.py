"""Jobs in SQL, the only truth: `tables` is the schema, `store` every query, `events` what a job tells of itself."""
