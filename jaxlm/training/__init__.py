"""Training: the run's log and progress display here; nothing heavy is imported until it is used."""
