"""A run's report: `run_log` is what is known of a run, the rest makes one self-contained page of it."""
