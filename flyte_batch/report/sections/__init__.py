"""The sections of a report's page, one a file: from a run's log to tables, charts and sentences."""
