"""What is done to finished adapters and checkpoints: merging, editing, exporting, converting."""
