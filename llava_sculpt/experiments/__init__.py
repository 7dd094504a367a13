"""Whole experiments: one run from its configuration to the table, the figure and the model card."""
