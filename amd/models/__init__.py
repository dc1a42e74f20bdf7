"""Models: the plain ViT encoder of students and teachers, the classifier, and predictors of hidden tokens."""
