"""Job execution on the cluster: reconciler, admission, driver, and the files through which they communicate."""
