"""What a run has to say: gathered, drawn, written."""
