"""Measuring a model on images with known defects."""
