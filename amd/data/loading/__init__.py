"""From frames to batches of clips: order of samples, frame sampling, augmentation, reader processes."""
