"""From a trained network to class maps and scores."""
