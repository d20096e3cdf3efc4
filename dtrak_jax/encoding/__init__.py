"""Pictures and captions as what a network is given: latents and text embeddings."""
