"""From a model's answers to training data: collected and graded, filtered, chosen, compared."""
