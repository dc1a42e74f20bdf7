"""Fine-tuning: a classifier on a pre-trained encoder, with the loop of pre-training, and the multi-view test."""
