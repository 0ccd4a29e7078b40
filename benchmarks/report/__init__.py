"""Results as tables, plots, and verdicts on what is claimed."""
