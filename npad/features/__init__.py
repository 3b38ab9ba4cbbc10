"""From images to a grid of embeddings."""
