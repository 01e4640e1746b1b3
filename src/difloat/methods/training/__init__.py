"""Fine-tuning: trainable layers, the model made of them, one training loop."""
