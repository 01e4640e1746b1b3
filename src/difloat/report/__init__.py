"""The report of a run, gathered, drawn and written."""
