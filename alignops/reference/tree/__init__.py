"""Definition of the tree core: scores, backups, and searches on a plain tree."""
