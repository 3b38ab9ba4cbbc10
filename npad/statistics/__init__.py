"""From embeddings to what a fit leaves: Gaussians, a nominal set, images held out."""
