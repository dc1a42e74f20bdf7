"""Running jobs on the cluster: reconciler, admission, driver, and the files that connect them."""
