"""Moving a job on the cluster: reconciler, admission, driver, and the files between them."""
