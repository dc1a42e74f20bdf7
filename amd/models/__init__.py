"""Models: the plain ViT encoder used for students and teachers, the classifier, and predictors of hidden tokens."""
