"""LoRA on packed layers: its life cycle, PEFT's wrappers, foreign files."""
