"""Turn frames into batches of clips: sample order, frame sampling, augmentation and loader processes."""
