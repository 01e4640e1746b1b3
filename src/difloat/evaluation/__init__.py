"""Pictures of the same seeds, and what differs between them."""
