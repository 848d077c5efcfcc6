"""What a run says about itself: spans, metrics, samples, progress, summary. Loads no jax."""
