"""From images to anomaly maps and scores."""
