"""The original llava package as a second front end: its own train(), with a few of its globals replaced."""
