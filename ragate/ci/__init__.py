"""The action and the workflows that `ragate init` writes; this repository's own are made from the same files."""
