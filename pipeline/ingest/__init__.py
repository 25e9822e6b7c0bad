"""From a prepared dataset to batches: labeled sampler, unlabeled stream, decoding, views."""
