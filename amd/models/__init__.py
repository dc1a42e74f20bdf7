"""The networks: one plain ViT for student, teacher and service, and the predictors that only training needs."""
