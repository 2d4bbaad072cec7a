"""Objectives, data, the LightningModule and its recipes."""
