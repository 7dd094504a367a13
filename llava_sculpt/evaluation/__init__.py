"""Generation, scorers, results: from a model and prepared data to the numbers of the paper's tables."""
